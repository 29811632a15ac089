"""Runs of a cascade: one folder per stage in one workdir, each an ordinary run.

workdir/stage1 paints small pictures; every further stage trains on pairs made from the same photos, and its samples
enlarge those of the stages before it, trained where they are trained.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dreambooth_jax.data.images import Examples, decode_image
from dreambooth_jax.data.low_resolution import shrink
from dreambooth_jax.devices import runtime
from dreambooth_jax.families.frozen_text import with_cached_text
from dreambooth_jax.families.pipeline import Pipeline, load_pipeline, read_params
from dreambooth_jax.models.params import Params
from dreambooth_jax.painting.cascade import Stage, paint_stages
from dreambooth_jax.painting.painter import Painter, Request
from dreambooth_jax.painting.sheets import save_png
from dreambooth_jax.runs.checkpoint import weights_at
from dreambooth_jax.runs.config import ConfigError
from dreambooth_jax.runs.config_file import read_config, stage_folder, stage_folders
from dreambooth_jax.runs.job import painter_of, pictures_at_once
from dreambooth_jax.runs.records import steps_of
from dreambooth_jax.runs.workdir import open_run

Below = Callable[[Sequence[Request]], list[np.ndarray]]


def open_stages(configs: Sequence[ConfigDict], mesh: Mesh, *, bases: bool = False) -> list[Stage]:
    """A painter and params per stage: of its newest checkpoint, or of its base if its training was not begun, or with
    `bases`.

    Raises:
        FileNotFoundError: the training of a stage was begun, and there is no checkpoint.
    """
    stages = []
    for config in configs:
        trained = not bases and (epath.Path(config.workdir) / "config.json").exists()
        if trained:
            config, pipeline, params = open_run(config.workdir, mesh)
        else:
            pipeline = with_cached_text(load_pipeline(config.base, dtype=jnp.dtype(config.dtype)), mesh)
            params = read_params(pipeline, mesh)
        stages.append(
            Stage(
                painter_of(config, pipeline, mesh, batch_size=pictures_at_once(config, mesh), trained=trained), params
            )
        )
    return stages


def enlarging(paint: Painter, below: Below, number: int) -> Painter:
    """`paint` for requests that come without the picture of the stage before, which `below` gives.

    Args:
        number: of the stage: its noise is another than that of the stages before it.
    """

    def larger(
        params: Params, requests: Sequence[Request], all_processes: bool = True
    ) -> Iterator[tuple[int, np.ndarray]]:
        pictures = iter(below([request for request in requests if request.low is None]))
        whole = [
            request._replace(
                key=jax.random.fold_in(request.key, number - 1),
                low=next(pictures) if request.low is None else request.low,
            )
            for request in requests
        ]
        yield from paint(params, whole, all_processes)

    return larger


def from_prompts(config: ConfigDict, pipeline: Pipeline, mesh: Mesh, paint: Painter, *, bases: bool = False) -> Painter:
    """`paint` of a trained run; for a super-resolution stage, the stages before it in its cascade paint first.

    Args:
        bases: whether those are taken as they were before training.

    Raises:
        ConfigError: there is no trained stage before it.
    """
    if pipeline.low_resolution is None:
        return paint
    workdir = epath.Path(config.workdir)
    folders = [stage_folder(str(workdir.parent), number) for number in range(1, config.stage)]
    if not folders or not set(folders) <= set(stage_folders(str(workdir.parent))):
        raise ConfigError(
            f"{workdir}: {config.base} enlarges pictures of the stage before it, which was not trained beside it. "
            "Train the whole cascade, stage = 0"
        )
    before = [read_config(folder) for folder in folders]
    return enlarging(paint, painted_below(before, mesh, kept_below(config), bases=bases), config.stage)


def kept_below(config: ConfigDict) -> epath.Path:
    """The folder of the pictures that a stage's samples enlarge."""
    return epath.Path(config.workdir) / "samples" / f"stage{config.stage - 1}"


def painted_below(configs: Sequence[ConfigDict], mesh: Mesh, folder: epath.Path, *, bases: bool = False) -> Below:
    """Pictures of the stages that `configs` describe, painted once and kept in `folder`: their weights are on the
    devices only while they paint.

    Args:
        bases: whether the stages paint as they were before training.
    """

    def below(requests: Sequence[Request]) -> list[np.ndarray]:
        names = [_name(request, configs, bases) for request in requests]
        paths = {name: (folder / f"{name}.png", request) for name, request in zip(names, requests, strict=True)}
        todo = {name: request for name, (path, request) in paths.items() if not path.exists()}
        found = {n: np.asarray(decode_image(path.read_bytes())) for n, (path, _) in paths.items() if n not in todo}
        if todo:
            pictures = paint_stages(open_stages(configs, mesh, bases=bases), list(todo.values()))[-1]
            found |= dict(zip(todo, pictures, strict=True))
        runtime.wait_for_all("pictures of the stage before")
        for name, request in todo.items():
            if runtime.is_first_process():
                save_png(paths[name][0], found[name], {"prompt": request.prompt})
        return [found[name] for name in names]

    return below


def _name(request: Request, configs: Sequence[ConfigDict], bases: bool = False) -> str:
    """Of the picture of a request by stages as they are trained now, or by their bases."""
    key = np.asarray(jax.random.key_data(request.key)).tobytes()
    folders = [epath.Path(config.workdir) / "checkpoints" for config in configs if not bases]
    trained = [f"{step} {weights_at(folder, step)}" for folder in folders for step in steps_of(folder)[-1:]]
    reuse = [f"reuse_features {config.reuse_features}" for config in configs if config.reuse_features > 1]
    pieces = [request.prompt.encode(), request.negative.encode(), key, *(text.encode() for text in trained + reuse)]
    return hashlib.sha256(b"\0".join(pieces)).hexdigest()[:24]


def photos_below(examples: Examples, factor: int) -> Below:
    """The photos themselves made small, in turn: what a super-resolution stage without another before it enlarges."""

    def below(requests: Sequence[Request]) -> list[np.ndarray]:
        small = shrink(examples.images, factor)
        return [small[number % len(small)] for number in range(len(requests))]

    return below
