"""Opening a training run again: its config, its pipeline, and the weights of a checkpoint."""

import os
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dreambooth_jax.adapters.method import Method
from dreambooth_jax.devices.sharding import placed_shapes
from dreambooth_jax.families.frozen_text import with_cached_text
from dreambooth_jax.families.pipeline import Pipeline, read_params
from dreambooth_jax.models.params import Params
from dreambooth_jax.runs import checkpoint
from dreambooth_jax.runs.best import folder_of
from dreambooth_jax.runs.config_file import read_config
from dreambooth_jax.runs.job import make_method, open_base


class Trained(NamedTuple):
    """What a run has learnt, apart from the base's weights.

    Attributes:
        trainable: the trained parameters or their average.
    """

    config: ConfigDict
    pipeline: Pipeline
    method: Method
    trainable: Params


def open_trained(
    workdir: str | os.PathLike, mesh: Mesh, step: int | str | None = None, *, dtype: str | None = None
) -> Trained:
    """Opens a run without reading the base's weights.

    Args:
        step: of the checkpoint, or "best"; default: the newest.
        dtype: of the computation; default: the run's.

    Raises:
        FileNotFoundError: no run, or no such checkpoint.
    """
    config = read_config(workdir)
    pipeline = open_base(config, dtype=jnp.dtype(dtype or config.dtype))
    config.resolution = config.resolution or pipeline.resolution
    method = make_method(config, pipeline)
    shapes, _ = method.shapes(pipeline.shapes)
    folder, step = folder_of(workdir, step)
    manager = checkpoint.open_checkpoints(folder, read_only=True)
    trained = checkpoint.restore_weights(manager, placed_shapes(mesh, shapes), average=config.ema_decay > 0, step=step)
    return Trained(config, pipeline, method, trained)


def open_run(
    workdir: str | os.PathLike, mesh: Mesh, step: int | str | None = None, *, dtype: str | None = None
) -> tuple[ConfigDict, Pipeline, Params]:
    """The personalised model of a run: parameters as `Method.combine` joins them, a LoRA's factors beside the base's
    kernels (`adapters.factors.merge` folds them in); without text encoders that are never trained, whose conditions are
    cached (`with_cached_text`). Arguments and errors are `open_trained`'s."""
    config, pipeline, method, trainable = open_trained(workdir, mesh, step, dtype=dtype)
    pipeline = with_cached_text(pipeline, mesh)
    params = read_params(pipeline, mesh)
    return config, pipeline, method.combine(params, trainable)
