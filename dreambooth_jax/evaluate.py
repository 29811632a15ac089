"""Scores a run's checkpoints, or a data set of subjects, with the paper's metrics: a table, JSON, and one page that
needs no network.

python -m dreambooth_jax.evaluate --workdir runs/dog
python -m dreambooth_jax.evaluate --workdir runs/dog --prompts paper --lpips ~/.cache/dreambooth_jax/lpips-alex
python -m dreambooth_jax.evaluate --workdir runs/many   # of many subjects: how much they mix
python -m dreambooth_jax.evaluate --config configs/protocol.py:sd15 --config.dataset=dreambooth/dataset
"""

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from etils import epath
from ml_collections import ConfigDict

from dreambooth_jax.evaluation.choices import BACKBONES, CLIP, DINO, JUDGES, PROMPTS, TRANSFORMS, judges_itself
from dreambooth_jax.runs import config_file
from dreambooth_jax.runs.command import finite, one_line_errors
from dreambooth_jax.runs.flags import fill, refuse
from dreambooth_jax.runs.places import check_writable

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from dreambooth_jax.evaluation.judge import Judge
    from dreambooth_jax.evaluation.scores import Scores


_PUBLISHED = ("dino", "clip", "transform", "lpips", "backbone")  # options of the published judge
DEFAULTS = {
    "prompts": "run",
    "max_prompt_loss": 0.02,
    "max_copy": 0.0,
    "count": 4,
    "class_count": 16,
    "judge": "auto",
    "dino": DINO,
    "clip": CLIP,
    "transform": "official",
    "lpips": "",
    "backbone": "alex",
}


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dreambooth_jax.evaluate",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", help="of a training run")
    what.add_argument(
        "--config", help="a protocol, such as configs/protocol.py:sd15; --config.FIELD=VALUE overrides it"
    )
    parser.add_argument(
        "--prompts",
        choices=PROMPTS,
        help="the run's own sample prompts, the data set's 25, or 25 in the words of the embedded base (default: run)",
    )
    parser.add_argument(
        "--max_prompt_loss",
        type=finite,
        help="CLIP-T that the best checkpoint may lose against the highest (default: 0.02)",
    )
    parser.add_argument(
        "--max_copy",
        type=finite,
        help="similarity to a photo that no picture of the best checkpoint reaches (default: copy detector's limit)",
    )
    parser.add_argument("--count", type=int, help="pictures per prompt (default: 4)")
    parser.add_argument("--class_count", type=int, help="pictures of the bare class (default: 16)")
    parser.add_argument(
        "--judge",
        choices=JUDGES,
        help="auto: the models beside the embedded base for runs of it, else the published ones (default: auto)",
    )
    parser.add_argument("--dino", help=f"folder or hub name of DINO or DINOv2 (default: {DINO})")
    parser.add_argument("--clip", help=f"folder or hub name of CLIP (default: {CLIP})")
    parser.add_argument("--transform", choices=TRANSFORMS, help="of DINO's pictures (default: official)")
    parser.add_argument("--lpips", help="folder of benchmarks/convert_weights.py, for DIV")
    parser.add_argument("--backbone", choices=BACKBONES, help="of LPIPS (default: alex)")
    options, rest = parser.parse_known_args(arguments)
    options.workdir = options.workdir and os.path.expanduser(options.workdir)
    if options.workdir and (folders := config_file.stage_folders(options.workdir)):
        options.workdir = folders[-1]  # of a cascade: the last stage's pictures are the cascade's
    options.overrides = [text for text in rest if options.config and re.match(r"--config\.[\w.]+=", text)]
    if unknown := [text for text in rest if text not in options.overrides]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if min(count for count in (options.count, options.class_count, 2) if count is not None) < 2:
        parser.error("diversity and drift need two pictures or more: --count and --class_count")
    return options


def settle(options: argparse.Namespace, config: ConfigDict | None) -> None:
    """Fills the options that were not given.

    Args:
        config: of the run; None for a protocol.

    Raises:
        ValueError: options without effect.
    """
    if config is None:
        refuse(options, DEFAULTS, "with --config: a protocol has fields for it, --config.FIELD=VALUE")
    else:
        if config.subjects:
            idle = ("prompts", "class_count", "max_prompt_loss", "max_copy", "lpips", "backbone")
            refuse(options, idle, "for a run of many subjects, which are compared with one another")
        if judges_itself(options.judge or DEFAULTS["judge"], config.base):
            refuse(options, _PUBLISHED, "with the models beside the embedded base: give --judge published")
        if not options.lpips:
            refuse(options, ["backbone"], "without --lpips FOLDER")
    fill(options, DEFAULTS)


def make_judge(options: argparse.Namespace | ConfigDict, base: str, mesh: "Mesh") -> "Judge":
    """The judge that the options or the protocol name for a run of `base`."""
    from dreambooth_jax.evaluation.judge import embedded_judge, published_judge

    if judges_itself(options.judge, base):
        return embedded_judge(mesh)
    return published_judge(
        mesh,
        dino=options.dino,
        clip=options.clip,
        transform=options.transform,
        lpips=options.lpips,
        backbone=options.backbone,
    )


