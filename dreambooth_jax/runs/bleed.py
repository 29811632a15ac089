"""How much subjects that were trained together mix: pictures of each one, compared with everybody's photos."""

import json
from typing import NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Float

from dreambooth_jax.devices import runtime
from dreambooth_jax.evaluation import metrics
from dreambooth_jax.evaluation.dataset import read_photos
from dreambooth_jax.evaluation.judge import Judge
from dreambooth_jax.evaluation.prompts import filled
from dreambooth_jax.evaluation.transforms import Picture
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.files.atomic import write_atomic
from dreambooth_jax.files.lora_read import read_adapters, with_adapters
from dreambooth_jax.painting.painter import batch_for
from dreambooth_jax.painting.sheets import paint_rows, save_sheet
from dreambooth_jax.runs.config_file import read_config
from dreambooth_jax.runs.job import painter_of
from dreambooth_jax.runs.scoring import says_reuse
from dreambooth_jax.runs.subjects import adapter_path, read_subjects

PROMPT = "a {identifier} {class_noun}"


class Bleed(NamedTuple):
    """Attributes:
    names: of the subjects.
    cosines: mean cosine of the pictures with adapter i and the photos of subject j.
    pictures: with each adapter.
    protocol: of the cosines.
    """

    names: list[str]
    cosines: Float[np.ndarray, "n n"]
    pictures: list[list[Picture]]
    protocol: str


def measure_bleed(workdir: str, judge: Judge, mesh: Mesh, count: int) -> Bleed:
    """Paints `count` pictures of every subject of a run of many, and compares them with the photos of all.

    Raises:
        FileNotFoundError: no such run, or a subject without a file.
    """
    config = read_config(workdir)
    config.workdir = workdir
    subjects = read_subjects(config)
    absent = [subject.name for subject in subjects if not adapter_path(config, subject).exists()]
    if absent:
        raise FileNotFoundError(
            f"{workdir}: no file of {', '.join(absent)} yet; the command that trains them goes on where it stopped"
        )
    pipeline = load_pipeline(config.base)
    params = read_params(pipeline, mesh)
    paint = painter_of(config, pipeline, mesh, batch_size=batch_for([count], config.class_batch_size, mesh.size))
    pictures = []
    for subject in subjects:
        own = with_adapters(params, read_adapters([str(adapter_path(config, subject))], pipeline.shapes))
        prompt = filled(PROMPT, subject.identifier, subject.class_noun)
        pictures += paint_rows(paint, own, [prompt], range(count), negative=config.negative_prompt)
    ours = [judge.subject.of(row) for row in pictures]
    theirs = [judge.subject.of(read_photos(subject.photos)) for subject in subjects]
    cosines = np.asarray([[float(metrics.similarity(mine, photos)) for photos in theirs] for mine in ours])
    protocol = f"{judge.subject.says}; mean cosine of all pairs, {count} pictures of {PROMPT!r}{says_reuse(config)}"
    return Bleed([subject.name for subject in subjects], cosines, pictures, protocol)


def markdown(bleed: Bleed) -> str:
    """The matrix as a table: a row per adapter, a column per subject's photos, and what a person reads in it."""
    lines = [f"| pictures of | {' | '.join(bleed.names)} |", "|---|" + "---|" * len(bleed.names)]
    lines += [
        f"| {name} | {' | '.join(f'{cosine:.3f}' for cosine in row)} |"
        for name, row in zip(bleed.names, bleed.cosines, strict=True)
    ]
    right = int((bleed.cosines.argmax(1) == np.arange(len(bleed.names))).sum())
    says = f"{right} of {len(bleed.names)} subjects resemble their own photos most."
    return "\n".join([*lines, "", says, f"Protocol: {bleed.protocol}."])


def write_bleed(bleed: Bleed, folder: epath.Path) -> None:
    """Writes bleed.md, bleed.json and bleed.png."""
    if runtime.is_first_process():
        save_sheet(folder / "bleed.png", bleed.pictures, bleed.names, {"protocol": bleed.protocol})
        plain = {"names": bleed.names, "cosines": bleed.cosines.tolist(), "protocol": bleed.protocol}
        write_atomic(folder / "bleed.json", (json.dumps(plain, indent=1) + "\n").encode())
        write_atomic(folder / "bleed.md", (markdown(bleed) + "\n").encode())
