"""The cost of many subjects in one program on a TPU slice, from shapes alone, beside one subject alone on one chip.

The command is `dreambooth_jax.plan --subjects N`, or with a config of many subjects.
"""

import argparse
import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dreambooth_jax.data.sources import list_images
from dreambooth_jax.devices.chips import Chip, chip_of
from dreambooth_jax.devices.tpu import (
    Cost,
    OutOfMemory,
    compile_for,
    for_absent_devices,
    shard_bytes,
)
from dreambooth_jax.runs import slices
from dreambooth_jax.runs.config import absolute_paths, check_config
from dreambooth_jax.runs.job import Job
from dreambooth_jax.runs.lanes import lower_many, many_shapes, subjects_a_device
from dreambooth_jax.runs.slices import GIB, Plan
from dreambooth_jax.runs.subjects import read_subjects


class Crowd(NamedTuple):
    """Numbers of a run of many: subjects and their different class nouns."""

    subjects: int
    nouns: int


@dataclasses.dataclass(frozen=True)
class Together:
    """The cost of a run of many on a slice. Bytes and seconds are per device and per step.

    Attributes:
        chips: number of the slice's chips.
        each: subjects that every device trains.
        held: bytes of the subjects' states and data.
        cost: the compiler's answer for the training steps; None if they do not fit, then `missing` says by how much.
        other: number of subjects a device of a second compile, and its peak in bytes (0: not known).
        painting: the compiler's answer for painting one batch of a sheet's pictures; None if the run paints none.
        painting_seconds, class_seconds: for one batch of a sheet's pictures, and of class images.
        painting_missing: bytes by which painting does not fit.
        batches: batches of `at_once` pictures of the whole run: class images, sheets.
        steps: number of steps of the whole run.
        alone: plan of one subject alone on one chip.
    """

    topology: str
    devices: int
    chips: int
    chip: Chip
    crowd: Crowd
    each: int
    held: int
    cost: Cost | None
    missing: int
    other: tuple[int, int]
    painting: Cost | None
    painting_seconds: float
    class_seconds: float
    painting_missing: int
    batches: tuple[int, int]
    at_once: int
    steps: int
    alone: Plan

    @property
    def sheets_peak(self) -> int:
        """Bytes while sheets are painted, beside the states and data of all."""
        return self.painting.peak + self.held if self.painting and self.batches[1] else 0

    @property
    def fits(self) -> bool:
        """Whether every program of the run does."""
        return self.cost is not None and not self.painting_missing and self.sheets_peak <= self.chip.hbm

    @property
    def most(self) -> int | None:
        """Subjects a device that fit, by a line through the two compiles: an estimate. None if a compile that does not
        fit gives no amount."""
        peak = self.cost.peak if self.cost else (self.missing and self.chip.hbm + self.missing)
        (count, other), each = self.other, self.each
        if not peak or not other or peak == other:
            return None
        slope = (peak - other) / (each - count)
        found = each + math.floor((self.chip.hbm - peak) / slope)
        return max(found, each) if self.cost else max(0, min(found, each - 1))

    @property
    def seconds(self) -> float:
        """A step of one subject: that of all, divided by the subjects that a device trains."""
        return self.cost.seconds / self.each

    @property
    def ratio(self) -> float | None:
        """Time of a subject's step on one device against that of a run of it alone."""
        return self.seconds / self.alone.cost.seconds if self.alone.cost else None

    @property
    def run_seconds(self) -> float:
        """The whole run: steps, class images and sheets, without start and compile times."""
        class_images, sheets = self.batches
        painting = class_images * self.class_seconds + sheets * self.painting_seconds
        return self.steps * self.cost.seconds + painting