def evaluate_run(options: argparse.Namespace, command: str) -> str:
    """Scores every kept checkpoint of a run into workdir/evaluation; returns the table and where the page is."""
    from dreambooth_jax.devices import runtime
    from dreambooth_jax.devices.sharding import make_mesh
    from dreambooth_jax.evaluation.dataset import check_photos
    from dreambooth_jax.evaluation.page import page
    from dreambooth_jax.evaluation.scores import MEASURES, best
    from dreambooth_jax.evaluation.table import as_json, markdown
    from dreambooth_jax.files.atomic import write_atomic
    from dreambooth_jax.runs.scoring import kept_steps, questions_of, score_run

    workdir, mesh = options.workdir, make_mesh()
    config = config_file.read_config(workdir)
    steps = kept_steps(workdir)  # before models are read
    check_photos(config.instance_images)
    questions = questions_of(config, options.prompts, options.count, options.class_count)
    judge = make_judge(options, config.base, mesh)
    sections = score_run(workdir, judge, questions, mesh, steps)
    rows = [section.row for section in sections]
    text = markdown(rows, list(MEASURES))
    folder = epath.Path(workdir) / "evaluation"
    notes = {"Config": config.to_json(indent=1), "Repeat": command}
    title = f"{config.identifier} {config.class_noun}: {workdir}"
    if runtime.is_first_process():
        write_atomic(folder / "table.md", (text + "\n").encode())
        write_atomic(folder / "table.json", (json.dumps(as_json(rows), indent=1) + "\n").encode())
        write_atomic(folder / "index.html", page(title, judge.title, sections, notes=notes).encode())
    scores = {section.step: section.scores for section in sections}
    chosen = best(scores, max_prompt_loss=options.max_prompt_loss, max_copy=options.max_copy)
    return f"{text}\n\n{_advice(scores, chosen, options)}\nJudged by {judge.title}.\nPage: {folder}/index.html"


def _advice(scores: "Mapping[int, Scores]", chosen: int | None, options: argparse.Namespace) -> str:
    """Names the best checkpoint, or what every checkpoint lacks."""
    if chosen is not None:
        found = scores[chosen]
        copies = f"{found.suspicious:.0%} of its pictures are suspected of being copies"
        return f"Best: step {chosen}, DINO {found.values['DINO'].mean:.3f}; {copies}."
    highest = max(found.values["CLIP-T"].mean for found in scores.values())
    lines = ["Best: none."]
    for step, found in scores.items():
        limit, reasons = options.max_copy or found.limit, []
        if (lost := highest - found.values["CLIP-T"].mean) > options.max_prompt_loss:
            reasons.append(f"CLIP-T is {lost:.3f} below the highest (allowed: {options.max_prompt_loss:g})")
        if (copy := found.values["copy"].mean) >= limit:
            share = f"; {found.suspicious:.0%} of the pictures are suspected of being copies"
            reasons.append(f"a picture has {copy:.3f} of similarity to a photo (limit {limit:.3f}{share})")
        lines.append(f"  step {step}: {' and '.join(reasons)}")
    return "\n".join(lines)


def evaluate_many(options: argparse.Namespace) -> str:
    """Compares the subjects of a run of many with one another; returns the table and where it is."""
    from dreambooth_jax.devices.sharding import make_mesh
    from dreambooth_jax.runs.bleed import markdown, measure_bleed, write_bleed

    mesh, folder = make_mesh(), epath.Path(options.workdir) / "evaluation"
    judge = make_judge(options, config_file.read_config(options.workdir).base, mesh)
    bleed = measure_bleed(options.workdir, judge, mesh, options.count)
    write_bleed(bleed, folder)
    return f"{markdown(bleed)}\nJudged by {judge.title}.\nPictures: {folder}/bleed.png"


def evaluate_protocol(config: ConfigDict, command: str) -> str:
    """Trains and scores every subject of a protocol; returns the table and where the page is."""
    from dreambooth_jax import train
    from dreambooth_jax.devices.sharding import make_mesh
    from dreambooth_jax.runs.protocol import check_protocol, run_protocol

    check_protocol(config)  # before models are read
    mesh = make_mesh(config.train.mesh_data, config.train.mesh_fsdp)
    judge = make_judge(config, config.train.base, mesh)

    text = run_protocol(config, judge, mesh, train.run, command)
    return f"{text}\n\nJudged by {judge.title}.\nPage: {config.workdir}/index.html"


def read_protocol(spec: str, overrides: Sequence[str]) -> ConfigDict:
    """The config of FILE[:PRESET] with --config.FIELD=VALUE in their places.

    Raises:
        ConfigError: the file or an override cannot be used.
    """
    pairs = [text.removeprefix("--config.").partition("=") for text in overrides]
    return config_file.override(config_file.load(spec), [(name, value) for name, _, value in pairs])


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    command = shlex.join(["python", "-m", "dreambooth_jax.evaluate", *arguments])
    with one_line_errors():
        protocol = read_protocol(options.config, options.overrides) if options.config else None
        config = None if protocol else config_file.read_config(options.workdir)
        settle(options, config)
        if config:
            check_writable(epath.Path(options.workdir) / "evaluation")
        from dreambooth_jax.devices import runtime  # here, so that wrong options are refused without JAX

        runtime.start()
        if protocol:
            print(evaluate_protocol(protocol, command))
        elif config and config.subjects:
            print(evaluate_many(options))
        else:
            print(evaluate_run(options, command))


if __name__ == "__main__":
    main()
