"""Many subjects in one program: one run whose states have a leading axis of subjects (adapters.many)."""

import csv
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dreambooth_jax.adapters.many import Lanes, finished, lane, over_subjects, stack, stacked_data
from dreambooth_jax.data.class_images import class_images_to_paint, paint_missing, read_class_images
from dreambooth_jax.data.encode import make_encoder
from dreambooth_jax.data.images import Examples, read_examples
from dreambooth_jax.devices.sharding import make_mesh, replicated
from dreambooth_jax.diffusion.examples import EncodedExamples
from dreambooth_jax.diffusion.step import TrainState
from dreambooth_jax.families.pipeline import read_params
from dreambooth_jax.files.digest import weights_digest
from dreambooth_jax.files.lora_kohya import write_kohya
from dreambooth_jax.files.shipped import shipped
from dreambooth_jax.models.params import Params
from dreambooth_jax.painting.painter import make_painter
from dreambooth_jax.runs import checkpoint
from dreambooth_jax.runs.config import ConfigError, absolute_paths
from dreambooth_jax.runs.exports import about_adapter
from dreambooth_jax.runs.job import (
    Job,
    held_shapes,
    initial,
    lower_calls,
    make_job,
    open_base,
    reads_tokens,
    training_step,
)
from dreambooth_jax.runs.preemption import Preemption
from dreambooth_jax.runs.setup import begin, claim


class Subject(NamedTuple):
    """A row of the table of subjects: the config's fields that are its own."""

    name: str
    photos: str
    identifier: str
    class_noun: str
    steps: int


def read_subjects(config: ConfigDict) -> list[Subject]:
    """The subjects that `config.subjects` names: folders of images in a folder, or the rows of a .csv table.

    Raises:
        ConfigError: no such folder or table, no subjects in it, a name twice, or a row without photos.
    """
    path = Path(shipped(config.subjects)).expanduser()
    if path.suffix == ".csv" and path.is_file():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        wrong = [str(number) for number, row in enumerate(rows, 2) if not row.get("photos")]
        if wrong:
            raise ConfigError(f"{path}, line {', '.join(wrong)}: no photos; columns: {', '.join(Subject._fields)}")
        rows = [row | {"photos": str(path.parent / row["photos"])} for row in rows]
    elif path.is_dir():
        rows = [
            {"photos": str(folder)}
            for folder in sorted(path.iterdir())
            if folder.is_dir() and folder.name[0] not in "._"
        ]
    else:
        raise ConfigError(f"subjects = {config.subjects!r}: expected a folder of folders of images, or a .csv table")
    subjects = [_subject(row, config) for row in rows]
    names = [subject.name for subject in subjects]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"subjects = {config.subjects!r}: expected subjects of different names, found {names or 'none'}"
        )
    if config.lr_schedule != "constant" and {subject.steps for subject in subjects} != {config.steps}:
        raise ConfigError(f"lr_schedule = {config.lr_schedule!r} needs the config's steps for every subject")
    return subjects


def _subject(row: dict[str, str], config: ConfigDict) -> Subject:
    own = {name: row.get(name) or config[name] for name in ("identifier", "class_noun", "steps")}
    return Subject(row.get("name") or Path(row["photos"]).name, row["photos"], **own | {"steps": int(own["steps"])})


def train_many(config: ConfigDict, guard: Preemption) -> None:
    """Trains every subject, and writes each one's file when it is done.

    Raises:
        ConfigError: see `read_subjects`.
    """
    config = absolute_paths(config)
    subjects = read_subjects(config)
    workdir = epath.Path(config.workdir)
    claim(workdir, config)
    mesh = make_mesh(config.mesh_data, config.mesh_fsdp)
    job = make_job(config, open_base(config, dtype=jnp.dtype(config.dtype), remat=config.remat), mesh)
    examples = [_examples(job.config, subject) for subject in subjects]
    params = read_params(job.pipeline, mesh, held_shapes(job))
    trainable, frozen, key = begin(job, params)
    stops = np.asarray([subject.steps for subject in subjects])
    data = _data(job, params, subjects, examples, key, int(stops.max()))
    del params
    place = subject_sharding(job, len(subjects))
    # Every subject begins as its own run would: from the config's seed.
    states = jax.jit(lambda t: stack([initial(job)(t)] * len(subjects)), out_shardings=place)(trainable)
    keys = jax.device_put(jnp.stack([key] * len(subjects)), place)
    lanes = Lanes(data, jax.device_put(jnp.asarray(stops), place))
    record = {"config": json.loads(config.to_json())}
    manager = checkpoint.open_checkpoints(workdir / "checkpoints", keep_last=config.keep_last, record=record)
    with checkpoint.closing(manager):
        guard.before_leaving(functools.partial(checkpoint.wait, manager))
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states)
        states = checkpoint.restore(manager, like) or states
        step = over_subjects(
            training_step(job, mapped=True), shared_prior=data.prior is None or data.prior.mean.ndim == 2
        )
        run = lower_calls(job, step, states, frozen, lanes, keys).compile()
        print(f"{len(subjects)} subjects, {job.method.says}, to {workdir}/NAME.safetensors", flush=True)
        with guard.in_loop():
            _loop(job, guard, manager, subjects, stops, states, lambda states, n: run(states, frozen, lanes, keys, n))


