"""Whether the files that a command line names are there: cheap checks, before JAX is imported."""

import contextlib
import os
import re
from collections.abc import Sequence

from etils import epath
from ml_collections import ConfigDict

from dreambooth_jax.data.class_folders import class_folders
from dreambooth_jax.data.images import check_headers
from dreambooth_jax.data.sources import list_folder
from dreambooth_jax.files.digest import check_files
from dreambooth_jax.files.hub import is_hub_name, resolve_base
from dreambooth_jax.files.layouts import check_path, split_base, split_weight
from dreambooth_jax.runs.config import check_resumable
from dreambooth_jax.runs.config_file import complete, read_config, stage_folders
from dreambooth_jax.runs.records import DamagedCheckpoint, earlier_config, steps_of
from dreambooth_jax.runs.subjects import read_subjects


def check_places(config: ConfigDict) -> None:
    """Checks what a training run reads: photos, folder of class images, bases, adapters, and an earlier run's config.

    Args:
        config: with absolute paths; of a cascade, that of one stage.

    Raises:
        ValueError, OSError: something is not there, damaged, or of another run; says what was expected.
    """
    for one in [subject.config(config) for subject in read_subjects(config)] if config.subjects else [config]:
        check_photos(one)
        if config.held_out_images and not config.held_out_images.isdecimal():
            check_photos(ConfigDict(dict(config) | {"instance_images": config.held_out_images}))
    if config.prior_preservation:
        class_folders(config)
    for base in (config.base, *config.stages):
        check_base(base)
    for file in filter(None, (config.init_adapter, config.init_embedding)):
        check_path(file)
    if not config.subjects:  # whose workdir holds several runs
        check_earlier(config)


def check_earlier(config: ConfigDict) -> None:
    """Compares a config with that of the newest checkpoint in its workdir; errors are `check_resumable`'s."""
    workdir = epath.Path(config.workdir)
    if steps := steps_of(workdir / "checkpoints"):
        with contextlib.suppress(DamagedCheckpoint):  # set aside where the run is set up
            check_resumable(config, complete(earlier_config(workdir, steps[-1]))[0])


def check_run(workdir: str) -> None:
    """Checks that a run, or a cascade, was trained in a folder; errors are `read_config`'s."""
    if not stage_folders(workdir):
        read_config(workdir)


def check_files_given(adapters: Sequence[str], embeddings: Sequence[str]) -> None:
    """Checks that files of FILE[:WEIGHT] and WORD=FILE are there.

    Raises:
        ValueError: they are not, or an entry is of another form; see `check_path`.
    """
    for entry in adapters:
        check_path(split_weight(entry)[0])
    for entry in embeddings:
        word, _, file = entry.partition("=")
        if not (word and file):
            raise ValueError(f"--embedding {entry}: expected WORD=FILE, the new word for prompts and its file")
        check_path(file)


def check_writable(folder: epath.Path) -> None:
    """Checks that a folder can be made and written into; places that are not of this machine are not looked at.

    Raises:
        OSError: a file has its name, or that of a folder above it, or it cannot be written.
    """
    if "://" in os.fspath(folder):
        return
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise NotADirectoryError(f"{there}: not a folder, where {folder} would be written. Give another place.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there}: not writable, where {folder} would be written. Give another place.")


def check_photos(config: ConfigDict) -> None:
    """Lists the photos of a config, if they lie in a folder of this machine, and opens the first of them.

    Raises:
        ValueError, OSError: they are not there, or some cannot be opened; says what was expected.
    """
    if not re.match(r"[a-z]+:", config.instance_images):
        check_headers(list_folder(config.instance_images, config.captions).items[:100], config.instance_images)


def check_base(base: str, *, weights: bool = True) -> None:
    """Opens the configs of a base, if it lies on this machine, and the headers of its weights.

    Args:
        weights: whether it needs weights.

    Raises:
        ValueError, OSError: it is not there or damaged; see `resolve_base` and `check_files`.
    """
    file, template = split_base(base)
    if is_hub_name(template):
        return
    folder = resolve_base(base)
    if weights and file is None:
        check_files(folder)
