"""The paper's protocol over a data set: subjects trained one after the other or in groups, each scored when it is
trained."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dreambooth_jax.data.class_folders import NOUN
from dreambooth_jax.devices import runtime
from dreambooth_jax.evaluation.choices import BACKBONES, JUDGES, PROMPTS, TRANSFORMS
from dreambooth_jax.evaluation.dataset import Subject, check_photos, read_dataset
from dreambooth_jax.evaluation.judge import Judge
from dreambooth_jax.evaluation.page import Section, page
from dreambooth_jax.evaluation.protocol import PAPER, summary
from dreambooth_jax.evaluation.scores import MEASURES
from dreambooth_jax.evaluation.table import Row, as_json, markdown
from dreambooth_jax.files.atomic import write_atomic
from dreambooth_jax.runs.config import ConfigError, absolute_paths, check_config, check_resumable
from dreambooth_jax.runs.config_file import complete, read_json
from dreambooth_jax.runs.job import pairs_prior
from dreambooth_jax.runs.scoring import (
    OverBase,
    digest_of_file,
    protocol_of,
    questions_of,
    read_section,
    score_run,
    weights_of_step,
)
from dreambooth_jax.runs.stages import stage_configs

_KINDS = {
    "dataset": str,
    "subjects": tuple,
    "workdir": str,
    "keep_checkpoints": bool,
    "at_once": int,
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
        FileNotFoundError, ValueError: see `read_dataset` and `check_photos`.
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
    if not problems and config.at_once < 1:
        problems.append(f"at_once = {config.at_once}: expected the number of subjects in one program, 1 or more")
    if problems:
        raise ConfigError("the protocol's config cannot be used; see configs/protocol.py:\n  " + "\n  ".join(problems))
    found = read_dataset(config.dataset)
    absent = sorted(set(config.subjects) - {subject.name for subject in found})
    if absent:
        raise ConfigError(f"subjects: {', '.join(absent)} not in {config.dataset}; there are {_names(found)}")
    subjects = [subject for subject in found if not config.subjects or subject.name in config.subjects]
    if config.at_once > 1 and config.train.stages:
        raise ConfigError(
            f"at_once = {config.at_once}: not implemented for a cascade, whose stages train in turn; give 1"
        )
    for subject in subjects:
        check_photos(subject.folder)
        check_config(own := train_config(config, subject))
        stage_configs(own)
    for group in groups_of(config, subjects)[:1]:
        try:
            check_config(group.config)
        except ConfigError as error:
            raise ConfigError(f"at_once = {config.at_once}: {error}") from error
    return subjects


def _names(subjects: Sequence[Subject]) -> str:
    return ", ".join(subject.name for subject in subjects)


def train_config(config: ConfigDict, subject: Subject) -> ConfigDict:
    """The training config of a subject: class images are shared by the subjects of a class."""
    folder = epath.Path(config.workdir).expanduser()
    train = _with_class_images(config, subject.class_noun.replace(" ", "_"))
    train.workdir = str(folder / subject.name)
    train.instance_images = str(subject.folder)
    train.class_noun = subject.class_noun
    train.stage_fields = _with_shared(train)
    return train


def _with_class_images(config: ConfigDict, noun: str) -> ConfigDict:
    """The training config with the folder of a noun's class images, if it needs any."""
    train = ConfigDict(config.train)
    if not pairs_prior(train):
        folder = epath.Path(config.workdir).expanduser() / "class_images" / noun
        train.class_images, train.create_class_images = train.class_images or str(folder), True
    return train


def _with_shared(train: ConfigDict) -> tuple[tuple[tuple[str, Any], ...], ...]:
    """The fields of a cascade's further stages: class images that a stage paints are shared as those of stage I are."""
    given = [*train.stage_fields, *[()] * (len(train.stages) - len(train.stage_fields))]
    if not train.class_images:
        return tuple(given)
    shared = []
    for number, fields in enumerate(given, 2):
        own = () if "class_images" in dict(fields) else (("class_images", f"{train.class_images}_stage{number}"),)
        shared.append((*fields, *own))
    return tuple(shared)


class Group(NamedTuple):
    """Subjects that train in one program.

    Attributes:
        table: their table for a run of many.
        config: of that run.
    """

    subjects: list[Subject]
    table: bytes
    config: ConfigDict


def groups_of(config: ConfigDict, subjects: Sequence[Subject]) -> list[Group]:
    """The subjects in their order, `at_once` in a group; none where every subject has a run of its own."""
    groups: list[Group] = []
    folder = epath.Path(config.workdir).expanduser()
    for first in range(0, len(subjects) if config.at_once > 1 else 0, config.at_once):
        own, text = subjects[first : first + config.at_once], io.StringIO()
        writer = csv.writer(text)
        writer.writerow(("name", "photos", "class_noun"))
        writer.writerows((one.name, _absolute(one.folder), one.class_noun) for one in own)
        train = _with_class_images(config, NOUN)
        train.workdir = str(folder / "groups" / f"{len(groups) + 1:02d}")
        train.subjects = f"{train.workdir}.csv"
        train.sample_prompts = ()  # scores have sheets of their own
        groups.append(Group(own, text.getvalue().encode(), train))
    return groups


