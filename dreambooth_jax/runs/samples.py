"""Sheets of sample pictures while a run trains."""

import numpy as np
from etils import epath

from dreambooth_jax.data.images import decode_image
from dreambooth_jax.devices import runtime
from dreambooth_jax.models.params import Params
from dreambooth_jax.painting.sheets import file_names, paint_rows, save_png, save_sheet
from dreambooth_jax.runs.config import fill
from dreambooth_jax.runs.loop import Sheets, is_painted
from dreambooth_jax.runs.setup import Run
from dreambooth_jax.runs.watch import Watch, is_scored, record, score_samples


def sheets_of(run: Run, frozen: Params, watch: Watch | None = None) -> Sheets:
    """The sheets of a run whose frozen parameters are `frozen`; `watch` scores their pictures."""
    combine = run.job.method.combine
    return Sheets(
        before=lambda state: paint_before(run, combine(frozen, state.trainable)),
        paint=lambda state, step: paint_samples(run, combine(frozen, state.ema or state.trainable), step, watch),
        is_missing=lambda step: sheet_is_missing(run, step),
    )


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
            save_png(_before(run, prompt, seed), image, {"model": config.base, "prompt": prompt, "seed": str(seed)})

    prompts = [fill(prompt, config) for prompt in config.sample_prompts if "{identifier}" not in prompt]
    negative = config.negative_prompt
    paint_rows(run.paint, params, prompts, range(config.sample_count), negative=negative, each=save)


def _before(run: Run, prompt: str, seed: int) -> epath.Path:
    names = file_names([fill(prompt, run.config) for prompt in run.config.sample_prompts])
    return run.workdir / "samples" / "before" / f"{names[prompt]}_{seed}.png"


def paint_samples(run: Run, params: Params, step: int, watch: Watch | None = None) -> None:
    """Paints the fixed prompts and seeds into samples/: the training images first, then a row per prompt; above a
    prompt without identifier stand the base's pictures of it. Scores stand beside the prompts."""
    config = run.config
    prompts = [fill(prompt, config) for prompt in config.sample_prompts]
    painted = paint_rows(run.paint, params, prompts, range(config.sample_count), negative=config.negative_prompt)
    means, scores = {}, [""] * len(prompts)
    if watch is not None and is_scored(step, config):
        means, scores = score_samples(watch, config, painted)
    if not prompts or not runtime.is_first_process():
        return
    if means:
        record(run.workdir, step, means)
    labels, rows = ["training images"], [list(run.examples.images[: config.sample_count])]
    for prompt, row, score in zip(prompts, painted, scores, strict=True):
        before = [_before(run, prompt, seed) for seed in range(config.sample_count)]
        if all(path.exists() for path in before):
            labels.append(f"{prompt}: before training")
            rows.append([np.asarray(decode_image(path.read_bytes())) for path in before])
        labels.append(f"{prompt}: {score}" if score else prompt)
        rows.append(row)
    about = {"model": config.base, "step": str(step), "seeds": f"0 to {config.sample_count - 1}"}
    save_sheet(sheet_path(run, step), rows, labels, about)
