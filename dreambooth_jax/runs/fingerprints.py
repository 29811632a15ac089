"""What determines a run beside its config: photos, captions, class images, the base's weights.

Digests of them are stored in every checkpoint. A run that goes on with others would not be the run that was begun:
it is refused, with the names of what changed.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from dreambooth_jax.data.images import Examples
from dreambooth_jax.runs.config import ConfigError

Fingerprints = dict[str, dict[str, str]]  # kind -> name -> digest


def _digest(*pieces: bytes) -> str:
    total = hashlib.blake2b(digest_size=12)
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


def of_pixels(buckets: Sequence[Examples]) -> dict[str, str]:
    """Name of an image -> digest of its pixels as they train, all views, in all shapes."""
    return _by_name((name, image.tobytes()) for part in buckets for name, image in _rows(part.names, part.images))


def of_masks(buckets: Sequence[Examples]) -> dict[str, str]:
    """Name of an image -> digest of its masks, all views; empty without masks."""
    masked = [part for part in buckets if part.masks is not None]
    return _by_name((name, mask.tobytes()) for part in masked for name, mask in _rows(part.names, part.masks))


def of_captions(buckets: Sequence[Examples]) -> dict[str, str]:
    """Name of an image -> digest of its caption."""
    return {name: _digest(text.encode()) for part in buckets for name, text in _rows(part.names, part.captions)}


def _rows(names: Sequence[str], values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return zip(names, values, strict=True)


def _by_name(pieces: Iterable[tuple[str, bytes]]) -> dict[str, str]:
    found: dict[str, list[bytes]] = {}
    for name, piece in pieces:
        found.setdefault(name, []).append(piece)
    return {name: _digest(*all_) for name, all_ in found.items()}


def check_same(workdir: str, earlier: Mapping[str, Mapping[str, str]], now: Fingerprints) -> None:
    """Compares the kinds that both have.

    Raises:
        ConfigError: something changed since the checkpoint was saved; says what.
    """
    lines = []
    for kind in earlier.keys() & now.keys():
        old, new = earlier[kind], now[kind]
        words = {
            "changed": sorted(name for name in old.keys() & new.keys() if old[name] != new[name]),
            "gone": sorted(old.keys() - new.keys()),
            "new": sorted(new.keys() - old.keys()),
        }
        parts = [f"{word}: {_some(names)}" for word, names in words.items() if names]
        if parts:
            lines.append(f"{kind}: {'; '.join(parts)}")
    if lines:
        raise ConfigError(
            f"{workdir} holds a run trained with other data; put the earlier ones back, or give another "
            "--config.workdir:\n  " + "\n  ".join(sorted(lines))
        )


def comparing(
    workdir: str, earlier: Mapping[str, Mapping[str, str]], record: dict[str, Any]
) -> Callable[[Fingerprints], None]:
    """Builds `compare(found)`: adds fingerprints to those of the checkpoints to come, and compares all of them with
    `earlier`; errors are `check_same`'s.

    Args:
        record: of the checkpoints to come, with "fingerprints".
    """

    def compare(found: Fingerprints) -> None:
        record["fingerprints"] |= found
        check_same(workdir, earlier, record["fingerprints"])

    return compare


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
