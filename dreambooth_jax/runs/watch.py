"""Scores of a run while it trains: functions of (config, step), as the sample pictures are."""

import csv
import io
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dreambooth_jax.devices import runtime
from dreambooth_jax.diffusion.loss import Losses
from dreambooth_jax.diffusion.step import TrainState
from dreambooth_jax.evaluation.dataset import check_photos, read_photos
from dreambooth_jax.evaluation.judge import Judge, embedded_judge, published_judge
from dreambooth_jax.evaluation.nouns import doubt
from dreambooth_jax.evaluation.prompts import class_only
from dreambooth_jax.evaluation.scores import copy_limit, fidelity
from dreambooth_jax.evaluation.transforms import Picture
from dreambooth_jax.files.atomic import write_atomic
from dreambooth_jax.files.hub import EMBEDDED
from dreambooth_jax.files.tables import read_table
from dreambooth_jax.models.params import Params
from dreambooth_jax.runs.best import Rows, best_step, keep
from dreambooth_jax.runs.config import ConfigError
from dreambooth_jax.runs.events import Events

SCORES = ("DINO", "CLIP-I", "CLIP-T", "copy")
LOSSES = ("held-out loss", "class loss")
FILE = "scores.csv"
_CLASS = "a {class_noun}"


class Watch(NamedTuple):
    """The scoring of a run.

    Attributes:
        config, workdir: config and workdir of the run.
        rows: step -> measure -> value, filled in as the run goes on; step 0 is the base.
        judge: judge of the sample pictures; None where no sample prompt has the identifier.
        photos: all photos of the subject.
        limit: smallest cosine in DINO of a copy and a photo.
        losses: trained parameters -> losses of held-out photos and class images; None without held-out photos.
        best: checkpoints that `keep_best` fills; None without it.
    """

    config: ConfigDict
    workdir: epath.Path
    rows: dict[int, dict[str, float]]
    judge: Judge | None
    photos: Sequence[Picture]
    limit: float
    losses: Callable[[Params], Losses] | None = None
    best: ocp.CheckpointManager | None = None


class Labels(NamedTuple):
    """Texts on a step's sheet: beside the training images, and beside each sample prompt; "" for none."""

    images: str
    prompts: list[str]


def make_watch(config: ConfigDict, mesh: Mesh, workdir: epath.Path, rows: dict[int, dict[str, float]]) -> Watch | None:
    """The watch of a run with `evaluate_every`, or None; `rows` are those of the steps before.

    Raises:
        FileNotFoundError: a model of the judge is absent.
        ValueError: see `check_photos`.
    """
    if not config.evaluate_every:
        return None
    if not scored_prompts(config):
        return Watch(config, workdir, rows, None, (), 0.0)
    check_photos(config.instance_images)
    photos = read_photos(config.instance_images)
    published = {"dino": config.judge_dino, "clip": config.judge_clip}
    judge = embedded_judge(mesh) if config.base in EMBEDDED else published_judge(mesh, **published)
    return Watch(config, workdir, rows, judge, photos, config.best_max_copy or copy_limit(judge, photos))


def scored_prompts(config: ConfigDict) -> list[int]:
    """Numbers of the sample prompts whose pictures are scored: those with the identifier."""
    return [number for number, prompt in enumerate(config.sample_prompts) if "{identifier}" in prompt]


def is_scored(step: int, config: ConfigDict) -> bool:
    """Whether a step is scored."""
    return config.evaluate_every > 0 and (step % config.evaluate_every == 0 or step == config.steps)


def is_due(config: ConfigDict, rows: Rows, step: int) -> bool:
    """Whether a step is scored and its scores are absent."""
    return is_scored(step, config) and step not in rows


def look(watch: Watch, step: int, state: TrainState, painted: Sequence[Sequence[Picture]]) -> Labels:
    """Scores a step, records it and keeps its weights if it is the best so far; returns labels for its sheet.

    Args:
        painted: pictures of every sample prompt.
    """
    config, numbers = watch.config, scored_prompts(watch.config)
    values, own = score_pictures(watch, [painted[number] for number in numbers])
    values |= score_losses(watch, state.ema or state.trainable)
    if watch.best is not None:
        limits = {"max_prompt_loss": config.best_max_prompt_loss, "max_copy": watch.limit}
        values["best"] = best_step({**watch.rows, step: values}, step, **limits) or 0
        if values["best"] == step:
            keep(watch.best, step, state)
    record(watch, step, values)
    labels = [""] * len(config.sample_prompts)
    for number, label in zip(numbers, own, strict=True):
        labels[number] = label
    return Labels(", ".join(f"{name} {values[name]:.4f}" for name in LOSSES if name in values), labels)


def look_at_base(
    watch: Watch, base: Params, trainable: Params, paint: Callable[[Params, list[str]], list[list[Picture]]]
) -> None:
    """Scores the base as step 0: its pictures of the sample prompts with the class noun alone.

    Args:
        base: parameters of the base, as `paint` takes them.
        trainable: trainable parameters before the first step.
        paint: (params, prompts) -> pictures of each.
    """
    if 0 in watch.rows:
        return
    prompts = scored_texts(watch.config)
    values, _ = score_pictures(watch, paint(base, prompts) if prompts else [])
    if watch.config.keep_best:
        values["gap"] = subject_gap(watch, paint(base, [class_only(_CLASS, watch.config.class_noun)])[0])
    record(watch, 0, values | score_losses(watch, trainable))


