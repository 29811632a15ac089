"""Many subjects in one program: one run whose states have a leading axis of subjects (adapters.many)."""

import csv
import functools
import io
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from dreambooth_jax.adapters.many import (
    Lanes,
    cut_to,
    finished,
    lane,
    over_subjects,
    padded_to,
    stack,
    stacked_data,
)
from dreambooth_jax.data.captions import read_text
from dreambooth_jax.data.class_images import class_images_to_paint, paint_missing, read_class_images
from dreambooth_jax.data.contradictions import contradictions, too_long
from dreambooth_jax.data.encode import Encoder, make_encoder
from dreambooth_jax.data.identifiers import check_identifier
from dreambooth_jax.data.images import Examples
from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.sharding import make_mesh, replicated
from dreambooth_jax.diffusion.examples import EncodedExamples, TrainingData
from dreambooth_jax.diffusion.step import Metrics, TrainState
from dreambooth_jax.evaluation.dataset import CLASSES_FILE, read_dataset
from dreambooth_jax.families.pipeline import read_params
from dreambooth_jax.files.digest import weights_digest
from dreambooth_jax.files.lora_kohya import write_kohya
from dreambooth_jax.files.shipped import shipped
from dreambooth_jax.models.params import Params, count
from dreambooth_jax.painting.sheets import paint_rows, save_sheet
from dreambooth_jax.runs import checkpoint
from dreambooth_jax.runs.config import ConfigError, absolute_paths, fill
from dreambooth_jax.runs.exports import about_adapter
from dreambooth_jax.runs.fingerprints import Fingerprints, check_same, of_captions, of_pixels
from dreambooth_jax.runs.job import (
    Job,
    held,
    initial,
    lower_calls,
    make_job,
    numbers_of,
    open_base,
    painter_of,
    read_shapes,
    reads_tokens,
    split_shapes,
    training_step,
)
from dreambooth_jax.runs.preemption import Preemption
from dreambooth_jax.runs.report import check_finite
from dreambooth_jax.runs.setup import begin, claim, read_subject, weights_of


class Subject(NamedTuple):
    """A row of the table of subjects: its own values of config fields. Several rows may have the same photos: a sweep
    of the learning rate and the rank."""

    name: str
    photos: str
    identifier: str
    class_noun: str
    steps: int
    learning_rate: float
    lora_rank: int

    def config(self, config: ConfigDict) -> ConfigDict:
        """The config of a run of this subject alone."""
        own = {name: getattr(self, name) for name in _OWN}
        return ConfigDict(dict(config) | own | {"instance_images": self.photos})


# Config fields that a row may give -> reader of their text.
_OWN = {"identifier": str, "class_noun": str, "steps": int, "learning_rate": float, "lora_rank": int}


def read_subjects(config: ConfigDict) -> list[Subject]:
    """The subjects that `config.subjects` names: folders of images in a folder, with the nouns of google/dreambooth's
    classes file if it is there, or the rows of a .csv table.

    Raises:
        ConfigError: no such folder or table, no subjects in it, an unknown column, a name twice, a row without photos,
            a value that is no number, or ranks that differ where the method or the optimizer cannot fill them up.
        ValueError: the table is not text in UTF-8.
    """
    path = Path(shipped(config.subjects)).expanduser()
    if path.suffix == ".csv" and path.is_file():
        table = csv.DictReader(io.StringIO(read_text(epath.Path(path))))
        rows = list(table)
        if unknown := sorted({*(table.fieldnames or ())} - {*Subject._fields}):
            raise ConfigError(
                f"{path}: unknown columns {', '.join(unknown)}; expected some of {', '.join(Subject._fields)}"
            )
        wrong = [str(number) for number, row in enumerate(rows, 2) if not row.get("photos")]
        if wrong:
            raise ConfigError(f"{path}, line {', '.join(wrong)}: no photos; columns: {', '.join(Subject._fields)}")
        rows = [row | {"photos": str(path.parent / row["photos"])} for row in rows]
    elif (path / CLASSES_FILE).is_file():
        rows = [{"photos": str(one.folder), "class_noun": one.class_noun} for one in read_dataset(path)]
    elif path.is_dir():
        rows = [
            {"photos": str(folder)}
            for folder in sorted(path.iterdir())
            if folder.is_dir() and folder.name[0] not in "._"
        ]
    else:
        raise ConfigError(f"subjects = {config.subjects!r}: expected a folder of folders of images, or a .csv table")
    subjects = [_subject(row, config, f"{path}, {row['photos']}") for row in rows]
    names = [subject.name for subject in subjects]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"subjects = {config.subjects!r}: expected subjects of different names, found {names or 'none'}"
        )
    if config.lr_schedule != "constant" and {subject.steps for subject in subjects} != {config.steps}:
        raise ConfigError(f"lr_schedule = {config.lr_schedule!r} needs the config's steps for every subject")
    ranks = sorted({subject.lora_rank for subject in subjects})
    fills = config.method in ("lora", "dora") and config.optimizer == "adamw" and not config.lora_ranks
    if len(ranks) > 1 and not fills:
        raise ConfigError(
            f"lora_rank = {', '.join(map(str, ranks))} in one program needs method = lora or dora, optimizer = adamw "
            "and no lora_ranks: give every subject the same rank, or train once per rank"
        )
    return subjects


