"""Opening a training run again: its config, its pipeline, and the weights of a checkpoint."""

import os
from typing import NamedTuple

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dreambooth_jax.adapters.method import Method
from dreambooth_jax.devices.sharding import placed_shapes
from dreambooth_jax.families.frozen_text import with_cached_text
from dreambooth_jax.families.pipeline import Pipeline, read_params
from dreambooth_jax.models.params import Params
from dreambooth_jax.runs import checkpoint
from dreambooth_jax.runs.best import folder_of
from dreambooth_jax.runs.config_file import complete, read_json
from dreambooth_jax.runs.job import make_method, open_base


def read_config(workdir: str | os.PathLike) -> ConfigDict:
    """The config that `train` wrote into its workdir.

    Fields that older versions did not have are filled in, see `config_file.complete`.

    Raises:
        FileNotFoundError: nothing was trained there.
        ConfigError: config.json is damaged.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file. Give the --workdir of a run of dreambooth_jax.train.")
    return ConfigDict(complete(read_json(path))[0])


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