def subject_gap(watch: Watch, of_class: Sequence[Picture]) -> float:
    """CLIP-T by which the photos, with the class noun as their text, stay behind the base's pictures of the class; at
    least 0. A blue dog is less of a dog to CLIP than most are: as much is no loss of a model that paints it.

    Args:
        of_class: the base's pictures of the bare class.
    """
    text = watch.judge.text.of([class_only(_CLASS, watch.config.class_noun)])[0]
    ours, photos = (watch.judge.image.of(pictures) @ text for pictures in (of_class, watch.photos))
    return max(0.0, float(ours.mean() - photos.mean()))


def scored_texts(config: ConfigDict) -> list[str]:
    """The scored prompts with the class noun alone, without the identifier that CLIP does not know."""
    return [class_only(config.sample_prompts[number], config.class_noun) for number in scored_prompts(config)]


def score_pictures(watch: Watch, rows: Sequence[Sequence[Picture]]) -> tuple[dict[str, float], list[str]]:
    """(measure -> mean over prompts, a label per prompt) of the pictures of every scored prompt."""
    if watch.judge is None:
        return {}, []
    found = fidelity(watch.judge, watch.photos, rows, scored_texts(watch.config))
    means = {name: float(np.mean(found.per_prompt[name])) for name in SCORES[:-1]}
    means["copy"] = float(found.closest.similarity.max())
    labels = [
        ", ".join(f"{name} {found.per_prompt[name][row]:.3f}" for name in ("DINO", "CLIP-T"))
        for row in range(len(rows))
    ]
    return means, labels


def score_losses(watch: Watch, trained: Params) -> dict[str, float]:
    """Losses of the held-out photos and, with prior preservation, of the class images."""
    if watch.losses is None:
        return {}
    found = watch.losses(trained)
    both = {LOSSES[0]: float(found.instance), LOSSES[1]: float(found.prior)}
    return both if watch.config.prior_preservation else {LOSSES[0]: both[LOSSES[0]]}


def says_best(config: ConfigDict, rows: Rows) -> str:
    """The line on the best of the scored steps, or on its absence."""
    best = int(rows[max(rows)].get("best", 0)) if rows else 0
    if not best:
        limit = f"{config.best_max_copy:g}" if config.best_max_copy else "the copy detector's limit"
        return (
            f"Best: none. No scored step kept CLIP-T within {config.best_max_prompt_loss:g} of the base's "
            "(less the subject's own gap) and its "
            f"largest similarity to a photo below {limit}; {FILE} has the scores"
        )
    told = ", ".join(f"{name} {rows[best][name]:.3f} (base {rows[0][name]:.3f})" for name in ("DINO", "CLIP-T", "copy"))
    return f"Best: step {best}, {told}; --step best takes it"


def noun_warning(watch: Watch | None) -> str:
    """A warning if the class noun is not what CLIP sees in the photos; "" without a CLIP that knows everyday nouns.

    The CLIP beside the embedded base knows its world's pictures in their own colours alone.
    """
    if watch is None or watch.judge is None or watch.config.base in EMBEDDED:
        return ""
    return doubt(watch.config.class_noun, watch.judge.image, watch.judge.text, watch.photos)


def read_rows(workdir: epath.Path, last_step: int) -> dict[int, dict[str, float]]:
    """The rows of workdir/scores.csv up to `last_step`; blank ones are left out.

    Raises:
        ConfigError: another line is no row of scores, which the choice of the best step needs.
    """
    path, rows = workdir / FILE, {}
    if not path.exists():
        return {}
    remedy = "Restore the file, or remove it: the base and the newest step are then scored again"
    try:
        table = read_table(path.read_bytes().decode("utf-8-sig", errors="replace"), path)
    except ValueError as error:
        raise ConfigError(f"{error}. {remedy}") from error
    for number, row in table.rows.items():
        if not any(row.values()):
            continue
        try:
            step = int(row.pop("step") or "")
            rows[step] = {name: float(text) for name, text in row.items() if text}
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{path}, line {number}: no scores of a step ({error!r}). {remedy}") from error
    return {step: row for step, row in rows.items() if step <= last_step}


def record(watch: Watch, step: int, values: Mapping[str, float]) -> None:
    """Adds the values of a step, with six digits, to the watch, to workdir/scores.csv and to TensorBoard."""
    watch.rows[step] = {name: float(f"{value:.6g}") for name, value in values.items()}  # as a resumed run reads them
    if not runtime.is_first_process():
        return
    names = [name for name in (*SCORES, *LOSSES, "gap", "best") if any(name in row for row in watch.rows.values())]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["step", *names])
    for number, row in sorted(watch.rows.items()):
        lines.writerow([number, *(f"{row[name]:.6g}" if name in row else "" for name in names)])
    write_atomic(watch.workdir / FILE, text.getvalue().encode())
    name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{step}.scores"
    events = Events(watch.workdir / "tensorboard" / name)
    events.add(step, {f"scores/{measure}": value for measure, value in values.items()})
    events.flush()