def _subject(row: dict[str, str], config: ConfigDict, where: str) -> Subject:
    own = {}
    for name, read in _OWN.items():
        try:
            own[name] = read(row.get(name) or config[name])
        except ValueError:
            raise ConfigError(f"{where}: {name} = {row[name]!r}, expected a number") from None
        if read is not str and own[name] <= 0:
            raise ConfigError(f"{where}: {name} = {own[name]}, expected a number above 0")
    return Subject(row.get("name") or Path(row["photos"]).name, row["photos"], **own)


class _Lanes(NamedTuple):
    """All subjects, ready to train.

    Attributes:
        jobs: rank -> job of a run of that rank; the one program is the largest rank's.
        examples: training examples of each subject.
        digest: digest of the base's weights.
        states: train states before the first step, with a leading axis of subjects.
    """

    subjects: list[Subject]
    jobs: dict[int, Job]
    examples: list[Examples]
    digest: str
    states: TrainState
    frozen: Params
    lanes: Lanes
    keys: Array

    @property
    def job(self) -> Job:
        return self.jobs[max(self.jobs)]

    def trained(self, states: TrainState, number: int) -> Params:
        """The trained parameters of one subject or their average, of its own rank."""
        own = lane(states.ema or states.trainable, number)
        return cut_to(split_shapes(self.jobs[self.subjects[number].lora_rank])[0], own)


def train_many(config: ConfigDict, guard: Preemption) -> None:
    """Trains every subject, writes each one's file when it is done, and paints each one's sheet at the end.

    Raises:
        ConfigError: see `read_subjects`; or the workdir holds a run of other subjects or other photos.
    """
    config = absolute_paths(config)
    subjects = read_subjects(config)
    workdir = epath.Path(config.workdir)
    notes = claim(workdir, config)
    many = _prepare(config, subjects)
    record = {"config": json.loads(config.to_json()), "fingerprints": _fingerprints(many)}
    manager = checkpoint.open_checkpoints(
        workdir / "checkpoints", keep_last=config.keep_last, keep_every=config.keep_every or None, record=record
    )
    with checkpoint.closing(manager):
        guard.before_leaving(functools.partial(checkpoint.wait, manager))
        done = manager.latest_step() or 0
        if runtime.is_first_process():
            print(plan_text(many.job, many.subjects, many.examples, done, notes), flush=True)
        if done:
            earlier = checkpoint.read_record(workdir / "checkpoints", done).get("fingerprints", {})
            check_same(config.workdir, earlier, record["fingerprints"])
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), many.states)
        states = checkpoint.restore(manager, like) or many.states
        prior = many.lanes.data.prior
        step = over_subjects(training_step(many.job, mapped=True), shared_prior=prior is None or prior.mean.ndim == 2)
        run = lower_calls(many.job, step, states, many.frozen, many.lanes, many.keys).compile()
        with guard.in_loop():
            states = _loop(
                many, guard, manager, states, lambda states, n: run(states, many.frozen, many.lanes, many.keys, n)
            )
    _paint_sheets(many, states)
    if runtime.is_first_process():
        print(
            f"Done: {workdir}/NAME.safetensors\nHow much the subjects mix:  python -m dreambooth_jax.evaluate "
            f"--workdir {shlex.quote(str(workdir))}",
            flush=True,
        )


