"""TPU chips and slices by name, with published figures. Nothing here imports JAX: a wrong name is refused at once."""

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device: a chip, of tpu7x one of its two cores with half of the chip's figures.

    Attributes:
        hbm: bytes that a program can use.
        flops: published peak in bfloat16, FLOP/s.
        bandwidth: published HBM bandwidth, bytes/s.
        interconnect: published bandwidth to all neighbours together, bytes/s.
        clock: cycles/s, for the compiler's cycle estimates.
        axes: number of dimensions of a slice.
        most: chips of the largest slice.
        devices: JAX devices of a chip.
    """

    hbm: int
    flops: float
    bandwidth: float
    interconnect: float
    clock: float
    axes: int
    most: int
    devices: int = 1


_GIB = 2**30
# cloud.google.com/tpu/docs/system-architecture; usable HBM as the compiler's out-of-memory check has it. tpu7x: half of
# the chip's published figures; the clock, which is not published, is that of four arrays of 256 x 256 at the peak.
CHIPS = {
    "v4": Chip(int(30.75 * _GIB), 275e12, 1228e9, 300e9, 1.05e9, axes=3, most=4096),
    "v5e": Chip(int(15.75 * _GIB), 197e12, 819e9, 200e9, 1.5e9, axes=2, most=256),
    "v5p": Chip(int(95.74 * _GIB), 459e12, 2765e9, 600e9, 1.75e9, axes=3, most=8960),
    "v6e": Chip(int(31.25 * _GIB), 918e12, 1640e9, 448e9, 1.75e9, axes=2, most=256),
    "tpu7x": Chip(int(94.75 * _GIB), 1153.5e12, 3690e9, 600e9, 2.2e9, axes=3, most=9216, devices=2),
}


def chip_of(topology: str) -> Chip:
    """The device of a slice such as "v5e:2x4".

    Raises:
        ValueError: unknown generation, or a shape that no slice of it has.
    """
    generation, _, shape = topology.partition(":")
    if generation not in CHIPS:
        raise ValueError(f"topology = {topology!r}: expected one of {', '.join(CHIPS)} and a shape, such as v5e:2x4")
    chip = CHIPS[generation]
    # libtpu ends the process on some shapes.
    sizes = sizes_of(shape)
    if len(sizes) != chip.axes or not 1 <= math.prod(sizes) <= chip.most:
        example = "2x4" if chip.axes == 2 else "2x2x1"
        raise ValueError(
            f"topology = {topology!r}: expected {chip.axes} sizes of at least 1 whose product is at most {chip.most}, "
            f"such as {generation}:{example}"
        )
    return chip


def sizes_of(shape: str) -> list[int]:
    """ "2x4" -> [2, 4]; empty for anything else."""
    return [int(size) for size in shape.split("x")] if re.fullmatch(r"\d{1,4}(x\d{1,4})*", shape) else []
