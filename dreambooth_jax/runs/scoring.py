"""Scoring the checkpoints of a run: paints the prompts, judges, keeps the results beside the run."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from dreambooth_jax.data.images import decode_image
from dreambooth_jax.devices import runtime
from dreambooth_jax.evaluation import prompts as prompt_sets
from dreambooth_jax.evaluation.dataset import read_photos
from dreambooth_jax.evaluation.judge import Judge
from dreambooth_jax.evaluation.page import Section
from dreambooth_jax.evaluation.scores import Copy, Painted, Scores, read_scores, score
from dreambooth_jax.evaluation.table import Row
from dreambooth_jax.evaluation.transforms import Picture
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.files.atomic import write_atomic
from dreambooth_jax.files.json_text import parse_json
from dreambooth_jax.files.lora_read import read_adapters, with_adapters
from dreambooth_jax.models.params import Params
from dreambooth_jax.painting.painter import Painter
from dreambooth_jax.painting.sheets import contact_sheet, paint_rows, save_png
from dreambooth_jax.runs import checkpoint
from dreambooth_jax.runs.cascade import from_prompts
from dreambooth_jax.runs.command import BEST
from dreambooth_jax.runs.config_file import read_config
from dreambooth_jax.runs.job import painter_of
from dreambooth_jax.runs.workdir import open_run

CLASS_PROMPT = "a {class_noun}"  # of the paper's PRES


class Questions(NamedTuple):
    """What is painted for scores.

    Attributes:
        name: of the prompts.
        templates: prompts with the fields of a config.
        count, class_count: pictures of each prompt, and of the bare class.
        reuse: what `says_reuse` says of the config.
    """

    name: str
    templates: tuple[str, ...]
    count: int
    class_count: int
    reuse: str

    @property
    def says(self) -> str:
        """The part of a protocol that names the prompts."""
        return f"{self.name} x {self.count} pictures, {self.class_count} of the class{self.reuse}"


def says_reuse(config: ConfigDict) -> str:
    """The part of a protocol that names the reuse of features; "" where every step runs the whole model."""
    return f"; deep features of every {config.reuse_features} steps" if config.reuse_features > 1 else ""


def questions_of(config: ConfigDict, kind: str, count: int, class_count: int) -> Questions:
    """The prompts to score a run with.

    Args:
        kind: "run", the run's own sample prompts with the identifier; "paper", the data set's 25 for the class;
            "world", 25 in the words of the embedded base.

    Raises:
        ValueError: the run has no such prompts.
    """
    own = tuple(prompt for prompt in config.sample_prompts if "{identifier}" in prompt)
    digest = hashlib.sha256("\n".join(own).encode()).hexdigest()[:6]
    name, templates = {
        "run": (f"the run's {len(own)} prompts (#{digest})", own),
        "paper": ("the data set's 25 prompts of the class", prompt_sets.paper_prompts(config.class_noun)),
        "world": ("25 prompts of the embedded base's world", prompt_sets.WORLD),
    }[kind]
    if not templates:
        raise ValueError(f"{config.workdir}: no sample prompt has {{identifier}}; score with --prompts paper")
    return Questions(name, templates, count, class_count, says_reuse(config))


def kept_steps(workdir: str | epath.Path) -> list[int]:
    """The steps of a run's checkpoints, that of the best one included.

    Raises:
        FileNotFoundError: nothing was saved there.
    """
    read_config(workdir)
    steps = sorted({step for name in ("checkpoints", BEST) for step in checkpoint.steps_of(epath.Path(workdir) / name)})
    if not steps:
        raise FileNotFoundError(f"{workdir}/checkpoints: no checkpoint yet")
    return steps


def score_run(
    workdir: str | epath.Path, judge: Judge, questions: Questions, mesh: Mesh, steps: Sequence[int]
) -> list[Section]:
    """Scores the checkpoints of `steps`; what an earlier call of the same protocol has kept is read."""
    folder, sections, compiled, before = epath.Path(workdir) / "evaluation", [], None, None
    for step in steps:
        weights = weights_of_step(workdir, step)
        known = read_section(folder, step, protocol_of(judge, questions), weights)
        if known is None:
            config, pipeline, params = open_run(workdir, mesh, step)
            compiled = compiled or painter_of(config, pipeline, mesh)
            if before is None:
                untrained = from_prompts(config, pipeline, mesh, compiled, bases=True)
                count = questions.class_count
                before = paint_all(untrained, read_params(pipeline, mesh), [CLASS_PROMPT], count, config)[0]
            paint = from_prompts(config, pipeline, mesh, compiled)
            painted = _painted(config, paint, params, questions, before)
            known = _keep(folder, step, protocol_of(judge, questions), weights, painted, score(judge, painted))
        sections.append(known)
    return sections


class OverBase:
    """Scores adapters over one base, which is read once and whose painter is compiled once."""

    def __init__(self, config: ConfigDict, judge: Judge, mesh: Mesh):
        """
        Args:
            config: of a run of any of the adapters.
        """
        self.judge = judge
        pipeline = load_pipeline(config.base, dtype=jnp.dtype(config.dtype))
        self._shapes, self._params = pipeline.shapes, read_params(pipeline, mesh)
        self._paint = painter_of(config, pipeline, mesh)
        self._before: dict[str, list[Picture]] = {}  # class noun -> pictures of the base

    def score(self, config: ConfigDict, file: epath.Path, questions: Questions) -> Section:
        """The scores of the adapter in `file` as a run with `config` would have them; kept in its workdir.

        Raises:
            WeightsError: the file is none of this base; see `read_adapters`.
        """
        noun, count = config.class_noun, questions.class_count
        if noun not in self._before:
            self._before[noun] = paint_all(self._paint, self._params, [CLASS_PROMPT], count, config)[0]
        params = with_adapters(self._params, read_adapters([str(file)], self._shapes))
        painted = _painted(config, self._paint, params, questions, self._before[noun])
        about = (config.steps, protocol_of(self.judge, questions), digest_of_file(file))
        return _keep(epath.Path(config.workdir) / "evaluation", *about, painted, score(self.judge, painted))


def digest_of_file(file: epath.Path) -> str:
    """The digest of an adapter's bytes; empty where there is no file."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def protocol_of(judge: Judge, questions: Questions) -> str:
    """The protocol of a run's numbers."""
    return f"{judge.protocol}; {questions.says}"