def _prepare(config: ConfigDict, subjects: list[Subject]) -> _Lanes:
    mesh = make_mesh(config.mesh_data, config.mesh_fsdp)
    pipeline = open_base(config, dtype=jnp.dtype(config.dtype), remat=config.remat)
    ranks = sorted({subject.lora_rank for subject in subjects})
    jobs = {rank: make_job(ConfigDict(dict(config) | {"lora_rank": rank}), pipeline, mesh) for rank in ranks}
    job, power = jobs[ranks[-1]], 0.5 if config.lora_scaling == "stabilized" else 1.0
    examples = [examples_of(job, subject) for subject in subjects]
    params = held(job, read_params(pipeline, mesh, read_shapes(job)))
    # Every subject begins as its own run would: from the config's seed.
    own = {rank: begin(jobs[rank], params) for rank in ranks}
    shapes, (_, frozen, key) = split_shapes(job)[0], own[ranks[-1]]
    digest = weights_digest(*weights_of(pipeline))
    data = _data(job, params, digest, subjects, examples, key)
    del params
    place = subject_sharding(job, len(subjects))
    starts = [padded_to(shapes, own[subject.lora_rank][0]) for subject in subjects]
    states = jax.jit(lambda starts: stack([initial(job)(t) for t in starts]), out_shardings=place)(starts)
    stops = jnp.asarray([subject.steps for subject in subjects])
    scales = jnp.asarray([(ranks[-1] / subject.lora_rank) ** power for subject in subjects], jnp.float32)
    lanes = Lanes(data, *(jax.device_put(x, place) for x in (stops, scales)))
    return _Lanes(
        subjects, jobs, examples, digest, states, frozen, lanes, jax.device_put(jnp.stack([key] * len(subjects)), place)
    )


def _fingerprints(many: _Lanes) -> Fingerprints:
    found: Fingerprints = {"photos": {}, "captions": {}}
    for subject, examples in zip(many.subjects, many.examples, strict=True):
        for kind, digests in (("photos", of_pixels([examples])), ("captions", of_captions([examples]))):
            found[kind] |= {f"{subject.name}/{name}": digest for name, digest in digests.items()}
    return found | {"base": {"weights": many.digest}}


def plan_text(
    job: Job, subjects: Sequence[Subject], subjects_examples: Sequence[Examples], done: int, notes: Sequence[str]
) -> str:
    """The plan of a run that goes on from step `done`, and what defeats the training of a subject.

    Args:
        subjects_examples: examples of each subject.
        notes: what was found in the workdir.
    """
    config = job.config
    trained = count(job.method.shapes(job.pipeline.shapes)[0])
    lines = {
        "base": f"{config.base} ({config.resolution}x{config.resolution})",
        "method": f"{job.method.says}, {len(subjects)} x {trained / 1e6:.3g} M parameters, {config.optimizer}",
        "steps": f"{config.batch_size} images of every subject" + (f"; going on from step {done}" if done else ""),
        "mesh": f"{job.mesh.size} {jax.devices()[0].device_kind} device(s)",
        "workdir": f"{config.workdir}/NAME.safetensors",
    }
    rows = []
    for subject, examples in zip(subjects, subjects_examples, strict=True):
        rows.append(
            f"  {subject.name}: {len(set(examples.names))} images, {examples.captions[0]!r}, {subject.steps} steps, "
            f"rate {subject.learning_rate:g}, rank {subject.lora_rank}"
        )
        rows += [f"    photos: {note}" for note in examples.notes]
        rows += [f"    warning: {warning}" for warning in _warnings(job, subject, examples)]
    rows += [f"  note: {note}" for note in notes]
    return "\n".join([*(f"{name:>8}: {text}" for name, text in lines.items()), *rows])


def _warnings(job: Job, subject: Subject, examples: Examples) -> list[str]:
    own, tokenizer = subject.config(job.config), job.pipeline.tokenizer
    return [
        *check_identifier(tokenizer, subject.identifier),
        *contradictions(own, examples.captions),
        *too_long(examples.captions, subject.identifier, tokenizer),
    ]


def _loop(
    many: _Lanes,
    guard: Preemption,
    manager: ocp.CheckpointManager,
    states: TrainState,
    advance: Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]],
) -> TrainState:
    config, subjects = many.job.config, many.subjects
    stops = np.asarray([subject.steps for subject in subjects])
    done = np.asarray(states.step)
    number = int(done.max())
    for k in np.flatnonzero(done >= stops).tolist():
        _write_file(many, states, k)
    while number < stops.max():
        until = min(int(stops.max()), number - number % config.save_every + config.save_every)
        while number < until:
            steps = min(config.steps_per_call, until - number)
            states, metrics = advance(states, jnp.asarray(steps, jnp.int32))
            number += steps
            after = np.asarray(states.step)
            for k in finished(done, after, stops):
                _write_file(many, states, k)
                print(f"{subjects[k].name}: {stops[k]} steps, loss {float(metrics.loss[steps - 1, k]):.4f}", flush=True)
            done = after
            if guard.requested:
                checkpoint.save(manager, number, states)
                guard.leave()
        check_finite(states.trainable, number)
        checkpoint.save(manager, number, states)
    checkpoint.wait(manager)
    return states


