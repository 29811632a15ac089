"""The cost of a training run on a TPU slice, from shapes alone: memory by the compiler, and an estimate of the time.

The command is `dreambooth_jax.plan`.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

import jax.numpy as jnp
from ml_collections import ConfigDict

from dreambooth_jax.data.buckets import Size, text_of
from dreambooth_jax.devices.chips import Chip, chip_of
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.devices.tpu import (
    Cost,
    OutOfMemory,
    compile_for,
    devices_of,
    for_absent_devices,
    shard_bytes,
)
from dreambooth_jax.families.frozen_text import PROMPTS, lower_encoding, with_cached_text
from dreambooth_jax.families.pipeline import Pipeline, describe_base
from dreambooth_jax.runs.config import ConfigError, absolute_paths, check_config
from dreambooth_jax.runs.effects import idle_fields
from dreambooth_jax.runs.job import (
    Job,
    argument_shapes,
    data_shapes,
    lower_ends,
    lower_painting,
    lower_steps,
    make_job,
    pairs_prior,
    training_size,
)
from dreambooth_jax.runs.loop import is_painted
from dreambooth_jax.runs.setup import read_subject

GIB = 2**30
Compiled = TypeVar("Compiled")
# Tried in this order, each on top of the ones before: what costs least comes first.
REMEDIES = (
    {"remat": "layers"},
    {"mesh_fsdp": -1, "mesh_data": 1},
    {"moment_dtype": "bfloat16"},
    {"second_moment_dtype": "bfloat16"},
    {"moment_dtype": "int8", "second_moment_dtype": "int8"},
    {"train_text_encoder": False},
    {"optimizer": "adafactor"},
    {"method": "lora"},
    {"frozen_dtype": "int8"},
)
SWEEP_TOPOLOGIES = ("v5e:1x1", "v5e:2x4", "v5e:16x16", "v6e:1x1", "v6e:2x4", "v5p:2x2x1", "v4:2x2x1")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cost of one configuration on one slice. Bytes and seconds are per device and per step.

    Attributes:
        parameters, optimizer_state, data: bytes of the arguments, by what they are.
        cost: the compiler's answer for the training steps; None if they do not fit, then `missing` says by how much.
        painting: the compiler's answer for painting one batch of a sheet's pictures; None if the run paints none.
        painting_seconds: for one batch of `at_once` pictures of a sheet.
        class_seconds: for one batch of as many class images, painted without reuse of features.
        class_batches, sheet_batches: numbers of batches that the run paints.
        painting_missing: bytes by which painting does not fit.
        text: the compiler's answer for encoding `PROMPTS` prompts before anything else; None where the text encoder is
            part of the other programs.
        text_missing: bytes by which that does not fit.
        photos: the training photos, in words.
    """

    topology: str
    devices: int
    chip: Chip
    parameters: int
    optimizer_state: int
    data: int
    cost: Cost | None
    missing: int
    painting: Cost | None
    painting_seconds: float
    class_seconds: float = 0.0
    at_once: int = 0
    class_batches: int = 0
    sheet_batches: int = 0
    painting_missing: int = 0
    text: Cost | None = None
    text_missing: int = 0
    photos: str = ""

    @property
    def fits(self) -> bool:
        """Whether every program of the run does."""
        return self.cost is not None and not self.painting_missing and not self.text_missing and self.sheets_fit

    @property
    def sheets_peak(self) -> int:
        """Bytes while sheets are painted, beside optimizer state and data."""
        return self.painting.peak + self.optimizer_state + self.data

    @property
    def sheets_fit(self) -> bool:
        return self.painting is None or not self.sheet_batches or self.sheets_peak <= self.chip.hbm

    @property
    def excess(self) -> int:
        """Bytes by which the program that needs most does not fit."""
        sheets = 0 if self.sheets_fit else self.sheets_peak - self.chip.hbm
        return max(self.missing, self.painting_missing, self.text_missing, sheets)

    def run_seconds(self, config: ConfigDict) -> float:
        """The whole run: steps, class images and sheets, without start and compile times."""
        painting = self.class_batches * self.class_seconds + self.sheet_batches * self.painting_seconds
        return config.steps * self.cost.seconds + painting


def described(config: ConfigDict) -> Pipeline:
    """The base of a run from shapes alone, with the text encoder that a job may leave out."""
    return describe_base(config.base, dtype=jnp.dtype(config.dtype), remat=config.remat)


