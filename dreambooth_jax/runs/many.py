"""Many subjects in one program: one run whose states have a leading axis of subjects (adapters.many)."""

import functools
import json
import shlex
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from dreambooth_jax.adapters.many import (
    Lanes,
    cut_to,
    finished,
    lane,
    padded_to,
    stack,
    stacked_data,
)
from dreambooth_jax.data.class_folders import class_folders
from dreambooth_jax.data.class_images import (
    agreed,
    class_images_to_paint,
    paint_missing,
    read_class_images,
)
from dreambooth_jax.data.contradictions import contradictions, too_long
from dreambooth_jax.data.encode import make_encoder
from dreambooth_jax.data.identifiers import check_identifier
from dreambooth_jax.data.images import Examples
from dreambooth_jax.data.sources import list_images
from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.sharding import make_mesh, replicated
from dreambooth_jax.diffusion.examples import EncodedExamples, TrainingData
from dreambooth_jax.diffusion.step import Metrics, TrainState
from dreambooth_jax.files.digest import weights_digest
from dreambooth_jax.files.lora_kohya import write_kohya
from dreambooth_jax.models.params import Params, Shapes, count
from dreambooth_jax.painting.painter import Painter
from dreambooth_jax.painting.sheets import paint_rows, save_sheet, text_chunks
from dreambooth_jax.runs import checkpoint
from dreambooth_jax.runs.ahead import compiling_of
from dreambooth_jax.runs.config import absolute_paths, fill
from dreambooth_jax.runs.exports import about_adapter
from dreambooth_jax.runs.fingerprints import Fingerprints, comparing, of_captions, of_pixels
from dreambooth_jax.runs.job import (
    Job,
    initial,
    make_job,
    numbers_of,
    open_base,
    painter_of,
    reads_tokens,
    split_shapes,
)
from dreambooth_jax.runs.lanes import lower_many, many_shapes, subject_sharding, subjects_a_device
from dreambooth_jax.runs.preemption import Agreement, Preemption
from dreambooth_jax.runs.report import check_finite
from dreambooth_jax.runs.setup import begin, claim, read_base, read_subject, weights_of
from dreambooth_jax.runs.subjects import Subject, adapter_path, read_subjects

ROWS = "subjects (place, identifier, noun, steps, rate, rank)"  # the fingerprint of their table


class _Many(NamedTuple):
    """All subjects after set-up.

    Attributes:
        jobs: rank -> job of a run of that rank; the one program is the largest rank's.
        examples: training examples of each subject.
        digest: digest of the base's weights.
    """

    subjects: list[Subject]
    jobs: dict[int, Job]
    examples: list[Examples]
    digest: str

    @property
    def job(self) -> Job:
        return self.jobs[max(self.jobs)]

    def trained(self, states: TrainState, number: int) -> Params:
        """The trained parameters of one subject or their average, of its own rank."""
        whole = replicated(self.job.mesh)
        own = jax.jit(lane, out_shardings=whole)(states.ema or states.trainable, np.int32(number))
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
    many = _set_up(config, subjects)
    record = {"config": json.loads(config.to_json()), "fingerprints": fingerprints(subjects, many.examples)}
    record["fingerprints"]["base"] = {"weights": many.digest}
    manager = checkpoint.open_checkpoints(
        workdir / "checkpoints", keep_last=config.keep_last, keep_every=config.keep_every or None, record=record
    )
    with checkpoint.closing(manager):
        guard.before_leaving(functools.partial(checkpoint.wait, manager))
        done = manager.latest_step() or 0
        if runtime.is_first_process():
            print(plan_text(many.job, many.subjects, many.examples, done, notes), flush=True)
        earlier = checkpoint.read_record(workdir / "checkpoints", done).get("fingerprints", {}) if done else {}
        compare = comparing(config.workdir, earlier, record)
        compare({})
        lower = lambda _, *arguments: lower_many(many.job, *arguments)  # noqa: E731
        with compiling_of(1, lambda _: _expected(many), lower) as program:
            states, frozen, lanes, keys = _prepare(many, compare)
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states)
            states = checkpoint.restore(manager, like) or states
            run = program(0, states, frozen, lanes, keys)
        with guard.in_loop():
            states = _loop(many, guard, manager, states, done, lambda states, n: run(states, frozen, lanes, keys, n))
    _paint_sheets(many, frozen, states)
    if runtime.is_first_process():
        print(
            f"Done: {workdir}/NAME.safetensors\nHow much the subjects mix:  python -m dreambooth_jax.evaluate "
            f"--workdir {shlex.quote(str(workdir))}",
            flush=True,
        )


def _set_up(config: ConfigDict, subjects: list[Subject]) -> _Many:
    mesh = make_mesh(config.mesh_data, config.mesh_fsdp)
    pipeline = open_base(config, dtype=jnp.dtype(config.dtype), remat=config.remat)
    ranks = sorted({subject.lora_rank for subject in subjects})
    jobs = {rank: make_job(ConfigDict(dict(config) | {"lora_rank": rank}), pipeline, mesh) for rank in ranks}
    examples = [examples_of(jobs[ranks[-1]], subject) for subject in subjects]
    return _Many(subjects, jobs, examples, weights_digest(*weights_of(pipeline)))


