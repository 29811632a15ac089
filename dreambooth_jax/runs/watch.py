"""Scores of the sample pictures while a run trains: functions of (config, step), as the pictures are."""

import csv
import io
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dreambooth_jax.evaluation.dataset import read_photos
from dreambooth_jax.evaluation.judge import Judge, embedded_judge, published_judge
from dreambooth_jax.evaluation.prompts import class_only
from dreambooth_jax.evaluation.scores import Fidelity, fidelity
from dreambooth_jax.evaluation.transforms import Picture
from dreambooth_jax.files.atomic import write_atomic
from dreambooth_jax.files.hub import EMBEDDED
from dreambooth_jax.runs.events import Events

COLUMNS = ("step", "DINO", "CLIP-I", "CLIP-T", "copy")


class Watch(NamedTuple):
    """The judge of a run's sample pictures and the photos that they are compared with."""

    judge: Judge
    photos: Sequence[Picture]


def make_watch(config: ConfigDict, mesh: Mesh) -> Watch | None:
    """The watch of a run with `evaluate_every`, or None.

    Raises:
        FileNotFoundError: a model of the judge is not there.
        ValueError: a single photo: DINO's bound needs two.
    """
    if not config.evaluate_every:
        return None
    photos = read_photos(config.instance_images)
    if len(photos) < 2:
        raise ValueError(f"evaluate_every = {config.evaluate_every}: scores need two photos or more, got {len(photos)}")
    if config.base == EMBEDDED:
        return Watch(embedded_judge(mesh), photos)
    return Watch(published_judge(mesh, dino=config.judge_dino, clip=config.judge_clip), photos)


def is_scored(step: int, config: ConfigDict) -> bool:
    """Whether the sample pictures of a step are scored."""
    return config.evaluate_every > 0 and (step % config.evaluate_every == 0 or step == config.steps)


def score_samples(
    watch: Watch, config: ConfigDict, rows: Sequence[Sequence[Picture]]
) -> tuple[dict[str, float], list[str]]:
    """(measure -> mean over the prompts with the identifier, a label per sample prompt, "" for those without it).

    Args:
        rows: pictures of every sample prompt.
    """
    numbers = [i for i, prompt in enumerate(config.sample_prompts) if "{identifier}" in prompt]
    texts = [class_only(config.sample_prompts[i], config.class_noun) for i in numbers]
    found = fidelity(watch.judge, watch.photos, [rows[i] for i in numbers], texts)
    means = {name: float(np.mean(found.per_prompt[name])) for name in COLUMNS[1:-1]}
    means["copy"] = float(found.closest.similarity.max())
    labels = [""] * len(config.sample_prompts)
    for place, number in enumerate(numbers):
        labels[number] = _label(found, place)
    return means, labels


def _label(found: Fidelity, row: int) -> str:
    return ", ".join(f"{name} {found.per_prompt[name][row]:.3f}" for name in ("DINO", "CLIP-T"))


def record(workdir: epath.Path, step: int, means: Mapping[str, float]) -> None:
    """Adds a row to workdir/scores.csv, in the place of rows of that step and later ones, and to TensorBoard."""
    path = workdir / "scores.csv"
    lines = list(csv.reader(io.StringIO(path.read_text()))) if path.exists() else []
    rows = [row for row in lines[1:] if int(row[0]) < step]
    rows.append([str(step), *(f"{means[name]:.6g}" for name in COLUMNS[1:])])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    write_atomic(path, text.getvalue().encode())
    name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{step}.scores"
    events = Events(workdir / "tensorboard" / name, first_step=step)
    events.add(step, {f"scores/{measure}": value for measure, value in means.items()})
    events.flush()
