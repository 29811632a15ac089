"""What an export writes, and where: decided by its options and the run's config, before JAX is imported."""

import os
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from dreambooth_jax.files.diffusers_folder import INDEX, components, read_json
from dreambooth_jax.files.hub import resolve_base
from dreambooth_jax.files.layouts import PEFT_FILE, SUFFIX, split_base
from dreambooth_jax.files.weight_files import WEIGHT_FILES, check_alone, variant_of
from dreambooth_jax.runs.config import ADAPTERS, WITH_TOKEN

FORMATS = ("folder", "single", "kohya", "peft", "embedding")
_ADAPTERS = ("kohya", "peft")  # formats of an adapter alone


def title_of(config: ConfigDict) -> str:
    """Name of a run's subject in files."""
    return f"{config.identifier.strip('<>')} {config.class_noun}".replace(" ", "_")


def file_of(path: Path, kind: str, title: str) -> Path:
    """The file of an export to `path`, a .safetensors file or a folder; the folder itself for the format folder."""
    if kind == "folder" or path.suffix == SUFFIX:
        return path
    return path / (PEFT_FILE if kind == "peft" else f"{title}{SUFFIX}")


def token_file(path: Path) -> Path:
    """The file of the new tokens' rows beside an export at `path`."""
    return path.with_name(f"{path.stem}_token{SUFFIX}")


def default_formats(config: ConfigDict, path: Path, rank: int = 0) -> tuple[str, ...]:
    """The format of an export to `path` without --format; kohya and peft where the base decides: peft for a model that
    has no names in kohya's files."""
    if rank or config.method in (*ADAPTERS, "pivotal", "custom"):
        return _ADAPTERS
    if config.method == "inversion":
        return ("embedding",)
    return ("single",) if path.suffix == SUFFIX else ("folder",)


def check_format(config: ConfigDict, path: Path, kind: str | None, rank: int, variant: str) -> None:
    """Checks that a run can be written in a format.

    Raises:
        ValueError: the method trains nothing that the format holds, or an option is of another format.
    """
    kinds, method = (kind,) if kind else default_formats(config, path, rank), config.method
    whole = method in ("full", "custom")
    if rank and not (whole and set(kinds) <= set(_ADAPTERS)):
        raise ValueError("--rank makes a LoRA of a full fine-tuning, in the formats kohya and peft")
    if kind == "folder" and path.suffix == SUFFIX:
        raise ValueError(f"--output {path}: the format folder needs a folder")
    if variant and kinds != ("folder",):
        raise ValueError(f"--variant {variant} names the files of a folder, not those of --format {kinds[0]}")
    if kind == "embedding" and method not in WITH_TOKEN:
        raise ValueError(f"method = {method!r} trains no token: leave out --format embedding")
    if kind in _ADAPTERS and method == "inversion":
        raise ValueError("this run trained a token alone: write it with --format embedding")
    if kind == "peft" and (method in ("loha", "lokr") or (whole and not rank)):
        how = "give --rank for a LoRA of it, or " if whole else ""
        raise ValueError(
            f"PEFT files hold LoRA and DoRA, not what method = {method!r} trains: {how}write a kohya file, "
            "--format kohya"
        )


def check_output(output: str | os.PathLike, base: str, files: Sequence[str] = (), written: Sequence[Path] = ()) -> None:
    """Checks that an export to `output` overwrites nothing that it reads.

    Args:
        base: of the run, a folder or single file.
        files: adapters and embeddings that are read.
        written: files of the export, if `output` is a folder for them.

    Raises:
        ValueError: it would.
    """
    places = [Path(os.path.expanduser(path)).resolve() for path in (output, *written)]
    file, _ = split_base(base)
    for own in (resolve_base(base).resolve(), *([file.resolve()] if file else [])):
        if any(place == own or own in place.parents for place in places):
            raise ValueError(
                f"--output {output} lies in the run's own base, {own}: the export would overwrite it. Give another "
                "place."
            )
    for own in (Path(os.path.expanduser(name)).resolve() for name in files):
        if own in places:
            raise ValueError(
                f"--output {output}: the export would overwrite {own}, an adapter or embedding that it reads. Give "
                "another place."
            )


def written_by(config: ConfigDict, path: Path, kind: str | None, rank: int) -> list[Path]:
    """The files that the export of a run may write: that of every possible format, and those of its new tokens."""
    kinds = (kind,) if kind else default_formats(config, path, rank)
    files = [file_of(path, one, title_of(config)) for one in kinds]
    return files + [token_file(file) for file in files if config.method in WITH_TOKEN]


def check_components(path: Path, base: str, variant: str) -> None:
    """Checks that a pipeline folder to write holds no other weights of its models; errors are `check_alone`'s."""
    own = [variant_of(name, variant) for name in WEIGHT_FILES]
    for part in components(read_json(resolve_base(base), INDEX)):
        check_alone(path / part, own)


def check_repository(name: str) -> None:
    """Raises ValueError if `name` is no OWNER/NAME of a model hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise ValueError(f"--push_to_hub {name}: expected OWNER/NAME, such as me/sks-dog")