def _expected(many: _Many) -> tuple[TrainState, Shapes, Lanes, jax.ShapeDtypeStruct]:
    """Shapes of what `_prepare` will give, before class images are painted."""
    config = many.job.config
    nouns = {subject.class_noun for subject in many.subjects}
    there = max(map(functools.partial(_class_images_there, config), nouns)) if config.class_images else 0
    return many_shapes(
        many.job,
        len(many.subjects),
        max(len(examples.captions) for examples in many.examples),
        num_class=max(config.num_class_images, there),
        captions=max(len(set(examples.captions)) for examples in many.examples),
        shared_prior=len(nouns) == 1,
    )


def _class_images_there(config: ConfigDict, noun: str) -> int:
    return sum(len(list_images(folder)) for folder in class_folders(_of_noun(config, noun)))


def _of_noun(config: ConfigDict, noun: str) -> ConfigDict:
    """The config of a noun's class images."""
    own = {"class_noun": noun, "workdir": str(epath.Path(config.workdir) / "classes" / noun)}
    return ConfigDict(dict(config) | own)


def _prepare(many: _Many, compare: Callable[[Fingerprints], None]) -> tuple[TrainState, Params, Lanes, Array]:
    """The arguments of the program before the first step: (states, frozen, lanes, keys).

    Args:
        compare: compares fingerprints with those of the checkpoint, and raises.
    """
    job, subjects, config = many.job, many.subjects, many.job.config
    power = 0.5 if config.lora_scaling == "stabilized" else 1.0
    params = read_base(job, compare)
    # Every subject begins as its own run would: from the config's seed.
    own = {rank: begin(one, params) for rank, one in many.jobs.items()}
    shapes, (_, frozen, key) = split_shapes(job)[0], own[config.lora_rank]
    data = _data(many, params, key, compare)
    del params
    place = subject_sharding(job.mesh, len(subjects))
    starts = [padded_to(shapes, own[subject.lora_rank][0]) for subject in subjects]
    states = jax.jit(lambda starts: stack([initial(job)(t) for t in starts]), out_shardings=place)(starts)
    stops = np.asarray([subject.steps for subject in subjects], np.int32)
    scales = np.asarray([(config.lora_rank / subject.lora_rank) ** power for subject in subjects], np.float32)
    lanes = Lanes(data, *(jax.device_put(x, place) for x in (stops, scales)))
    keys = jax.jit(lambda key: jnp.stack([key] * len(subjects)), out_shardings=place)(key)
    return states, frozen, lanes, keys


def fingerprints(subjects: Sequence[Subject], examples: Sequence[Examples]) -> Fingerprints:
    """Photos, captions and rows of the table, whose order is that of the states."""
    last = max(subject.steps for subject in subjects)
    found: Fingerprints = {"photos": {}, "captions": {}, ROWS: {}}
    for subject, photos in zip(subjects, examples, strict=True):
        for kind, digests in (("photos", of_pixels([photos])), ("captions", of_captions([photos]))):
            found[kind] |= {f"{subject.name}/{name}": digest for name, digest in digests.items()}
        # A subject that stops before the others has missed their steps; the last ones may have more.
        stop = "last" if subject.steps == last else subject.steps
        own = (subject.identifier, subject.class_noun, stop, subject.learning_rate, subject.lora_rank)
        found[ROWS][subject.name] = "; ".join(map(str, (len(found[ROWS]), *own)))
    return found


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
    used = len(subjects) // subjects_a_device(job.mesh, len(subjects))
    if used < job.mesh.size:
        rows.append(
            f"  warning: {len(subjects)} subjects keep {used} of {job.mesh.size} devices busy; a multiple of "
            f"{job.mesh.size} keeps all"
        )
    return "\n".join([*(f"{name:>8}: {text}" for name, text in lines.items()), *rows])


def _warnings(job: Job, subject: Subject, examples: Examples) -> list[str]:
    own, tokenizer = subject.config(job.config), job.pipeline.tokenizer
    return [
        *check_identifier(tokenizer, subject.identifier),
        *contradictions(own, examples.captions),
        *too_long(examples.captions, subject.identifier, tokenizer),
    ]