def job_on(config: ConfigDict, pipeline: Pipeline, topology: str) -> Job:
    """The job on a slice.

    Args:
        pipeline: `described(config)`.

    Raises:
        ValueError: unknown topology, or a mesh that does not cover it.
    """
    mesh = make_mesh(config.mesh_data, config.mesh_fsdp, devices_of(topology))
    return make_job(config, with_cached_text(pipeline, mesh), mesh)


def plan(config: ConfigDict, topology: str, *, class_images: bool = True, quick: bool = True) -> Plan:
    """Compiles the run for a slice.

    Args:
        class_images: also compile the program that paints them, and the sheets.
        quick: with the compiler's least effort, see `compile_for`.

    Raises:
        ValueError: see `job_on`.
    """
    chip, pipeline = chip_of(topology), described(config)
    job = job_on(config, pipeline, topology)
    counts, photos = count_examples(job)
    size = max(counts, key=math.prod)
    state, frozen, data, key = argument_shapes(job, counts[size], size)
    others = [data_shapes(job, n, config.num_class_images, other) for other, n in counts.items() if other != size]
    batches = painted_batches(job)
    paints = class_images and sum(batches) > 0
    encoding = lower_encoding(pipeline, job.mesh)
    lowered = lower_steps(job, state, frozen, data, key, size)
    with for_absent_devices(), ThreadPoolExecutor(1) as beside:  # the compiler uses one core for a program
        painted = beside.submit(painting_costs, job, chip, quick=quick) if paints else None
        cost, missing = _or_missing(lambda: compile_for(chip, lowered, quick=quick))
        costs, painting_missing = _or_missing(painted.result) if painted else (None, 0)
        text, text_missing = _or_missing(lambda: compile_for(chip, encoding, quick=quick)) if encoding else (None, 0)
    painting, seconds, class_seconds = costs or (None, 0.0, 0.0)
    return Plan(
        topology=topology,
        devices=job.mesh.size,
        chip=chip,
        parameters=shard_bytes(state.trainable) + shard_bytes(frozen),
        optimizer_state=shard_bytes(state.opt_state) + (shard_bytes(state.ema) if state.ema else 0),
        data=shard_bytes([data, *others]),
        cost=cost,
        missing=missing,
        painting=painting,
        painting_seconds=seconds,
        class_seconds=class_seconds,
        at_once=job.config.class_batch_size,
        class_batches=batches[0],
        sheet_batches=batches[1],
        painting_missing=painting_missing,
        text=text,
        text_missing=text_missing,
        photos=photos,
    )


def _or_missing(compiled: Callable[[], Compiled]) -> tuple[Compiled | None, int]:
    """What `compiled` gives and 0, or None and the bytes that a device lacks for it."""
    try:
        return compiled(), 0
    except OutOfMemory as error:
        return None, error.missing


def count_examples(job: Job) -> tuple[dict[Size, int], str]:
    """Number of the examples of every shape, as `train` reads them, and a line that says so.

    Where there are no photos yet, the five squares of a typical subject are assumed.

    Raises:
        ValueError, OSError: the photos are there and cannot be used; see `read_subject`.
    """
    config = ConfigDict(dict(job.config))
    try:
        examples, _ = read_subject(job._replace(config=absolute_paths(config)))
    except FileNotFoundError as error:
        return {training_size(config): 5 * config.views}, f"5 assumed: {error}"
    if not config.buckets:
        return {training_size(config): len(examples[0].names)}, f"{len(set(examples[0].names))}"
    counts = {part.images.shape[1:3]: len(part.names) for part in examples}
    shapes = [f"{len(set(part.names))} of {text_of(part.images.shape[1:3])}" for part in examples]
    largest = text_of(max(counts, key=math.prod))
    return counts, f"{', '.join(shapes)}: {len(counts)} programs, of which that of {largest} is compiled here"