def together(config: ConfigDict, topology: str, count: int, *, quick: bool = True) -> Together:
    """Compiles a run of many for a slice, and a run of one for a chip of it.

    Args:
        count: number of subjects; 0 for those that `config.subjects` names.
        quick: with the compiler's least effort, see `compile_for`.

    Raises:
        ConfigError: the method or a field is not implemented for many; see `read_subjects` where they are read.
        ValueError: unknown topology, or a mesh that does not cover it.
    """
    config, crowd = crowd_of(config, count)
    chip, job = chip_of(topology), slices.job_on(config, slices.described(config), topology)
    mesh = job.mesh
    each = subjects_a_device(mesh, crowd.subjects)
    one = f"{topology.partition(':')[0]}:{'x'.join('1' * chip.axes)}"
    single = ConfigDict(dict(config) | {"mesh_data": -1, "mesh_fsdp": 1})
    alone = slices.plan(single, one, class_images=mesh.size == chip.devices, quick=quick)
    used = crowd.subjects // each
    other = crowd._replace(subjects=used * (each // 2 if each > 1 else 2))
    photos = max(slices.count_examples(job)[0].values())
    lowered, held = _lowered(job, crowd, photos)
    lowered_other, _ = _lowered(job, other, photos)
    with for_absent_devices(), ThreadPoolExecutor(1) as beside:  # the compiler uses one core for a program
        second = beside.submit(_compiled, chip, lowered_other, quick)
        cost, missing = _compiled(chip, lowered, quick)
        found, less = second.result()
    batches = _batches(job, crowd)
    painting, painting_seconds, class_seconds = alone.painting, alone.painting_seconds, alone.class_seconds
    painting_missing = alone.painting_missing
    if sum(batches) and painting is None and not painting_missing:
        try:
            painting, painting_seconds, class_seconds = slices.painting_costs(job, chip, quick=quick)
        except OutOfMemory as error:
            painting_missing = error.missing
    return Together(
        topology=topology,
        devices=mesh.size,
        chips=mesh.size // chip.devices,
        chip=chip,
        crowd=crowd,
        each=each,
        held=held,
        cost=cost,
        missing=missing,
        other=(subjects_a_device(mesh, other.subjects), found.peak if found else less and chip.hbm + less),
        painting=painting,
        painting_seconds=painting_seconds,
        class_seconds=class_seconds,
        painting_missing=painting_missing,
        batches=batches,
        at_once=job.config.class_batch_size,
        steps=config.steps,
        alone=alone,
    )


def crowd_of(config: ConfigDict, count: int) -> tuple[ConfigDict, Crowd]:
    """(config of a run of one of the subjects, the numbers of all); see `together`.

    Subjects that the config names are read: the config is that of the one with the most photos, with the largest rank
    and the most steps. Others are like the config's own subject, and have one class noun.
    """
    check_config(ConfigDict(dict(config) | {"subjects": config.subjects or "many"}))
    subjects = read_subjects(absolute_paths(config)) if config.subjects else []
    config = ConfigDict(dict(config) | {"subjects": ""})
    if not subjects:
        return config, Crowd(count, 1)
    largest = max(subjects, key=lambda subject: len(list_images(subject.photos)))
    most = {name: max(getattr(subject, name) for subject in subjects) for name in ("lora_rank", "steps")}
    nouns = len({subject.class_noun for subject in subjects})
    own = ConfigDict(dict(largest.config(config)) | most)
    return own, Crowd(count or len(subjects), min(count or nouns, nouns))


def _lowered(job: Job, crowd: Crowd, photos: int) -> tuple[jax.stages.Lowered, int]:
    """(the program of the training steps, bytes of the subjects' states and data that a device holds)."""
    arguments = many_shapes(job, crowd.subjects, photos, shared_prior=crowd.nouns == 1)
    states, _, lanes, _ = arguments
    return lower_many(job, *arguments), shard_bytes((states, lanes))


def _compiled(chip: Chip, lowered: jax.stages.Lowered, quick: bool) -> tuple[Cost | None, int]:
    """(the compiler's answer or None, bytes by which the program does not fit)."""
    try:
        return compile_for(chip, lowered, quick=quick), 0
    except OutOfMemory as error:
        return None, error.missing


def _batches(job: Job, crowd: Crowd) -> tuple[int, int]:
    """Batches of class images of all nouns, and of all subjects' sheets, painted once at the end."""
    class_images, _ = slices.painted_batches(job)
    sheet = job.config.sample_count * len(job.config.sample_prompts)
    return crowd.nouns * class_images, crowd.subjects * -(-sheet // job.config.class_batch_size)


def describe(found: Together, config: ConfigDict, price: float) -> str:
    """For a person; `price` is that of a chip and hour, 0 if it is not known."""
    crowd, chip, cost = found.crowd, found.chip, found.cost
    device = "chip" if chip.devices == 1 else "core"
    used = crowd.subjects // found.each
    idle = f"; {found.devices - used} of {found.devices} {device}s do the work of others" * (used < found.devices)
    nouns = f"{crowd.nouns} class noun{'s' * (crowd.nouns > 1)}"
    lines = [("subjects", f"{crowd.subjects} of {nouns} on {found.topology}, {found.each} a {device}{idle}")]
    points = " and ".join(str(n) for n in sorted((found.each, found.other[0])))
    most = "" if found.most is None else f"; about {found.most} a {device} fit, by a line through {points}"
    if cost is None:
        return slices.lines_of([*lines, ("fits", f"NO: {slices.too_much(found.missing)}{most}")])
    painted = (
        f"{sum(found.batches) * found.at_once} class images and pictures of sheets" if found.painting else "no pictures"
    )
    alone = "one alone does not fit a chip"
    if found.ratio is not None:
        alone = f"one alone on a {device} {found.alone.cost.seconds * 1e3:.1f} ms: {found.ratio:.2f} of it"
    hours = found.run_seconds / 3600 * found.chips
    lines += [
        ("subjects' state", f"{found.held / GIB:7.2f} GiB a {device}, of {cost.arguments / GIB:.2f} GiB held"),
        ("temporaries", f"{cost.temporaries / GIB:7.2f} GiB"),
        ("peak", f"{cost.peak / GIB:7.2f} GiB of {chip.hbm / GIB:.2f}: fits{most}"),
        *((kind, f"{n} of {size / 1e6:.2g} MB in all") for kind, (n, size) in cost.collectives.items()),
        ("step", f"{cost.seconds * 1e3:.0f} ms at least for all, bound by {cost.bound}"),
        ("a subject's step", f"{found.seconds * 1e3:.1f} ms; {alone} (remat = {config.remat} in both)"),
        ("run", f"{found.run_seconds / 60:.1f} minutes: {found.steps} steps, {painted}"),
        ("all", f"{_cost(hours, price)}, besides start, compiling and reading of weights"),
        ("a subject", _cost(hours / crowd.subjects, price)),
    ]
    if found.painting_missing or found.sheets_peak > chip.hbm:
        lines.append(slices.painting_does_not_fit(found.painting_missing or found.sheets_peak - chip.hbm))
    return slices.lines_of(lines)


def _cost(hours: float, price: float) -> str:
    return f"{hours:.3g} chip hours" + (f", {hours * price:.3g} at {price:g} a chip hour" if price else "")


def as_json(found: Together) -> dict[str, Any]:
    """The figures of `describe`, in bytes and seconds."""
    values = dataclasses.asdict(found) | {"fits": found.fits, "most": found.most}
    values["crowd"] = found.crowd._asdict()
    for name in ("cost", "painting"):
        if values[name]:
            del values[name]["hlo"]
    del values["alone"]
    if found.cost is not None:
        values |= {"ratio": found.ratio, "run_seconds": found.run_seconds}
    return values


def print_together(config: ConfigDict, options: argparse.Namespace) -> None:
    """Prints the plan of one subject alone on a chip, and beside it that of all."""
    own, _ = crowd_of(config, options.subjects)
    found = together(config, options.topology, options.subjects, quick=not options.full)
    if options.json:
        print(json.dumps(slices.as_json(found.alone, own) | {"together": as_json(found)}, indent=2), flush=True)
        return
    print(f"One alone\n{slices.describe(found.alone, own)}", flush=True)
    print(f"Together\n{describe(found, own, options.chip_hour_price)}", flush=True)
