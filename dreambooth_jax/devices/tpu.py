"""TPU chips and slices that are not there: their published figures, and what their compiler says of a program."""

import contextlib
import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from dreambooth_jax.devices import compiler_options


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, which is one device.

    Attributes:
        hbm: bytes that a program can use.
        flops: bfloat16 FLOP/s, published.
        bandwidth: HBM bytes/s, published.
        interconnect: bytes/s to all neighbours together, published.
        clock: cycles/s, for the compiler's cycle estimates.
    """

    hbm: int
    flops: float
    bandwidth: float
    interconnect: float
    clock: float


_GIB = 2**30
# cloud.google.com/tpu/docs/system-architecture; usable HBM as the compiler's out-of-memory check has it.
CHIPS = {
    "v4": Chip(int(30.75 * _GIB), 275e12, 1228e9, 300e9, 1.05e9),
    "v5e": Chip(int(15.75 * _GIB), 197e12, 819e9, 200e9, 1.5e9),
    "v5p": Chip(int(95.74 * _GIB), 459e12, 2765e9, 600e9, 1.75e9),
    "v6e": Chip(int(31.25 * _GIB), 918e12, 1640e9, 448e9, 1.75e9),
}


def chip_of(topology: str) -> Chip:
    """Raises ValueError for a generation that is not known."""
    generation = topology.partition(":")[0]
    if generation not in CHIPS:
        raise ValueError(f"topology = {topology!r}: expected one of {', '.join(CHIPS)} and a shape, such as v5e:2x4")
    return CHIPS[generation]


@functools.cache
def devices_of(topology: str) -> Sequence[Any]:
    """The devices of a slice that is not there, for meshes to compile against. "v5e:1x1" is one chip of a host.

    Raises:
        ImportError: libtpu, which holds the compiler, is not installed.
        ValueError: no such slice.
    """
    chip_of(topology)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # ask nobody what machine this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # a compile takes no chip from others
    generation, _, shape = topology.partition(":")
    wanted = math.prod(map(int, re.findall(r"\d+", shape))) if shape else 0
    smallest = {"v4": "2x2x1", "v5p": "2x2x1"}.get(generation, "2x4")
    name = f"{generation}:{smallest}" if wanted == 1 else topology
    try:
        with _without_xla_flags():
            # Both cores of a v4 chip work as one device, as they do by default on TPU VMs.
            cores = {"chip_config_name": "megacore"} if generation == "v4" else {}
            devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **cores).devices
    except Exception as error:  # jaxlib has one type for all that can go wrong
        if "libtpu" in str(error).lower() or "Unable to initialize" in str(error):
            raise ImportError(f'the TPU compiler is not installed ({error}): pip install -e ".[plan]"') from error
        raise ValueError(
            f"topology = {topology!r}: {error}; such as v5e:2x4, v6e:16x16, v5p:2x2x2, v4:2x2x1"
        ) from error
    return devices[:1] if wanted == 1 else devices


@contextlib.contextmanager
def _without_xla_flags():
    """The TPU compiler reads XLA_FLAGS when it begins and ends the process over a flag that only the CPU's knows."""
    jax.devices()  # the CPU's compiler has read them then
    flags = os.environ.pop("XLA_FLAGS", None)
    try:
        yield
    finally:
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags


class OutOfMemory(Exception):
    """The program does not fit; `missing` is by how many bytes, as the compiler's message has it."""

    def __init__(self, message: str):
        super().__init__(message)
        exceeded = re.search(rf"Exceeded hbm capacity by {_SIZE}", message)
        needed = re.search(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)", message)
        if exceeded:
            self.missing = _size(*exceeded.groups())
        elif needed:
            number, unit, have, have_unit = needed.groups()
            self.missing = _size(number, unit) - _size(have, have_unit)
        else:
            self.missing = 0


_SIZE = r"([\d.]+)([KMGT])"


def _size(number: str, unit: str) -> int:
    return int(float(number) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[unit])


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the compiler says of one program, per device.

    Attributes:
        arguments, temporaries, peak: bytes of HBM.
        flops, bytes: of one pass; the bodies of loops count once. FLOPs include the attention kernels'.
        collectives: kind -> (number, bytes that one device receives).
        roofline_seconds: sum over instructions of the longer of compute and memory time: a lower bound.
        cycle_seconds: the compiler's cycle estimates: the second opinion; None of a quick compile.
        kernel_seconds: of the attention kernels, which the compiler cannot see into, at the published peak; part of
            both.
        interconnect_seconds: bytes of the collectives at full bandwidth.
        compile_seconds: how long the compiler took.
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
        """The estimate: what bounds it if everything else overlaps."""
        return max(self.roofline_seconds, self.interconnect_seconds)

    @property
    def bound(self) -> str:
        """What the program waits for most."""
        times = {
            "compute": self.compute_seconds, "HBM": self.memory_seconds, "interconnect": self.interconnect_seconds,
        }  # fmt: skip
        return max(times, key=times.get)