def check_groups(groups: Sequence[Group]) -> None:
    """Raises ConfigError if the workdir has a group of the same number with other subjects."""
    for group in groups:
        table = epath.Path(group.config.subjects)
        if table.exists() and table.read_bytes() != group.table:
            raise ConfigError(f"{table} names other subjects than this config: give another --config.workdir")


def _absolute(folder: epath.Path) -> str:
    return str(folder if "://" in str(folder) else folder.resolve())


def run_protocol(
    config: ConfigDict, judge: Judge, mesh: Mesh, train: Callable[[ConfigDict], None], command: str
) -> str:
    """Trains and scores every subject, writes tables and a page after each; returns the table.

    Args:
        train: trains the run of a config to its end, from its newest checkpoint if there is one.
        command: line that repeats this, for the page.
    """
    subjects, sections, text = check_protocol(config), {}, ""
    groups = groups_of(config, subjects)
    check_groups(groups)
    for number, group in enumerate(groups, 1):
        _say(f"group {number} of {len(groups)}: {_names(group.subjects)}")
        for name, section in score_group(config, group, judge, mesh, train):
            sections[name] = section
            text = write_tables(config, judge, sections, command)
    for number, subject in enumerate(subjects if not groups else (), 1):
        _say(f"subject {number} of {len(subjects)}: {subject.name}, {subject.class_noun}")
        sections[subject.name] = score_subject(config, subject, judge, mesh, train)
        text = write_tables(config, judge, sections, command)
    return text


def _say(line: str) -> None:
    if runtime.is_first_process():
        print(line, flush=True)


def score_group(
    config: ConfigDict, group: Group, judge: Judge, mesh: Mesh, train: Callable[[ConfigDict], None]
) -> Iterator[tuple[str, Section]]:
    """(name, scores) of the subjects of a group, trained now unless all have kept scores.

    Raises:
        ConfigError: the group was trained with another config.
    """
    known, owns = {}, {subject.name: train_config(config, subject) for subject in group.subjects}
    questions = {
        name: questions_of(own, config.prompts, config.count, config.class_count) for name, own in owns.items()
    }
    files = {name: epath.Path(group.config.workdir) / f"{name}.safetensors" for name in owns}
    for name, own in owns.items():
        about = (own.steps, protocol_of(judge, questions[name]), digest_of_file(files[name]))
        known[name] = read_section(epath.Path(own.workdir) / "evaluation", *about)
    base = None
    if None in known.values():
        if runtime.is_first_process():
            write_atomic(epath.Path(group.config.subjects), group.table)
        runtime.wait_for_all("the table of a group")
        train(group.config)
        runtime.wait_for_all("the adapters of a group")
        base = OverBase(group.config, judge, mesh)
    else:
        check_training(group.config)
    for name, own in owns.items():
        section = known[name]
        if section is None:
            assert base is not None
            section = base.score(own, files[name], questions[name])
        yield name, section._replace(row=section.row._replace(label=name))
    if not config.keep_checkpoints:
        _remove_checkpoints(group.config)


def _remove_checkpoints(own: ConfigDict) -> None:
    folder = epath.Path(own.workdir) / "checkpoints"
    if runtime.is_first_process() and folder.exists():
        folder.rmtree()


def score_subject(
    config: ConfigDict, subject: Subject, judge: Judge, mesh: Mesh, train: Callable[[ConfigDict], None]
) -> Section:
    """The scores of a subject's last step, in a cascade of its last stage: those that an earlier call has kept, or else
    trained and scored now.

    Raises:
        ConfigError: the scores are of a run with another config.
    """
    whole = train_config(config, subject)
    stages = stage_configs(whole)
    last = stages[-1]
    questions = questions_of(last, config.prompts, config.count, config.class_count)
    workdir = epath.Path(last.workdir)
    weights = weights_of_step(workdir, last.steps)
    known = read_section(workdir / "evaluation", last.steps, protocol_of(judge, questions), weights)
    if known is not None:
        for own in stages:
            check_training(own)
    else:
        train(whole)
        [known] = score_run(workdir, judge, questions, mesh, [last.steps])
    if not config.keep_checkpoints:
        for own in stages:
            _remove_checkpoints(own)
    return known._replace(row=known.row._replace(label=subject.name))


def check_training(own: ConfigDict) -> None:
    """Raises ConfigError, naming the fields, if the run in `own.workdir` was trained with another config."""
    check_resumable(absolute_paths(own), complete(read_json(epath.Path(own.workdir) / "config.json"))[0])


def write_tables(config: ConfigDict, judge: Judge, sections: dict[str, Section], command: str) -> str:
    """Writes table.md, table.json and index.html of the subjects so far; returns the Markdown."""
    rows = [section.row for section in sections.values()]
    label = f"{config.train.method} on {', '.join((config.train.base, *config.train.stages))}, ours"
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
