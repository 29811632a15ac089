"""The paper's protocol over a data set: a run per subject, one after the other, each scored when it is trained."""

import json
from collections.abc import Callable

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dreambooth_jax.devices import runtime
from dreambooth_jax.evaluation.choices import BACKBONES, JUDGES, PROMPTS, TRANSFORMS
from dreambooth_jax.evaluation.dataset import Subject, read_dataset
from dreambooth_jax.evaluation.judge import Judge
from dreambooth_jax.evaluation.page import Section, page
from dreambooth_jax.evaluation.protocol import PAPER, summary
from dreambooth_jax.evaluation.scores import MEASURES
from dreambooth_jax.evaluation.table import Row, as_json, markdown
from dreambooth_jax.files.atomic import write_atomic
from dreambooth_jax.runs.config import ConfigError, absolute_paths, check_config, check_resumable
from dreambooth_jax.runs.config_file import complete, read_json
from dreambooth_jax.runs.scoring import protocol_of, questions_of, read_section, score_run, weights_of_step

_KINDS = {
    "dataset": str,
    "subjects": tuple,
    "workdir": str,
    "keep_checkpoints": bool,
    "prompts": str,
    "count": int,
    "class_count": int,
    "judge": str,
    "dino": str,
    "clip": str,
    "transform": str,
    "lpips": str,
    "backbone": str,
    "train": ConfigDict,
}
_CHOICES = {"prompts": PROMPTS, "judge": JUDGES, "transform": TRANSFORMS, "backbone": BACKBONES}


def check_protocol(config: ConfigDict) -> list[Subject]:
    """The subjects of a config, after every cheap check.

    Raises:
        ConfigError: a field is unknown, missing or of the wrong type, or a subject is not in the data set.
        FileNotFoundError, ValueError: see `read_dataset`.
    """
    problems = [f"{name}: unknown field" for name in sorted(config.keys() - _KINDS.keys())]
    problems += [f"{name}: missing" for name in sorted(_KINDS.keys() - config.keys())]
    problems += [
        f"{name} = {config[name]!r}: expected {kind.__name__}"
        for name, kind in _KINDS.items()
        if name in config and type(config[name]) is not kind
    ]
    problems += [
        f"{name} = {config[name]!r}: expected one of {', '.join(choices)}"
        for name, choices in _CHOICES.items()
        if name in config and config[name] not in choices
    ]
    if not problems and min(config.count, config.class_count) < 2:
        problems.append("count, class_count: diversity and drift need two pictures or more")
    if problems:
        raise ConfigError("the protocol's config cannot be used; see configs/protocol.py:\n  " + "\n  ".join(problems))
    found = read_dataset(config.dataset)
    absent = sorted(set(config.subjects) - {subject.name for subject in found})
    if absent:
        raise ConfigError(f"subjects: {', '.join(absent)} not in {config.dataset}; there are {_names(found)}")
    subjects = [subject for subject in found if not config.subjects or subject.name in config.subjects]
    for subject in subjects:
        check_config(train_config(config, subject))
    return subjects


def _names(subjects: list[Subject]) -> str:
    return ", ".join(subject.name for subject in subjects)


def train_config(config: ConfigDict, subject: Subject) -> ConfigDict:
    """The training config of a subject: class images are shared by the subjects of a class."""
    folder = epath.Path(config.workdir).expanduser()
    train = ConfigDict(config.train)
    train.workdir = str(folder / subject.name)
    train.instance_images = str(subject.folder)
    train.class_noun = subject.class_noun
    train.class_images = str(folder / "class_images" / subject.class_noun.replace(" ", "_"))
    train.create_class_images = True
    return train


def run_protocol(
    config: ConfigDict, judge: Judge, mesh: Mesh, train: Callable[[ConfigDict], None], command: str
) -> str:
    """Trains and scores every subject, writes tables and a page after each; returns the table.

    Args:
        train: trains the run of a config to its end, from its newest checkpoint if there is one.
        command: line that repeats this, for the page.
    """
    subjects, sections, text = check_protocol(config), {}, ""
    for number, subject in enumerate(subjects, 1):
        if runtime.is_first_process():
            print(f"subject {number} of {len(subjects)}: {subject.name}, {subject.class_noun}", flush=True)
        sections[subject.name] = score_subject(config, subject, judge, mesh, train)
        text = write_tables(config, judge, sections, command)
    return text


def score_subject(
    config: ConfigDict, subject: Subject, judge: Judge, mesh: Mesh, train: Callable[[ConfigDict], None]
) -> Section:
    """The scores of a subject's last step: those that an earlier call has kept, or else trained and scored now.

    Raises:
        ConfigError: the scores are of a run with another config.
    """
    own = train_config(config, subject)
    questions = questions_of(own, config.prompts, config.count, config.class_count)
    workdir = epath.Path(own.workdir)
    weights = weights_of_step(workdir, own.steps)
    known = read_section(workdir / "evaluation", own.steps, protocol_of(judge, questions), weights)
    if known is not None:
        check_training(own)
    else:
        train(own)
        [known] = score_run(workdir, judge, questions, mesh, [own.steps])
    if not config.keep_checkpoints and runtime.is_first_process() and (workdir / "checkpoints").exists():
        (workdir / "checkpoints").rmtree()
    return known._replace(row=known.row._replace(label=subject.name))


def check_training(own: ConfigDict) -> None:
    """Raises ConfigError, naming the fields, if the run in `own.workdir` was trained with another config."""
    check_resumable(absolute_paths(own), complete(read_json(epath.Path(own.workdir) / "config.json"))[0])


def write_tables(config: ConfigDict, judge: Judge, sections: dict[str, Section], command: str) -> str:
    """Writes table.md, table.json and index.html of the subjects so far; returns the Markdown."""
    rows = [section.row for section in sections.values()]
    label = f"{config.train.method} on {config.train.base}, ours"
    scores = {name: section.scores for name, section in sections.items()}
    both: list[Row] = summary(label, rows[0].protocol, scores)
    text = markdown([*both, *rows], list(MEASURES), PAPER)
    folder = epath.Path(config.workdir).expanduser()
    if runtime.is_first_process():
        notes = {"Config": config.to_json(indent=1), "Repeat": command}
        html = page(
            f"{len(rows)} subjects of {config.dataset}",
            judge.title,
            list(sections.values()),
            summary=both,
            quoted=PAPER,
            notes=notes,
        )
        write_atomic(folder / "table.md", (text + "\n").encode())
        write_atomic(folder / "table.json", (json.dumps(as_json([*both, *rows], PAPER), indent=1) + "\n").encode())
        write_atomic(folder / "index.html", html.encode())
    return text