def compile_for(chip: Chip, lowered: jax.stages.Lowered, *, quick: bool = False) -> Cost:
    """Compiles and reads the compiler's analyses. Large products stay whole, where a TPU may loop over slices of them,
    in less memory.

    Args:
        quick: with the compiler's least effort, about a tenth of the time. Temporaries come out up to 8 % smaller, the
            roofline shorter for want of copies that fetch ahead, and there are no cycles.

    Raises:
        OutOfMemory: it does not fit.
    """
    started = time.monotonic()
    try:
        with _without_xla_flags():
            compiled = lowered.compile(compiler_options.planning(quick=quick))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "Ran out of memory" in str(error):
            raise OutOfMemory(str(error)) from error
        raise
    seconds = time.monotonic() - started
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    exchanged, kernels = collectives(text), attention_flops(text)
    flops, kernel_seconds = cost["flops"] + kernels, kernels / chip.flops
    return Cost(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        flops=flops,
        bytes=cost["bytes accessed"],
        collectives=exchanged,
        compute_seconds=flops / chip.flops,
        memory_seconds=cost["bytes accessed"] / chip.bandwidth,
        interconnect_seconds=sum(size for _, size in exchanged.values()) / chip.interconnect,
        # Every call that the cost model cannot see into is counted as -1 second.
        roofline_seconds=cost["optimal_seconds"] % 1.0 + kernel_seconds,
        cycle_seconds=None if quick else _cycles(text) / chip.clock + kernel_seconds,
        kernel_seconds=kernel_seconds,
        compile_seconds=seconds,
        hlo=text,
    )


def _cycles(hlo: str) -> int:
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', hlo)))


_ATTENTION = re.compile(r"%splash_mha_(?P<pass>fwd|dkv)\S* = .*operand_layout_constraints=(?P<operands>.*)")
_TENSOR = re.compile(r"\b(?:bf16|f32)\[(\d+),(\d+),(\d+),(\d+)\]")
# Matrix products of queries by keys by width: scores and values; backward scores again, and four gradients.
_PRODUCTS = {"fwd": 2, "dkv": 5}


def attention_flops(hlo: str) -> float:
    """FLOPs of the splash attention kernels in optimized HLO, on padded heads."""
    total = 0
    for match in _ATTENTION.finditer(hlo):
        (batch, heads, queries, width), (_, _, keys, _) = (
            map(int, shape) for shape in _TENSOR.findall(match["operands"])[:2]
        )
        total += _PRODUCTS[match["pass"]] * 2 * batch * heads * queries * keys * width
    return float(total)


_COLLECTIVE = re.compile(
    r"= (?P<result>\(?(?:/\*index=\d+\*/|[^=])*?) "  # long tuples number their parts
    r"(?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?\((?P<rest>.*)"
)
# Two groups of four: replica_groups=[2,4]<=[8], or {{0,1,2,3},{4,5,6,7}}, or mesh['a'=2,'b'=4] {'b'}, where 'b':(1)2 is
# a part of an axis, of size 2.
_GROUPS = re.compile(
    r"replica_groups=(?:\[\d+,(?P<size>\d+)\]|\{\{(?P<first>[\d,]*)\}|mesh\[(?P<mesh>[^\]]*)\] \{(?P<axes>[^}]*)\})"
)
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """Number of the collectives in optimized HLO, and the bytes that one device receives in them, by kind.

    With g devices in a group and a result of s bytes, an all-gather brings (g - 1) / g s, a reduce-scatter (g - 1) s,
    and an all-reduce, which is both, 2 (g - 1) / g s. TPUs write a reduce-scatter as a fusion of that name, of an
    all-reduce and the slice that a device keeps.
    """
    found: dict[str, list[float]] = {}
    fused = False
    for line in hlo.splitlines():
        if line.endswith("{"):
            fused = line.lstrip().startswith("%all-reduce-scatter")
        match = _COLLECTIVE.search(line)
        if not match:
            continue
        sizes = [_bytes_of(kind, dims) for kind, dims in _ARRAY.findall(match["result"])]
        # A "-start" returns its operands beside its results; the larger half is what is exchanged.
        size = max(sizes, default=0) if match["start"] else sum(sizes)
        received = size * _received(match["kind"], _group_size(match["rest"]))
        if fused:
            found.setdefault("reduce-scatter", []).append(received / 2)
        else:
            found.setdefault(match["kind"], []).append(received)
    return {kind: (len(sizes), int(sum(sizes))) for kind, sizes in sorted(found.items())}


def _group_size(text: str) -> int | None:
    """Devices that take part in a collective, if its text says so."""
    groups = _GROUPS.search(text)
    if not groups:
        return None
    if groups["mesh"]:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups["mesh"]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups["axes"])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return int(groups["size"]) if groups["size"] else groups["first"].count(",") + 1


def _received(kind: str, group: int | None) -> float:
    """Bytes received for each byte of the result; of a group of unknown size, as of a large one."""
    share = 1.0 if group is None else (group - 1) / group
    return {"all-reduce": 2 * share, "reduce-scatter": group - 1 if group else 1.0, "collective-permute": 1.0}.get(
        kind, share
    )


def _bytes_of(kind: str, dims: str) -> int:
    bits = {"pred": 8, "bf16": 16}.get(kind) or int(kind[1:])
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8


def shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of arrays or ShapeDtypeStructs with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