def _loop(job: Job, guard: Preemption, manager, subjects, stops: np.ndarray, states: TrainState, advance) -> None:
    config, folder = job.config, epath.Path(job.config.workdir)
    done = np.asarray(states.step)
    number = int(done.max())
    for k in np.flatnonzero(done >= stops):
        write_file(job, subjects[k], lane(states.ema or states.trainable, k), folder)
    while number < stops.max():
        until = min(int(stops.max()), number - number % config.save_every + config.save_every)
        while number < until:
            count = min(config.steps_per_call, until - number)
            states, metrics = advance(states, jnp.asarray(count, jnp.int32))
            number += count
            after = np.asarray(states.step)
            for k in finished(done, after, stops):
                write_file(job, subjects[k], lane(states.ema or states.trainable, k), folder)
                print(f"{subjects[k].name}: {stops[k]} steps, loss {float(metrics.loss[count - 1, k]):.4f}", flush=True)
            done = after
            if guard.requested:
                checkpoint.save(manager, number, states)
                guard.leave()
        checkpoint.save(manager, number, states)
    checkpoint.wait(manager)


def write_file(job: Job, subject: Subject, trainable: Params, folder: epath.Path) -> None:
    """Writes one subject's adapter, for all tools."""
    config = ConfigDict(dict(job.config) | {"identifier": subject.identifier, "class_noun": subject.class_noun})
    about = about_adapter(job.pipeline, config, subject.name)
    write_kohya(folder / f"{subject.name}.safetensors", job.method.adapter(trainable), about, dtype="float32")


def subject_sharding(job: Job, count: int) -> NamedSharding:
    """Subjects divided over the mesh's data axis, where that divides their number."""
    divided = count % job.mesh.shape["data"] == 0
    return NamedSharding(job.mesh, PartitionSpec("data")) if divided else replicated(job.mesh)


def _examples(config: ConfigDict, subject: Subject) -> Examples:
    return read_examples(
        subject.photos, config.resolution, template=config.instance_prompt, identifier=subject.identifier,
        class_noun=subject.class_noun, captions=config.captions, crop=config.crop, flip=config.flip, views=config.views,
        seed=config.seed,
    )  # fmt: skip


def _data(job: Job, params: Params, subjects: list[Subject], examples: list[Examples], key: Any, steps: int):
    """Encoded examples of all subjects; the class images of a noun are painted and encoded once."""
    config, pipeline, mesh = job.config, job.pipeline, job.mesh
    encode = make_encoder(pipeline, mesh, text_states=not reads_tokens(config))
    priors: dict[str, EncodedExamples | None] = {}
    for noun in dict.fromkeys(subject.class_noun for subject in subjects):
        own = ConfigDict(dict(config) | {"class_noun": noun, "workdir": str(Path(config.workdir) / "classes" / noun)})
        priors[noun] = _class_examples(own, job, params, encode) if config.prior_preservation else None
    data = stacked_data(
        [encode(params, x) for x in examples], [priors[subject.class_noun] for subject in subjects],
        [key] * len(subjects), batch_size=config.batch_size, steps=steps,
    )  # fmt: skip
    place = subject_sharding(job, len(subjects))
    shared = len(priors) == 1
    return data._replace(
        instance=jax.device_put(data.instance, place), order=jax.device_put(data.order, place),
        prior=jax.device_put(data.prior, replicated(mesh) if shared else place),
    )  # fmt: skip


def _class_examples(config: ConfigDict, job: Job, params: Params, encode) -> EncodedExamples:
    pipeline = job.pipeline
    digest = weights_digest(pipeline.single_file or pipeline.folder, {name.split(".")[0] for name in pipeline.shapes})
    if missing := class_images_to_paint(config, digest):
        painter = make_painter(
            pipeline, job.mesh, resolution=config.resolution, batch_size=config.class_batch_size,
            sampler=config.sampler, steps=config.sampling_steps, guidance=config.guidance_scale,
        )  # fmt: skip
        paint_missing(config, missing, painter, params, digest)
    return encode(params, read_class_images(config))
