"""From a config to a run that is ready to train: checks, data, the state to begin with."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from dreambooth_jax.data.class_images import agreed, class_images_to_paint, paint_missing, read_class_images
from dreambooth_jax.data.encode import make_encoder
from dreambooth_jax.data.images import Examples, read_examples
from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.sharding import make_mesh, replicated
from dreambooth_jax.diffusion.examples import TrainingData
from dreambooth_jax.diffusion.step import TrainState
from dreambooth_jax.families.pipeline import Pipeline, load_pipeline
from dreambooth_jax.files.atomic import write_atomic
from dreambooth_jax.files.digest import weights_digest
from dreambooth_jax.models.params import Params
from dreambooth_jax.painting.painter import Painter, make_painter
from dreambooth_jax.runs import checkpoint
from dreambooth_jax.runs.config import ConfigError, check_config, check_resumable
from dreambooth_jax.runs.job import Job, fresh_state, make_job, state_shapes


class Run(NamedTuple):
    """A training run after set-up: what is fixed while the state changes.

    Attributes:
        paint: the base's painter.
        examples: of the subject.
        digest: of the base's weights.
        to_paint: number of class images that are missing.
    """

    job: Job
    workdir: epath.Path
    paint: Painter
    examples: Examples
    digest: str
    to_paint: int

    @property
    def config(self) -> ConfigDict:
        return self.job.config

    @property
    def pipeline(self) -> Pipeline:
        return self.job.pipeline

    @property
    def mesh(self) -> Mesh:
        return self.job.mesh


def set_up(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Run:
    """Makes everything cheap, and every check, before weights are read or anything is compiled.

    Args:
        devices: of the mesh; default: all.

    Raises:
        ValueError, OSError: something that the config names cannot be used; says what, and the remedy.
    """
    check_config(config)
    workdir = epath.Path(config.workdir)
    claim(workdir, config)
    mesh = make_mesh(config.mesh_data, config.mesh_fsdp, devices)
    pipeline = load_pipeline(config.base, dtype=jnp.dtype(config.dtype), remat=config.remat)
    job = make_job(config, pipeline, mesh)
    config = job.config
    paint = make_painter(
        pipeline, mesh, resolution=config.resolution, batch_size=config.class_batch_size,
        sampler=config.sampler, steps=config.sampling_steps, guidance=config.guidance_scale,
    )  # fmt: skip
    examples = read_examples(
        config.instance_images, config.resolution, template=config.instance_prompt, identifier=config.identifier,
        class_noun=config.class_noun, captions=config.captions, crop=config.crop, flip=config.flip,
        views=config.views, seed=config.seed,
    )  # fmt: skip
    digest = weights_digest(pipeline.folder, {name.split(".")[0] for name in pipeline.shapes})
    to_paint = class_images_to_paint(config, digest) if config.prior_preservation else []
    return Run(job, workdir, paint, examples, digest, len(to_paint))


def claim(workdir: epath.Path, config: ConfigDict) -> None:
    """Makes the workdir and writes the config into it.

    Raises:
        ConfigError: the workdir cannot be written, or holds a run trained with another config.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        earlier = workdir / "config.json"
        if earlier.exists() and any((workdir / "checkpoints").glob("[0-9]*")):
            check_resumable(config, json.loads(earlier.read_text()))
        if runtime.is_first_process():
            write_atomic(earlier, (json.dumps(json.loads(config.to_json()), indent=2) + "\n").encode())
    except OSError as error:
        raise ConfigError(
            f"workdir = {config.workdir!r} cannot be written ({error}); give another --config.workdir"
        ) from error


def prepare_data(run: Run, params: Params) -> TrainingData:
    """Paints what class images are missing, then encodes all examples."""
    config = run.config
    encode = make_encoder(run.pipeline, run.mesh, text_states=not config.train_text_encoder)
    if not config.prior_preservation:
        return TrainingData(encode(params, run.examples), None)
    if numbers := agreed(class_images_to_paint(config, run.digest)):
        paint_missing(config, numbers, run.paint, params, run.digest)
    return TrainingData(encode(params, run.examples), encode(params, read_class_images(config)))


def begin(job: Job, params: Params) -> tuple[Params, Params, Key[Array, ""]]:
    """(trainable, frozen, key) before the first step; `params` are the base's."""
    seed = job.config.seed
    key = jax.jit(lambda: jax.random.key(seed), out_shardings=replicated(job.mesh))()
    return *job.method.start(params, key), key


def start_state(job: Job, trainable: Params, manager: ocp.CheckpointManager) -> TrainState:
    """The state to begin with, on the mesh: from the newest checkpoint, or fresh."""
    return checkpoint.restore(manager, state_shapes(job, trainable)) or fresh_state(job, trainable)