def painted_batches(job: Job) -> tuple[int, int]:
    """Batches of pictures of a whole run: (class images, sheets and what the base makes of their prompts)."""
    config = job.config
    every = [prompt for prompt in config.sample_prompts if "{identifier}" not in prompt]
    sheets = sum(is_painted(step, config) for step in range(1, config.steps + 1))
    counts = [config.sample_count * len(every)] + [config.sample_count * len(config.sample_prompts)] * sheets
    class_images = config.num_class_images if config.prior_preservation and not pairs_prior(config) else 0
    in_batches = [-(-count // config.class_batch_size) for count in (class_images, *counts)]
    return in_batches[0], sum(in_batches[1:])


def painting_costs(job: Job, chip: Chip, *, quick: bool = True) -> tuple[Cost, float, float]:
    """The compiler's answer for one batch of a sheet's pictures, its seconds, and those of a batch of class images."""
    cost, seconds = painting_cost(job, chip, quick=quick)
    if job.config.reuse_features == 1 or not painted_batches(job)[0]:
        return cost, seconds, seconds
    whole = job._replace(config=ConfigDict(dict(job.config) | {"reuse_features": 1}))
    return cost, seconds, painting_cost(whole, chip, quick=quick)[1]


def painting_cost(job: Job, chip: Chip, *, quick: bool = True) -> tuple[Cost, float]:
    """The compiler's answer for one batch of pictures, and its seconds: the sum of its parts.

    The compiler counts a loop's body once. A sampling step, or with `reuse_features` so many of them, is what the whole
    program has beyond text encoder and decoder, which are compiled alone; a decoder that takes one picture after the
    other is counted for each.
    """
    config, each = job.config, -(-job.config.class_batch_size // job.mesh.size)
    cost = compile_for(chip, lower_painting(job), quick=quick)
    ends = compile_for(chip, lower_ends(job, config.class_batch_size), quick=quick).seconds
    one = ends if each == 1 else compile_for(chip, lower_ends(job, job.mesh.size), quick=quick).seconds
    in_turn = ends < 1.5 * one  # counted for one picture, whatever the batch
    body, passes = cost.seconds - ends, -(-config.sampling_steps // config.reuse_features)
    return cost, (each * one if in_turn else ends) + passes * body


def advise(config: ConfigDict, topology: str) -> Iterator[tuple[str, Plan]]:
    """Yields (changes, plan), each compiled, until one fits; the changes add up."""
    applied: dict[str, Any] = {}
    for remedy in REMEDIES:
        if "mesh_fsdp" in remedy and len(devices_of(topology)) == 1:
            continue
        fields = applied | remedy
        idle = idle_fields(_changed(config, fields))  # by a remedy that came later
        fields = {name: value for name, value in fields.items() if name not in idle}
        if not _is_remedy(_changed(config, fields), _changed(config, applied)):
            continue
        applied = fields
        tried = plan(_changed(config, applied), topology, class_images=False)
        yield ", ".join(f"{name}={value}" for name, value in applied.items()), tried
        if tried.fits:
            return


def _changed(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
    return ConfigDict(dict(config) | dict(fields))


def _is_remedy(changed: ConfigDict, config: ConfigDict) -> bool:
    """Whether `changed` is another run than `config`, and a possible one. Other methods than full fine-tuning train few
    parameters already."""
    if dict(changed) == dict(config) or (changed.method != config.method and config.method != "full"):
        return False
    try:
        check_config(changed)
    except ConfigError:
        return False
    return True


def describe(plan: Plan, config: ConfigDict) -> str:
    """The plan as text."""
    chip, cost = plan.chip, plan.cost
    images = config.batch_size * (1 + config.prior_preservation)
    lines = [
        (
            "slice",
            f"{plan.topology}: {plan.devices} {'chips' if chip.devices == 1 else 'cores'} of {chip.hbm / GIB:.2f} GiB",
        ),
        ("photos", plan.photos),
        ("batch", f"{images} images a step over all devices"),
        ("parameters", f"{plan.parameters / GIB:7.2f} GiB a device"),
        ("optimizer", f"{plan.optimizer_state / GIB:7.2f} GiB"),
        ("data", f"{plan.data / GIB:7.2f} GiB"),
    ]
    if plan.text is not None:
        text = plan.text
        lines.append(
            ("prompts", f"{PROMPTS} in {text.seconds * 1e3:.0f} ms, peak {text.peak / GIB:.2f} GiB, before the rest")
        )
    if plan.text_missing:
        lines.append(("prompts", f"do NOT fit: {too_much(plan.text_missing)}: split the text encoder (mesh_fsdp)"))
    if cost is None:
        lines += [("fits", f"NO: {too_much(plan.missing)}")]
        return lines_of(lines)
    spare = chip.hbm - cost.peak
    lines += [
        ("temporaries", f"{cost.temporaries / GIB:7.2f} GiB"),
        ("peak", f"{cost.peak / GIB:7.2f} GiB of {chip.hbm / GIB:.2f}: fits, {spare / GIB:.2f} GiB to spare"),
        ("work", f"{cost.flops / 1e12:.2f} TFLOP and {cost.bytes / 1e9:.1f} GB moved in HBM, a device and step"),
    ]
    for kind, (count, size) in cost.collectives.items():
        lines.append((kind, f"{count} of {size / 1e6:.1f} MB in all"))
    cycles = "" if cost.cycle_seconds is None else f"; by cycles {cost.cycle_seconds * 1e3:.0f} ms"
    lines += [
        ("step", f"{cost.seconds * 1e3:.0f} ms at least, bound by {cost.bound}{cycles}"),
        ("run", f"{plan.run_seconds(config) / 60:.1f} minutes for {config.steps} steps and {_painted(plan)}"),
        ("compiled in", f"{cost.compile_seconds:.0f} s"),
    ]
    if plan.painting is not None:
        painting = plan.painting
        whole = f", class images {plan.class_seconds:.1f} s" if plan.class_seconds != plan.painting_seconds else ""
        lines.insert(
            -1,
            (
                "painting",
                f"{plan.painting_seconds:.1f} s for {plan.at_once} pictures{whole}, peak {painting.peak / GIB:.2f} GiB",
            ),
        )
        fit = "fit" if plan.sheets_fit else "do NOT fit: paint fewer at once (class_batch_size)"
        lines.insert(-1, ("sheets", f"peak {plan.sheets_peak / GIB:.2f} GiB beside the optimizer: {fit}"))
    if plan.painting_missing:
        lines.append(painting_does_not_fit(plan.painting_missing))
    return lines_of(lines)


def _painted(plan: Plan) -> str:
    if plan.painting is None:
        return "no pictures"
    painted, sheets = plan.class_batches * plan.at_once, plan.sheet_batches * plan.at_once
    return f"{painted} class images and {sheets} pictures of sheets"


def too_much(excess: int) -> str:
    """Bytes by which a program does not fit, for a person."""
    return f"{excess / GIB:.2f} GiB too much"


def painting_does_not_fit(excess: int) -> tuple[str, str]:
    """(name, text) of the line about painting that needs `excess` bytes more than there are."""
    return "painting", f"does NOT fit: {too_much(excess)}: paint fewer at once (class_batch_size)"


def lines_of(lines: Sequence[tuple[str, str]]) -> str:
    """Lines of (name, text), the names one above the other."""
    return "\n".join(f"{name:>18}: {text}" for name, text in lines)


def as_json(plan: Plan, config: ConfigDict) -> dict[str, Any]:
    """The figures of `describe`, in bytes and seconds."""
    values = dataclasses.asdict(plan) | {"fits": plan.fits}
    for name in ("cost", "painting", "text"):
        if values[name]:
            del values[name]["hlo"]
    if plan.cost is not None:
        values["run_seconds"] = plan.run_seconds(config)
    return values


def sweep(config: ConfigDict) -> Iterator[tuple[str, Plan]]:
    """Yields (settings, plan) over slices, parameters on every device or split over all; (1+1) images a device at
    least."""
    # The compiler keeps one to two gigabytes of every program: each has a process of its own.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for topology in SWEEP_TOPOLOGIES:
            devices = len(devices_of(topology))
            for fsdp in sorted({1, devices}):
                changed = ConfigDict(dict(config))
                changed.update(mesh_data=-1, mesh_fsdp=fsdp, batch_size=max(config.batch_size, devices))
                found = pool.submit(plan, changed, topology, class_images=False)
                yield f"fsdp {fsdp}, batch {changed.batch_size}", found.result()


def print_plan(config: ConfigDict, options: argparse.Namespace) -> None:
    found = plan(config, options.topology, quick=not options.full)
    print(json.dumps(as_json(found, config), indent=2) if options.json else describe(found, config), flush=True)
    if found.cost is None and options.advise and not options.json:
        print("what to change, each compiled:", flush=True)
        for changes, tried in advise(config, options.topology):
            answer = "still too much"
            if tried.fits:
                answer = f"fits, peak {tried.cost.peak / GIB:.2f} GiB, {tried.cost.seconds * 1e3:.0f} ms a step"
            print(f"  {changes}: {answer}", flush=True)


def print_sweep(config: ConfigDict) -> None:
    print("| slice | settings | peak GiB | fits | step ms | images/s | bound |\n|---|---|---|---|---|---|---|")
    for settings, found in sweep(config):
        row = [found.topology, settings]
        if found.fits:
            images = int(settings.rsplit(" ", 1)[1]) * (1 + config.prior_preservation)
            row += [f"{found.cost.peak / GIB:.2f}", "yes", f"{found.cost.seconds * 1e3:.0f}"]
            row += [f"{images / found.cost.seconds:.1f}", found.cost.bound]
        else:
            row += [f"{(found.chip.hbm + found.missing) / GIB:.2f}", "no", "", "", ""]
        print("| " + " | ".join(row) + " |", flush=True)
