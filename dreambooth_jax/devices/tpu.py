"""TPU chips and slices without the hardware: published figures, and the TPU compiler's analyses of a program."""

import contextlib
import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import topologies
from jaxtyping import PyTree

from dreambooth_jax.devices import compiler_options, hlo
from dreambooth_jax.devices.chips import Chip, chip_of, sizes_of

# What libtpu else asks the machine's metadata server for, and prints errors where there is none; and leave for several
# processes, since compiling uses no chip.
_COMPILING_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@functools.cache
def devices_of(topology: str) -> Sequence[jax.Device]:
    """The devices of a slice, for meshes to compile against. "v5e:1x1" is one chip of a host.

    Raises:
        ImportError: libtpu, which holds the compiler, is not installed.
        ValueError: no such slice.
    """
    chip = chip_of(topology)
    for name, value in _COMPILING_ALONE.items():
        os.environ.setdefault(name, value)
    generation, _, shape = topology.partition(":")
    alone = math.prod(sizes_of(shape)) == 1
    smallest = "2x4" if chip.axes == 2 else "2x2x1"
    name = f"{generation}:{smallest}" if alone else topology
    try:
        with for_absent_devices():
            # The two cores of a v4 chip are one device, as by default on TPU VMs.
            cores = {"chip_config_name": "megacore"} if generation == "v4" else {}
            devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **cores).devices
    except Exception as error:  # jaxlib has one type for all errors
        if "libtpu" in str(error).lower() or "Unable to initialize" in str(error):
            raise ImportError(f'the TPU compiler is not installed ({error}): pip install -e ".[plan]"') from error
        raise ValueError(
            f"topology = {topology!r}: {error}; such as v5e:2x4, v6e:16x16, v5p:2x2x2, v4:2x2x1, tpu7x:2x2x1"
        ) from error
    return devices[: chip.devices] if alone else devices


@contextlib.contextmanager
def for_absent_devices() -> Iterator[None]:
    """Hides XLA_FLAGS from the TPU compiler, which ends the process over flags that only the CPU's compiler knows, and
    keeps its programs out of the cache of compiled ones, which cannot read them without a TPU. Around threads that
    compile, it also keeps each from giving the flags back while another compiles."""
    jax.devices()  # the CPU's compiler reads them here
    flags = os.environ.pop("XLA_FLAGS", None)
    shortest = "jax_persistent_cache_min_compile_time_secs"  # of the programs that are cached
    cached = getattr(jax.config, shortest)
    jax.config.update(shortest, math.inf)
    try:
        yield
    finally:
        jax.config.update(shortest, cached)
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags


class OutOfMemory(Exception):
    """The program does not fit. `missing`: bytes that it needs beyond the device's."""

    def __init__(self, message: str, missing: int):
        super().__init__(message)
        self.missing = missing


_SIZE = r"([\d.]+)([KMGT])"


def missing_bytes(message: str) -> int:
    """What a device lacks for a program by the compiler's error; 0 if it does not say."""
    if exceeded := re.search(rf"Exceeded hbm capacity by {_SIZE}", message):
        return _size(*exceeded.groups())
    if needed := re.search(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)", message):
        number, unit, have, have_unit = needed.groups()
        return _size(number, unit) - _size(have, have_unit)
    return 0


def _size(number: str, unit: str) -> int:
    return int(float(number) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[unit])


@dataclasses.dataclass(frozen=True)
class Cost:
    """The compiler's analysis of one program, per device.

    Attributes:
        arguments, temporaries, peak: bytes of HBM.
        flops, bytes: work of one pass; the bodies of loops count once. FLOPs include the attention kernels'.
        collectives: kind -> (number, bytes that one device receives).
        roofline_seconds: sum over instructions of the longer of compute and memory time: a lower bound.
        cycle_seconds: sum of the compiler's cycle estimates, the second opinion; None after a quick compile.
        kernel_seconds: time of the attention kernels at the published peak; part of both estimates. The compiler does
            not analyse kernels.
        interconnect_seconds: bytes of the collectives at full bandwidth.
        compile_seconds: time of compiling.
        hlo: the optimized program as text.
    """

    arguments: int
    temporaries: int
    peak: int
    flops: float
    bytes: float
    collectives: dict[str, tuple[int, int]]
    compute_seconds: float
    memory_seconds: float
    interconnect_seconds: float
    roofline_seconds: float
    cycle_seconds: float | None
    kernel_seconds: float
    compile_seconds: float
    hlo: str = dataclasses.field(repr=False)

    @property
    def seconds(self) -> float:
        """Estimated time of the program if computation and exchange overlap."""
        return max(self.roofline_seconds, self.interconnect_seconds)

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        times = {
            "compute": self.compute_seconds,
            "HBM": self.memory_seconds,
            "interconnect": self.interconnect_seconds,
        }
        return max(times, key=times.get)


def compile_for(chip: Chip, lowered: jax.stages.Lowered, *, quick: bool = False) -> Cost:
    """Compiles and reads the compiler's analyses. Large products stay whole, where a TPU may loop over slices of them,
    in less memory.

    Args:
        quick: with the compiler's least effort, about a tenth of the time. Temporaries mostly come out smaller, by up
            to 27 %, the roofline shorter for want of copies that fetch ahead, and there are no cycles.

    Raises:
        OutOfMemory: it does not fit.
    """
    started = time.monotonic()
    try:
        with for_absent_devices():
            compiled = lowered.compile(compiler_options.planning(quick=quick))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "Ran out of memory" in str(error):
            raise OutOfMemory(str(error), missing_bytes(str(error))) from error
        raise
    seconds = time.monotonic() - started
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    exchanged, kernels = hlo.collectives(text), hlo.attention_flops(text)
    flops, kernel_seconds = cost["flops"] + kernels, kernels / chip.flops
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    if peak > chip.hbm:  # with its whole effort the compiler may let that pass: 19.0 of 15.75 GiB for IF-I-XL on v5e
        raise OutOfMemory(f"the program needs {peak} bytes of {chip.hbm}", peak - chip.hbm)
    return Cost(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=peak,
        flops=flops,
        bytes=cost["bytes accessed"],
        collectives=exchanged,
        compute_seconds=flops / chip.flops,
        memory_seconds=cost["bytes accessed"] / chip.bandwidth,
        interconnect_seconds=sum(size for _, size in exchanged.values()) / chip.interconnect,
        roofline_seconds=_of_program(cost["optimal_seconds"]) + kernel_seconds,
        cycle_seconds=None if quick else hlo.cycles(text) / chip.clock + kernel_seconds,
        kernel_seconds=kernel_seconds,
        compile_seconds=seconds,
        hlo=text,
    )


def _of_program(seconds: float) -> float:
    """The cost model's seconds. Some releases count a kernel's call as -1 second, so that the sum is negative; the
    whole seconds of a longer program are then lost."""
    return seconds if seconds >= 0 else seconds % 1.0


def shard_bytes(tree: PyTree[jax.Array | jax.ShapeDtypeStruct]) -> int:
    """Bytes that one device holds of a tree of arrays or ShapeDtypeStructs with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
