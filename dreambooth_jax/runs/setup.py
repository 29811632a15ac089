"""From a config to a run that is ready to train: checks, data, the state to begin with."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from dreambooth_jax.adapters.inversion import TEMPLATES, is_row
from dreambooth_jax.data.buckets import Size
from dreambooth_jax.data.class_folders import class_folders
from dreambooth_jax.data.class_images import (
    agreed,
    class_images_to_paint,
    paint_missing,
    read_class_images,
)
from dreambooth_jax.data.encode import make_encoder
from dreambooth_jax.data.images import Examples, decode_image, read_buckets
from dreambooth_jax.data.latents import Latents
from dreambooth_jax.data.low_resolution import cut
from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.sharding import make_mesh, replicated
from dreambooth_jax.diffusion.examples import EncodedExamples, TrainingData
from dreambooth_jax.diffusion.step import TrainState
from dreambooth_jax.families.family import CODEC
from dreambooth_jax.families.frozen_text import with_cached_text
from dreambooth_jax.families.pipeline import Pipeline, read_params
from dreambooth_jax.files.atomic import is_remote, remove_partial, write_atomic
from dreambooth_jax.files.digest import parts_digests, weights_digest
from dreambooth_jax.files.embeddings import read_embeddings
from dreambooth_jax.files.lora_read import read_adapter
from dreambooth_jax.models.params import Params, Shapes
from dreambooth_jax.painting.painter import Painter
from dreambooth_jax.runs import checkpoint
from dreambooth_jax.runs.cascade import enlarging, kept_below, painted_below, photos_below
from dreambooth_jax.runs.command import BEST
from dreambooth_jax.runs.config import ConfigError, absolute_paths, check_config, check_resumable, fill
from dreambooth_jax.runs.config_file import DOG, complete, load, read_config, stage_folder
from dreambooth_jax.runs.fingerprints import Fingerprints
from dreambooth_jax.runs.held_out import divide
from dreambooth_jax.runs.job import (
    Job,
    fresh_state,
    held,
    make_job,
    open_base,
    painter_of,
    pairs_prior,
    possible_sizes,
    read_shapes,
    reads_tokens,
    state_shapes,
    training_size,
)
from dreambooth_jax.runs.records import earlier_config


class Run(NamedTuple):
    """A training run after set-up, apart from its state.

    Attributes:
        paint: painter of samples.
        paint_class: painter of class images, the same one unless samples reuse features.
        examples: the subject's examples by shape: one square, or with `buckets` the shapes of all photos.
        held_out: photos held out of training, by shape; empty if there are none.
        digest: digest of the base's weights.
        to_paint: number of missing class images.
        given: the config as JSON values, before the base's values fill its open fields.
        notes: lines for the plan about the workdir.
    """

    job: Job
    workdir: epath.Path
    paint: Painter
    paint_class: Painter
    examples: tuple[Examples, ...]
    held_out: tuple[Examples, ...]
    digest: str
    to_paint: int
    given: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> ConfigDict:
        return self.job.config

    @property
    def pipeline(self) -> Pipeline:
        return self.job.pipeline

    @property
    def mesh(self) -> Mesh:
        return self.job.mesh


def set_up(config: ConfigDict, devices: Sequence[jax.Device] | None = None, before: Sequence[ConfigDict] = ()) -> Run:
    """Does all checks and all cheap work, before weights are read and programs compiled.

    Args:
        devices: devices of the mesh; default: all.
        before: configs of the stages before this one, in a cascade.

    Raises:
        ValueError, OSError: a part of the config cannot be used; names it and the remedy.
    """
    check_config(config)
    config = absolute_paths(config)
    given = json.loads(config.to_json())
    workdir = epath.Path(config.workdir)
    notes = claim(workdir, config)
    mesh = make_mesh(config.mesh_data, config.mesh_fsdp, devices)
    pipeline = open_base(config, dtype=jnp.dtype(config.dtype), remat=config.remat)
    pipeline = with_cached_text(pipeline, mesh, _prompts(config))
    job = make_job(config, pipeline, mesh)
    config = job.config
    parameters_to_continue(job)  # an error now, not after the weights are read
    painters = {n: painter_of(config, pipeline, mesh, reuse_features=n) for n in (1, config.reuse_features)}
    examples, held_out = read_subject(job)
    if low := pipeline.low_resolution:
        below = painted_below(before, mesh, kept_below(config)) if before else photos_below(examples[0], low.factor)
        painters = {n: enlarging(paint, below, max(2, config.stage)) for n, paint in painters.items()}
    elif before or config.sr_crop or (not config.stages and config.sr_noise != load(str(DOG)).sr_noise):
        raise ConfigError(
            f"base = {config.base!r}, sr_crop = {config.sr_crop}, sr_noise = {config.sr_noise!r}: "
            f"{pipeline.family.name} enlarges nothing"
        )
    digest = weights_digest(*weights_of(pipeline))
    paints = config.prior_preservation and not pairs_prior(config)
    to_paint = class_images_to_paint(config, digest) if paints else []
    paint, paint_class = painters[config.reuse_features], painters[1]
    return Run(job, workdir, paint, paint_class, examples, held_out, digest, len(to_paint), given, tuple(notes))


def read_subject(job: Job) -> tuple[tuple[Examples, ...], tuple[Examples, ...]]:
    """(the subject's training examples, held-out photos), both by shape.

    Raises:
        ValueError, OSError: see `possible_sizes`, `read_buckets` and `divide`.
    """
    config, sizes = job.config, possible_sizes(job)
    buckets = read_buckets(
        config.instance_images,
        sizes,
        template=config.instance_prompt,
        identifier=config.identifier,
        class_noun=config.class_noun,
        captions=config.captions,
        crop=config.crop,
        flip=config.flip,
        views=config.views,
        seed=config.seed,
        masked=config.masked_loss,
    )
    training, held_out = (tuple(with_templates(x, config) for x in half) for half in divide(buckets, config, sizes))
    captions = [caption for part in training for caption in part.captions]
    if config.shuffle_tags and all(caption.count(",") < 2 for caption in captions):
        raise ConfigError(
            f"shuffle_tags = {config.shuffle_tags} has no effect: no caption has three tags, separated by commas, of "
            f"which the first one stays; the first caption is {captions[0]!r}"
        )
    return training, held_out


def _prompts(config: ConfigDict) -> list[str]:
    """Texts that every run of this config encodes."""
    templates = (config.instance_prompt, config.class_prompt, config.negative_prompt, "", *config.sample_prompts)
    return [fill(template, config) for template in templates]


def _cut(examples: Examples, config: ConfigDict) -> Examples:
    """The crops that a super-resolution stage trains on, or the whole pictures."""
    return cut(examples, config.sr_crop, config.seed) if config.sr_crop else examples


def with_templates(examples: Examples, config: ConfigDict) -> Examples:
    """Every example once with each of the config's templates as its caption; unchanged without templates."""
    if not config.templates:
        return examples
    subject = config.identifier if config.method == "inversion" else f"{config.identifier} {config.class_noun}"
    captions = [template.format(subject) for template in TEMPLATES[config.templates]]
    count = len(examples.captions)
    by_row = {
        name: np.concatenate([value] * len(captions))
        for name, value in zip(examples._fields, examples, strict=True)
        if isinstance(value, np.ndarray) and len(value) == count
    }
    everyone = tuple(caption for caption in captions for _ in range(count))
    return examples._replace(**by_row, captions=everyone, names=examples.names * len(captions))


def _best_of_another_run(workdir: epath.Path) -> list[str]:
    """Sets best/ aside where no checkpoint is left beside it: the run begins anew, and it is not its own."""
    if not (workdir / BEST).exists() or checkpoint.steps_of(workdir / "checkpoints") or is_remote(workdir):
        return []
    place = checkpoint.set_aside(Path(workdir / BEST), Path(workdir)) if runtime.is_first_process() else workdir / BEST
    return [f"{workdir / BEST} is of a run whose checkpoints are gone: it is set aside as {place}; the run begins anew"]


def claim(workdir: epath.Path, config: ConfigDict) -> list[str]:
    """Makes the workdir, removes half-written files of a killed run, sets damaged checkpoints aside, writes the config.

    Returns:
        Lines for the person: damaged checkpoints, half-written files, settings that older versions did not have.

    Raises:
        ConfigError: the workdir cannot be written, or holds a run trained with another config.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        removed = []
        if runtime.is_first_process():
            for folder in (".", "class_images", "samples", "samples/before"):
                removed += remove_partial(workdir / folder)
        notes = checkpoint.set_aside_damaged(workdir / "checkpoints")
        checkpoint.finish_deletions(
            workdir / "checkpoints", keep_last=config.keep_last, keep_every=config.keep_every or None
        )
        notes += _best_of_another_run(workdir)
        if removed:
            notes.append(f"removed, half written by a process that was killed: {', '.join(removed)}")
        if steps := checkpoint.steps_of(workdir / "checkpoints"):
            earlier, added = complete(earlier_config(workdir, steps[-1]))
            check_resumable(config, earlier)
            if added:
                notes.append(
                    f"step {steps[-1]} was saved by an older version, without {', '.join(added)}: the values of "
                    "configs/dog.py, with which nothing changes, stand for them"
                )
        if runtime.is_first_process():
            text = json.dumps(json.loads(config.to_json()), indent=2) + "\n"
            write_atomic(workdir / "config.json", text.encode())
    except OSError as error:
        raise ConfigError(
            f"workdir = {config.workdir!r} cannot be written ({error}); give another --config.workdir"
        ) from error
    return notes


def read_base(job: Job, compare: Callable[[Fingerprints], None], read: Callable[..., Params] = read_params) -> Params:
    """The base's parameters as the devices hold them. The files are read once, and digested meanwhile.

    Args:
        compare: given the digests of all bytes of every part; raises where another base was used before.
        read: (pipeline, mesh, shapes) -> params.
    """
    with ThreadPoolExecutor(1) as beside:
        digests = beside.submit(parts_digests, *weights_of(job.pipeline))
        params = held(job, read(job.pipeline, job.mesh, read_shapes(job)))
        compare({"weights": digests.result()})
    return params


def prepare_data(
    run: Run, params: Params, inspect: Callable[[Sequence[Examples]], None] = lambda class_images: None
) -> tuple[TrainingData, ...]:
    """Paints missing class images, then encodes all examples: per shape of `run.examples`, with the class images
    cropped to that shape.

    Args:
        inspect: called with the class images, by shape, before anything is encoded.
    """
    config = run.config
    encode = make_encoder(
        run.pipeline,
        run.mesh,
        text_states=not reads_tokens(config),
        orders=config.shuffle_tags,
        with_empty=config.caption_dropout > 0,
        seed=config.seed,
    )
    instance = [encode(params, _cut(examples, config)) for examples in run.examples]
    if not config.prior_preservation:
        return tuple(TrainingData(half, None) for half in instance)
    if pairs_prior(config):
        prompt = fill(config.class_prompt, config)
        of_class = [examples._replace(captions=(prompt,) * len(examples.captions)) for examples in run.examples]
    else:
        if numbers := agreed(class_images_to_paint(config, run.digest)):
            paint_missing(config, numbers, run.paint_class, params, run.digest, _class_images_before(run))
        of_class = [read_class_images(config, size) for size in sizes_of(run)]
        inspect(of_class)
    kept = None if pairs_prior(config) else class_latents(run)
    prior = [encode(params, _cut(examples, config), kept) for examples in of_class]
    return tuple(TrainingData(*halves) for halves in zip(instance, prior, strict=True))


def class_examples(run: Run, params: Params, size: Size) -> EncodedExamples:
    """The class images, which are there, cropped to a shape and encoded: (height, width) in pixels."""
    encode = make_encoder(run.pipeline, run.mesh, text_states=not reads_tokens(run.config))
    return encode(params, read_class_images(run.config, size), class_latents(run))


def class_latents(run: Run) -> Latents | None:
    """Where a run keeps its encoded class images: beside the pictures, or in the workdir where that folder is not its
    to write. None for a base that paints pixels, which has nothing to encode."""
    codec = run.pipeline.family.names(CODEC)
    if not codec:
        return None
    dtypes = ", ".join(str(jnp.dtype(run.pipeline.dtypes[name])) for name in codec)
    folders = (class_folders(run.config)[-1], run.workdir / "latents")
    return Latents(folders, {"base": run.digest, "dtype": dtypes})


def weights_of(pipeline: Pipeline) -> tuple[Path, list[str]]:
    """The folder or file of a base's weights and the names of its parts, for digests."""
    return pipeline.single_file or pipeline.folder, sorted({name.partition(".")[0] for name in pipeline.shapes})


def sizes_of(run: Run) -> list[Size]:
    """Height and width in pixels of every shape of the run's examples."""
    return [examples.images.shape[1:3] for examples in run.examples]


def training_sizes(run: Run) -> list[Size]:
    """Height and width in pixels of what the program of every shape trains on: see `training_size`."""
    return sizes_of(run) if run.config.buckets else [training_size(run.config)]


def _class_images_before(run: Run) -> Callable[[int], np.ndarray | None]:
    """Builds number -> class image of the stage before, which a super-resolution stage enlarges.

    Raises:
        ConfigError: in the call, if the stage before has no such class image.
    """
    if run.pipeline.low_resolution is None:
        return lambda number: None
    stage = run.config.stage
    before = epath.Path(stage_folder(str(run.workdir.parent), stage - 1))
    shared = (before / "config.json").exists()  # they may lie in a folder that it names
    folder = class_folders(read_config(before))[-1] if shared else before / "class_images"

    def low(number: int) -> np.ndarray:
        path = folder / f"class_{number:05d}.png"
        if stage < 2 or not path.exists():
            raise ConfigError(
                f"{path}: no such class image to enlarge. Train the stage before with prior preservation and as many "
                "class images, give --config.class_images of this stage's size, or --config.prior_preservation=False"
            )
        return np.asarray(decode_image(path.read_bytes()))

    return low


def begin(job: Job, params: Params) -> tuple[Params, Params, Key[Array, ""]]:
    """(trainable, frozen, key) before the first step; `params` are the base's."""
    seed = job.config.seed
    key = jax.jit(lambda: jax.random.key(seed), out_shardings=replicated(job.mesh))()
    trainable, frozen = job.method.start(params, key)
    return continued(job, trainable), frozen, key


def parameters_to_continue(job: Job) -> dict[str, np.ndarray]:
    """The factors of the config's `init_adapter` file and the rows of its `init_embedding` file, where it names them.

    Raises:
        ConfigError: the method trains no factors or no tokens, or a file has other modules, ranks or numbers of rows.
    """
    wanted, _ = job.method.shapes(job.pipeline.shapes)
    found: dict[str, np.ndarray] = {}
    if job.config.init_adapter:
        found |= _stored_factors(job, {name: x for name, x in wanted.items() if not is_row(name)})
    if job.config.init_embedding:
        found |= _stored_rows(job, {name: x for name, x in wanted.items() if is_row(name)})
    return found


def _stored_rows(job: Job, wanted: Shapes) -> dict[str, np.ndarray]:
    file = job.config.init_embedding
    if not wanted:
        raise ConfigError(f"init_embedding = {file!r}: method = {job.config.method!r} trains no token")
    rows = dict(zip(wanted, read_embeddings(file, [x.shape[1] for x in wanted.values()]), strict=True))
    if wrong := {len(x) for x in rows.values()} - {job.config.token_vectors}:
        raise ConfigError(
            f"init_embedding = {file!r} has {wrong.pop()} vectors; give --config.token_vectors that number"
        )
    return rows


def _stored_factors(job: Job, wanted: Shapes) -> dict[str, np.ndarray]:
    file = job.config.init_adapter
    if job.method.adapter is None or not wanted:
        raise ConfigError(f"init_adapter = {file!r}: method = {job.config.method!r} trains no adapter")
    stored, _ = read_adapter(file, job.pipeline.shapes)
    sizes = {n: (stored[n].shape, wanted[n].shape) for n in sorted(wanted.keys() & stored.keys())}
    wrong = sorted(wanted.keys() ^ stored.keys())
    wrong += [f"{n} {found}, here {own}" for n, (found, own) in sizes.items() if found != own]
    if wrong:
        raise ConfigError(
            f"init_adapter = {file!r} does not fit lora_targets and lora_rank: {len(wrong)} factors differ: "
            f"{'; '.join(wrong[:3])}"
        )
    return stored


def continued(job: Job, trainable: Params) -> Params:
    """`trainable` with the values of the files that the config goes on from; errors are `parameters_to_continue`'s."""
    stored = parameters_to_continue(job)
    if not stored:
        return trainable
    ones = jax.tree.map(jnp.ones_like, trainable)
    scales = ones if job.method.adapter is None else job.method.adapter(ones)
    return trainable | {n: jax.device_put(x / scales[n], trainable[n].sharding) for n, x in stored.items()}


def start_state(job: Job, trainable: Params, manager: ocp.CheckpointManager) -> TrainState:
    """The state to begin with, on the mesh: from the newest checkpoint, or fresh."""
    return checkpoint.restore(manager, state_shapes(job, trainable)) or fresh_state(job, trainable)