def _write_file(many: _Lanes, states: TrainState, number: int) -> None:
    """Writes one subject's adapter, for all tools."""
    subject = many.subjects[number]
    job = many.jobs[subject.lora_rank]
    about = about_adapter(job.pipeline, subject.config(job.config), subject.name)
    factors = job.method.adapter(many.trained(states, number))
    if runtime.is_first_process():
        write_kohya(adapter_path(job.config, subject), factors, about, dtype="float32")


def adapter_path(config: ConfigDict, subject: Subject) -> epath.Path:
    """The file of a subject's adapter."""
    return epath.Path(config.workdir) / f"{subject.name}.safetensors"


def _paint_sheets(many: _Lanes, states: TrainState) -> None:
    """Paints the config's sample prompts for every subject, its photos above them; existing sheets are kept."""
    config = many.job.config
    paint = painter_of(config, many.job.pipeline, many.job.mesh) if config.sample_prompts else None
    for number, subject in enumerate(many.subjects):
        path = epath.Path(config.workdir) / "samples" / f"{subject.name}.png"
        if paint is None or path.exists():
            continue
        own, job = subject.config(config), many.jobs[subject.lora_rank]
        prompts = [fill(prompt, own) for prompt in config.sample_prompts]
        params = job.method.combine(many.frozen, many.trained(states, number))
        rows = paint_rows(paint, params, prompts, range(config.sample_count), negative=config.negative_prompt)
        if runtime.is_first_process():
            photos = list(many.examples[number].images[: config.sample_count])
            about = {"model": config.base, "adapter": f"{subject.name}.safetensors", "steps": str(subject.steps)}
            save_sheet(path, [photos, *rows], ["training images", *prompts], about)


def subject_sharding(job: Job, count: int) -> NamedSharding:
    """Subjects divided over the mesh's data axis, where that divides their number."""
    divided = count % job.mesh.shape["data"] == 0
    return NamedSharding(job.mesh, PartitionSpec("data")) if divided else replicated(job.mesh)


def examples_of(job: Job, subject: Subject) -> Examples:
    """The examples of one subject, as a run of it alone would train on them; errors are `read_subject`'s."""
    (examples,), _ = read_subject(job._replace(config=subject.config(job.config)))
    return examples


def _data(
    job: Job, params: Params, digest: str, subjects: list[Subject], examples: list[Examples], key: Key[Array, ""]
) -> TrainingData:
    """Encoded examples of all subjects; the class images of a noun are painted and encoded once."""
    config, pipeline, mesh = job.config, job.pipeline, job.mesh
    encode = make_encoder(pipeline, mesh, text_states=not reads_tokens(config))
    priors: dict[str, EncodedExamples | None] = {}
    for noun in dict.fromkeys(subject.class_noun for subject in subjects):
        own = ConfigDict(dict(config) | {"class_noun": noun, "workdir": str(Path(config.workdir) / "classes" / noun)})
        priors[noun] = _class_examples(own, job, params, digest, encode) if config.prior_preservation else None
    data = stacked_data(
        [encode(params, x) for x in examples],
        [priors[subject.class_noun] for subject in subjects],
        [key] * len(subjects),
        batch_size=config.batch_size,
        steps=max(subject.steps for subject in subjects),
        numbers=[numbers_of(subject.config(config)) for subject in subjects],
    )
    place = subject_sharding(job, len(subjects))
    shared = len(priors) == 1
    return data._replace(
        **{name: jax.device_put(getattr(data, name), place) for name in ("instance", "order", "numbers")},
        prior=jax.device_put(data.prior, replicated(mesh) if shared else place),
    )


def _class_examples(config: ConfigDict, job: Job, params: Params, digest: str, encode: Encoder) -> EncodedExamples:
    if missing := class_images_to_paint(config, digest):
        paint_missing(config, missing, painter_of(config, job.pipeline, job.mesh), params, digest)
    return encode(params, read_class_images(config))
