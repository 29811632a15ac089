"""Photos that are kept out of training."""

from collections.abc import Sequence

import numpy as np

from dreambooth_jax.data.images import Examples
from dreambooth_jax.data.sources import list_images


def last_names(names: Sequence[str], count: int) -> tuple[str, ...]:
    """The last `count` of the different names, in their order.

    Raises:
        ValueError: no other name is left.
    """
    different = sorted(set(names))
    if count >= len(different):
        raise ValueError(
            f"held_out_images = {count} leaves none of {len(different)} photos to train on; hold out fewer, or give "
            "a folder of other photos"
        )
    return tuple(different[len(different) - count :])


def shared_files(photos: str, held: str) -> list[str]:
    """The files of the folder `held` whose very bytes lie in the folder `photos` too, whatever their names."""
    known = {path.read_bytes() for path in list_images(photos)}
    return [path.name for path in list_images(held) if path.read_bytes() in known]


def without(examples: Examples, names: Sequence[str]) -> Examples:
    """The examples of other photos than `names`."""
    return rows_of(examples, [row for row, name in enumerate(examples.names) if name not in names])


def once(examples: Examples, names: Sequence[str]) -> Examples:
    """One example of each of the photos `names`, however often the source repeats them."""
    return rows_of(examples, [examples.names.index(name) for name in names])


def rows_of(examples: Examples, rows: Sequence[int]) -> Examples:
    """The examples with the numbers `rows`, and all notes."""
    arrays = {
        name: value[np.asarray(rows, int)]
        for name, value in zip(examples._fields, examples, strict=True)
        if isinstance(value, np.ndarray)
    }
    texts = {name: tuple(getattr(examples, name)[row] for row in rows) for name in ("captions", "names")}
    return examples._replace(**arrays, **texts)
