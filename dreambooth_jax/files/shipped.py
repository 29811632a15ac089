"""Configs and example subjects that come with the package."""

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
# A checkout has configs/ and examples/ beside the package; an installed wheel has them inside.
HOMES = (_PACKAGE.parent, _PACKAGE / "shipped")


def shipped(path: str, *folders: str) -> str:
    """The path itself where it exists or is absolute, else the shipped file or folder of that name, else the path.

    Args:
        path: path as a person wrote it, such as `configs/dog.py` or `examples/subjects/dog`.
        folders: folders in which a bare name is looked for too: `dog.py` in `configs`.
    """
    if Path(path).is_absolute() or Path(path).exists():
        return path
    candidates = [home / folder / path for home in HOMES for folder in ("", *folders)]
    return next((str(candidate) for candidate in candidates if candidate.exists()), path)
