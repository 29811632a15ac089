"""Sheets of sample pictures while a run trains."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from dreambooth_jax.data.images import decode_image
from dreambooth_jax.devices import runtime
from dreambooth_jax.diffusion.step import TrainState
from dreambooth_jax.evaluation.transforms import Picture
from dreambooth_jax.models.params import Params
from dreambooth_jax.painting.sheets import file_names, framed, paint_rows, save_png, save_sheet
from dreambooth_jax.runs.best import is_over
from dreambooth_jax.runs.config import fill
from dreambooth_jax.runs.loop import Sheets, is_painted
from dreambooth_jax.runs.setup import Run
from dreambooth_jax.runs.watch import Labels, Watch, is_due, is_scored, look


def sheets_of(run: Run, frozen: Params, watch: Watch | None = None) -> Sheets:
    """The sheets of a run whose frozen parameters are `frozen`; `watch` scores their pictures."""
    combine = run.job.method.combine

    def paint(state: TrainState, step: int) -> None:
        scored = watch is not None and is_scored(step, run.config)
        scores = functools.partial(look, watch, step, state) if scored else None
        paint_samples(run, combine(frozen, state.ema or state.trainable), step, scores)

    def is_missing_score(step: int) -> bool:
        return watch is not None and step > 0 and is_due(run.config, watch.rows, step)

    return Sheets(
        before=lambda state: paint_before(run, combine(frozen, state.trainable)),
        paint=paint,
        is_missing=lambda step: sheet_is_missing(run, step) or is_missing_score(step),
        ends=lambda step: watch is not None and is_over(run.config, watch.rows, step),
    )


def paint_prompts(run: Run, params: Params, prompts: Sequence[str]) -> list[list[Picture]]:
    """Pictures of prompts with the seeds of the sample pictures, a row per prompt."""
    negative = run.config.negative_prompt
    return paint_rows(run.paint, params, prompts, range(run.config.sample_count), negative=negative)


def sheet_path(run: Run, step: int) -> epath.Path:
    """The PNG file of the sheet of a step."""
    return run.workdir / "samples" / f"step_{step:06d}.png"


def sheet_is_missing(run: Run, step: int) -> bool:
    """Whether a sheet is due after `step` steps and is not there."""
    config = run.config
    return step > 0 and is_painted(step, config) and bool(config.sample_prompts) and not sheet_path(run, step).exists()


def paint_before(run: Run, params: Params) -> None:
    """Paints what the base makes of the prompts without identifier, for every later sheet to show beside."""
    config = run.config

    def save(prompt: str, seed: int, image: np.ndarray) -> None:
        if runtime.is_first_process():
            about = {"model": config.base, "prompt": prompt, "seed": str(seed)}
            save_png(_before(run, prompt, seed), image, about | {"reuse_features": str(config.reuse_features)})

    prompts = [fill(prompt, config) for prompt in config.sample_prompts if "{identifier}" not in prompt]
    negative = config.negative_prompt
    paint_rows(run.paint, params, prompts, range(config.sample_count), negative=negative, each=save)


def _before(run: Run, prompt: str, seed: int) -> epath.Path:
    names = file_names([fill(prompt, run.config) for prompt in run.config.sample_prompts])
    return run.workdir / "samples" / "before" / f"{names[prompt]}_{seed}.png"


def paint_samples(
    run: Run, params: Params, step: int, scores: Callable[[Sequence[Sequence[Picture]]], Labels] | None = None
) -> None:
    """Paints the fixed prompts and seeds into samples/: the training images first, then a row per prompt; above a
    prompt without identifier stand the base's pictures of it.

    Args:
        scores: pictures of every prompt -> what the sheet says of them.
    """
    config = run.config
    prompts = [fill(prompt, config) for prompt in config.sample_prompts]
    painted = paint_prompts(run, params, prompts)
    said = scores(painted) if scores else Labels("", [""] * len(prompts))
    if not prompts or not runtime.is_first_process():
        return
    labels = [f"training images; {said.images}" if said.images else "training images"]
    photos = [image for part in run.examples for image in part.images[: config.sample_count]][: config.sample_count]
    rows = [[framed(photo, config.resolution) for photo in photos]]
    for prompt, row, score in zip(prompts, painted, said.prompts, strict=True):
        before = [_before(run, prompt, seed) for seed in range(config.sample_count)]
        if all(path.exists() for path in before):
            labels.append(f"{prompt}: before training")
            rows.append([np.asarray(decode_image(path.read_bytes())) for path in before])
        labels.append(f"{prompt}: {score}" if score else prompt)
        rows.append(row)
    about = {"model": config.base, "step": str(step), "seeds": f"0 to {config.sample_count - 1}"}
    about["reuse_features"] = str(config.reuse_features)
    save_sheet(sheet_path(run, step), rows, labels, about)
