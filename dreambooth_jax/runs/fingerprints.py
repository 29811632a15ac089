"""What determines a run beside its config: photos, captions, class images, the base's weights.

Digests of them are stored in every checkpoint. A run that goes on with others would not be the run that was begun:
it is refused, with the names of what changed.
"""

import hashlib
from collections.abc import Mapping

from dreambooth_jax.data.images import Examples
from dreambooth_jax.runs.config import ConfigError

Fingerprints = dict[str, dict[str, str]]  # kind -> name -> digest


def _digest(*pieces: bytes) -> str:
    total = hashlib.blake2b(digest_size=12)
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


def of_pixels(examples: Examples) -> dict[str, str]:
    """Name of an image -> digest of its pixels as they train, all views."""
    pixels: dict[str, list[bytes]] = {}
    for name, image in zip(examples.names, examples.images, strict=True):
        pixels.setdefault(name, []).append(image.tobytes())
    return {name: _digest(*views) for name, views in pixels.items()}


def of_captions(examples: Examples) -> dict[str, str]:
    """Name of an image -> digest of its caption."""
    return {name: _digest(text.encode()) for name, text in zip(examples.names, examples.captions, strict=True)}


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


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