def paint_all(
    paint: Painter, params: Params, templates: Sequence[str], count: int, config: ConfigDict
) -> list[list[Picture]]:
    """A row of `count` pictures per template; picture i of every row has the noise of seed i."""
    texts = [prompt_sets.filled(template, config.identifier, config.class_noun) for template in templates]
    return paint_rows(paint, params, texts, range(count), negative=config.negative_prompt)


def _painted(
    config: ConfigDict, paint: Painter, params: Params, questions: Questions, before: Sequence[Picture]
) -> Painted:
    rows = paint_all(paint, params, questions.templates, questions.count, config)
    return Painted(
        photos=read_photos(config.instance_images),
        rows=rows,
        texts=[prompt_sets.class_only(template, config.class_noun) for template in questions.templates],
        of_class=paint_all(paint, params, [CLASS_PROMPT], questions.class_count, config)[0],
        of_class_before=before,
        class_text=prompt_sets.class_only(CLASS_PROMPT, config.class_noun),
    )


def sheet_of(painted: Painted) -> Picture:
    """All pictures with their prompts, those of the class before and after training last."""
    count = len(painted.rows[0])
    rows = [*painted.rows, painted.of_class_before[:count], painted.of_class[:count]]
    return contact_sheet(rows, [*painted.texts, f"{painted.class_text}: base", f"{painted.class_text}: trained"])


def copies_sheet(painted: Painted, copies: Sequence[Copy]) -> Picture:
    """Pairs of a generated picture and its most similar photo."""
    side = painted.rows[0][0].shape[0]
    rows = [[painted.rows[c.prompt][c.picture], _square(painted.photos[c.photo], side)] for c in copies]
    pairs = [picture for row in rows for picture in row]
    labels = [label for c in copies for label in (f"{c.similarity:.3f}", f"photo {c.photo + 1}")]
    return contact_sheet([pairs], ["pictures, each with its most similar photo and their cosine"], labels)


def _square(photo: Picture, side: int) -> Picture:
    return np.asarray(ImageOps.fit(Image.fromarray(photo), (side, side), Image.Resampling.LANCZOS))


def _files(folder: epath.Path, step: int) -> tuple[epath.Path, epath.Path, epath.Path]:
    name = f"step_{step:06d}"
    return folder / f"{name}.json", folder / f"{name}.png", folder / f"{name}_copies.png"


def weights_of_step(workdir: str | os.PathLike, step: int) -> str:
    """A digest of the weights that a step's scores are of; empty where no checkpoint says it."""
    folders = (epath.Path(workdir) / name for name in ("checkpoints", BEST))
    return next((digest for folder in folders if (digest := checkpoint.weights_at(folder, step))), "")


def _keep(folder: epath.Path, step: int, protocol: str, weights: str, painted: Painted, scores: Scores) -> Section:
    """Writes scores and sheets; the scores last, as they say that all is there."""
    numbers, sheet, copies = _files(folder, step)
    section = _section(step, protocol, scores, sheet_of(painted), copies_sheet(painted, scores.copies))
    if runtime.is_first_process():
        save_png(sheet, section.sheet, {"protocol": protocol})
        save_png(copies, section.copies, {"protocol": protocol})
        about = {"protocol": protocol, "step": step, "weights": weights, "prompts": list(painted.texts)}
        content: dict[str, Any] = about | scores.json()
        write_atomic(numbers, (json.dumps(content, indent=1) + "\n").encode())
    return section


def read_section(folder: epath.Path, step: int, protocol: str, weights: str = "") -> Section | None:
    """What an earlier call has kept of a step, if it is whole, of this protocol and of these weights; "" for any."""
    numbers, sheet, copies = _files(folder, step)
    if not numbers.exists():
        return None
    try:
        content = parse_json(numbers.read_bytes())
        if content["protocol"] != protocol or (weights and content.get("weights", weights) != weights):
            return None
        scores = read_scores({name: content[name] for name in Scores._fields})
        pictures = [np.asarray(decode_image(path.read_bytes())) for path in (sheet, copies)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError):  # half a file, or of another hand
        return None
    return _section(step, protocol, scores, *pictures)


def _section(step: int, protocol: str, scores: Scores, sheet: Picture, copies: Picture) -> Section:
    return Section(Row(f"step {step}", protocol, scores.values), scores, step, sheet, copies)
