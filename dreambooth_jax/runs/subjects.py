"""The table of the subjects of a run of many, and the subjects' files."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from dreambooth_jax.data.captions import is_text, read_text
from dreambooth_jax.data.class_folders import NOUN
from dreambooth_jax.data.paths import printable
from dreambooth_jax.evaluation.dataset import CLASSES_FILE, read_dataset
from dreambooth_jax.files.shipped import shipped
from dreambooth_jax.files.tables import read_table
from dreambooth_jax.runs.config import ConfigError, check_config


class Subject(NamedTuple):
    """A row of the table of subjects: its own values of config fields. Several rows may have the same photos: a sweep
    of the learning rate and the rank."""

    name: str
    photos: str
    identifier: str
    class_noun: str
    steps: int
    learning_rate: float
    lora_rank: int

    def config(self, config: ConfigDict) -> ConfigDict:
        """The config of a run of this subject alone."""
        own = {name: getattr(self, name) for name in _OWN}
        return ConfigDict(dict(config) | own | {"instance_images": self.photos})


_LONGEST_NAME = 200  # bytes: file systems take 255, with ending and partial file
# Config fields that a row may give -> reader of their text.
_OWN = {"identifier": str, "class_noun": str, "steps": int, "learning_rate": float, "lora_rank": int}


def read_subjects(config: ConfigDict) -> list[Subject]:
    """The subjects that `config.subjects` names: folders of images in a folder, with the nouns of google/dreambooth's
    classes file if it is there, or the rows of a .csv table.

    Raises:
        ConfigError: no such folder or table, no subjects in it, an unknown column, names that are no file names or are
            alike, a row without photos, a value that the config would not take, or ranks that differ where the method
            or the optimizer cannot fill them up.
        ValueError: the table is not text in UTF-8, or no CSV; see `read_table`.
    """
    path = epath.Path(os.path.expanduser(shipped(config.subjects)))
    if path.suffix == ".csv" and path.is_file():
        columns, table = read_table(read_text(path), path)
        rows = list(table.values())
        if unknown := sorted({*columns} - {*Subject._fields}):
            raise ConfigError(
                f"{path}: unknown columns {', '.join(unknown)}; expected some of {', '.join(Subject._fields)}"
            )
        wrong = [str(number) for number, row in table.items() if not row.get("photos")]
        if wrong:
            raise ConfigError(f"{path}, line {', '.join(wrong)}: no photos; columns: {', '.join(Subject._fields)}")
        rows = [row | {"photos": _place(path.parent, row["photos"] or "")} for row in rows]
    elif (path / CLASSES_FILE).is_file():
        rows = [{"photos": str(one.folder), "class_noun": one.class_noun} for one in read_dataset(path)]
    elif path.is_dir():
        rows = [
            {"photos": str(folder)}
            for folder in sorted(path.iterdir())
            if folder.is_dir() and folder.name[0] not in "._"
        ]
    else:
        raise ConfigError(f"subjects = {config.subjects!r}: expected a folder of folders of images, or a .csv table")
    subjects = [_subject(row, config, f"{path}, {row['photos']}") for row in rows]
    _check_names(config, [subject.name for subject in subjects])
    nouns = sorted({subject.class_noun for subject in subjects})
    if config.class_images and NOUN not in config.class_images and config.prior_preservation and len(nouns) > 1:
        raise ConfigError(
            f"class_images = {config.class_images!r}: one folder cannot hold the class images of {', '.join(nouns)}; "
            f"write {NOUN} into its name, or leave it empty (workdir/classes has a folder per noun)"
        )
    if config.lr_schedule != "constant" and {subject.steps for subject in subjects} != {config.steps}:
        raise ConfigError(f"lr_schedule = {config.lr_schedule!r} needs the config's steps for every subject")
    ranks = sorted({subject.lora_rank for subject in subjects})
    fills = config.method in ("lora", "dora") and config.optimizer == "adamw" and not config.lora_ranks
    if len(ranks) > 1 and not fills:
        raise ConfigError(
            f"lora_rank = {', '.join(map(str, ranks))} in one program needs method = lora or dora, optimizer = adamw "
            "and no lora_ranks: give every subject the same rank, or train once per rank"
        )
    return subjects


def _subject(row: Mapping[str, str | None], config: ConfigDict, where: str) -> Subject:
    own = {}
    for name, read in _OWN.items():
        try:
            own[name] = read(row.get(name) or config[name])
        except ValueError:
            raise ConfigError(f"{where}: {name} = {row[name]!r}, expected a number") from None
    subject = Subject(row.get("name") or epath.Path(row["photos"]).name, row["photos"], **own)
    try:
        check_config(ConfigDict(dict(subject.config(config)) | {"subjects": ""}))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return subject


def _place(folder: epath.Path, photos: str) -> str:
    """The photos that a table in `folder` names: a folder, or a source such as hub:OWNER/NAME as it is."""
    return photos if re.match(r"[a-z]+:", photos) else str(folder / os.path.expanduser(photos))


def _check_names(config: ConfigDict, names: Sequence[str]) -> None:
    """Checks that every name can be that of a file in the workdir, of one subject alone on every system."""
    where = f"subjects = {config.subjects!r}"
    forms = [printable(name).casefold() for name in names]
    if not names or len(set(forms)) < len(forms):
        alike = [name for name, form in zip(names, forms, strict=True) if forms.count(form) > 1]
        raise ConfigError(
            f"{where}: expected subjects of different names, which differ in more than case, found {alike or 'none'}"
        )
    for name in names:
        if name in ("..", ".") or "/" in name or not is_text(name) or len(os.fsencode(name)) > _LONGEST_NAME:
            raise ConfigError(
                f"{where}: name = {name!r}: expected a file name of at most {_LONGEST_NAME} bytes without folders, "
                "since the adapter is written to workdir/NAME.safetensors"
            )


def adapter_path(config: ConfigDict, subject: Subject) -> epath.Path:
    """The file of a subject's adapter."""
    return epath.Path(config.workdir) / f"{subject.name}.safetensors"