def _loop(
    many: _Many,
    guard: Preemption,
    manager: ocp.CheckpointManager,
    states: TrainState,
    number: int,
    advance: Callable[[TrainState, np.int32], tuple[TrainState, Metrics]],
) -> TrainState:
    """Trains on from step `number`."""
    config, subjects = many.job.config, many.subjects
    stops = np.asarray([subject.steps for subject in subjects])
    before: Metrics | None = None
    agree = Agreement(many.job.mesh)
    for k in np.flatnonzero(stops <= number).tolist():
        _write_file(many, states, k)
    while number < stops.max():
        until = min(int(stops.max()), number - number % config.save_every + config.save_every)
        while number < until:
            steps = min(config.steps_per_call, until - number)
            states, metrics = advance(states, np.int32(steps))
            jax.block_until_ready(before)  # the host is one call ahead
            for k in finished(number, number + steps, stops):
                _write_file(many, states, k)
                loss = float(metrics.loss[stops[k] - number - 1, k])
                if runtime.is_first_process():
                    print(f"{subjects[k].name}: {stops[k]} steps, loss {loss:.4f}", flush=True)
            number, before = number + steps, metrics
            if agree(guard.requested):
                checkpoint.save(manager, number, states)
                guard.leave()
        check_finite(states.trainable, number)
        checkpoint.save(manager, number, states)
    checkpoint.wait(manager)
    return states


def _write_file(many: _Many, states: TrainState, number: int) -> None:
    """Writes one subject's adapter, for all tools.

    Raises:
        NonFiniteLoss: it is not finite.
    """
    subject = many.subjects[number]
    job = many.jobs[subject.lora_rank]
    about = about_adapter(job.pipeline, subject.config(job.config), subject.name)
    trained = many.trained(states, number)
    check_finite(trained, subject.steps)
    factors = job.method.adapter(trained)
    if runtime.is_first_process():
        write_kohya(adapter_path(job.config, subject), factors, about, dtype="float32")


def _paint_sheets(many: _Many, frozen: Params, states: TrainState) -> None:
    """Paints the config's sample prompts for every subject, its photos above them; sheets of these steps are kept."""
    config = many.job.config
    paint = painter_of(config, many.job.pipeline, many.job.mesh) if config.sample_prompts else None
    for number, subject in enumerate(many.subjects):
        path = epath.Path(config.workdir) / "samples" / f"{subject.name}.png"
        about = {"model": config.base, "adapter": f"{subject.name}.safetensors", "steps": str(subject.steps)}
        about["reuse_features"] = str(config.reuse_features)
        kept = {"reuse_features": "1"} | text_chunks(path) if path.exists() else {}  # older versions wrote none
        if paint is None or about.items() <= kept.items():
            continue
        own, job = subject.config(config), many.jobs[subject.lora_rank]
        prompts = [fill(prompt, own) for prompt in config.sample_prompts]
        params = job.method.combine(frozen, many.trained(states, number))
        rows = paint_rows(paint, params, prompts, range(config.sample_count), negative=config.negative_prompt)
        if runtime.is_first_process():
            photos = list(many.examples[number].images[: config.sample_count])
            save_sheet(path, [photos, *rows], ["training images", *prompts], about)


def examples_of(job: Job, subject: Subject) -> Examples:
    """The examples of one subject, as a run of it alone would train on them; errors are `read_subject`'s."""
    (examples,), _ = read_subject(job._replace(config=subject.config(job.config)))
    return examples


def _data(many: _Many, params: Params, key: Key[Array, ""], compare: Callable[[Fingerprints], None]) -> TrainingData:
    """Encoded examples of all subjects; the class images of a noun are painted and encoded once."""
    job, subjects = many.job, many.subjects
    config, pipeline, mesh = job.config, job.pipeline, job.mesh
    encode = make_encoder(pipeline, mesh, text_states=not reads_tokens(config))
    painter = functools.cache(lambda: painter_of(config, pipeline, mesh, reuse_features=1))
    priors: dict[str, EncodedExamples | None] = {}
    of_class: Fingerprints = {"class images": {}, "class captions": {}}
    for noun in dict.fromkeys(subject.class_noun for subject in subjects):
        priors[noun] = None
        if config.prior_preservation:
            examples = _class_images(_of_noun(config, noun), painter, params, many.digest)
            for kind, digests in zip(of_class, (of_pixels([examples]), of_captions([examples])), strict=True):
                of_class[kind] |= {f"{noun}/{name}": digest for name, digest in digests.items()}
            priors[noun] = encode(params, examples)
    compare(of_class)
    data = stacked_data(
        [encode(params, x) for x in many.examples],
        [priors[subject.class_noun] for subject in subjects],
        [key] * len(subjects),
        batch_size=config.batch_size,
        steps=max(subject.steps for subject in subjects),
        numbers=[numbers_of(subject.config(config)) for subject in subjects],
    )
    place = subject_sharding(job.mesh, len(subjects))
    prior_place = replicated(mesh) if len(priors) == 1 else place
    # What is encoded lies on all processes' devices, the rest on this one's.
    encoded = jax.jit(lambda *halves: halves, out_shardings=(place, prior_place))(data.instance, data.prior)
    drawn = jax.device_put(jax.tree.map(np.asarray, (data.order, data.numbers)), place)
    return TrainingData(*encoded, *drawn)


def _class_images(config: ConfigDict, painter: Callable[[], Painter], params: Params, digest: str) -> Examples:
    """The class images of one noun; those that are missing are painted."""
    if missing := agreed(class_images_to_paint(config, digest)):
        paint_missing(config, missing, painter(), params, digest)
    return read_class_images(config)
