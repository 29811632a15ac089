"""Textual inversion (arXiv 2208.01618): the model stays frozen, new rows of the token embeddings are trained.

`combine` appends the rows to the frozen table, so that no other row can change and none has optimizer state. With a
second method beside them this is pivotal tuning (rows and LoRA) or Custom Diffusion (arXiv 2212.04488: rows, keys and
values of cross-attention).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, Key

from dreambooth_jax.adapters.method import Method
from dreambooth_jax.models.params import Params, Shapes, Tensors

ROWS = ".new"
_TABLE = re.compile(r"\.(token_embedding|shared)\.embedding$")
CUSTOM = r"\.attn2\.to_[kv]\.kernel$"  # what Custom Diffusion trains of the UNet

# Captions of a subject and of a style, so that the rows learn neither the wording nor the kind of picture.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": (
        "a photo of {}",
        "a picture of {}",
        "a close photo of {}",
        "a photo of {} from afar",
        "a sharp photo of {}",
        "a blurry photo of {}",
        "a bright photo of {}",
        "a dim photo of {}",
        "a snapshot that shows {}",
        "a cropped picture of {}",
        "one photo of {} alone",
        "a detailed view of {}",
        "a plain picture of {}",
        "an image in which {} is seen",
        "a good photo of {}",
        "{} in a photo",
    ),
    "style": (
        "a painting in the style of {}",
        "a drawing in the style of {}",
        "a picture in the style of {}",
        "an artwork made in the manner of {}",
        "a small painting in the style of {}",
        "a large work in the style of {}",
        "a scene painted in the style of {}",
        "a detail in the style of {}",
        "a dark picture in the style of {}",
        "a bright picture in the style of {}",
        "a sketch in the style of {}",
        "a print in the style of {}",
    ),
}


def inversion(parts: str, count: int, initial: Callable[[], Mapping[str, Sequence[int]]]) -> Method:
    """New rows for every table of token embeddings in the parts.

    Args:
        parts: regex found in the names of the text encoders' parameters.
        count: new rows per table.
        initial: () -> part -> ids of the rows that the new ones start as; called by `start` alone.

    Raises:
        ValueError: from `shapes` and `start`, if the parts have no table of token embeddings.
    """

    def tables(params: Iterable[str]) -> list[str]:
        found = [name for name in params if re.search(parts, name) and _TABLE.search(name)]
        if not found:
            raise ValueError("this base has no table of token embeddings that new tokens could join")
        return found

    def shapes(params: Shapes) -> tuple[Shapes, Shapes]:
        rows = {_rows_of(name): (count, params[name].shape[1]) for name in tables(params)}
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in rows.items()}, dict(params)

    def start(params: Params, key: Key[Array, ""]) -> tuple[Params, Params]:
        ids = initial()
        own = {name: jnp.asarray(ids[name.partition(".")[0]]) for name in tables(params)}
        take = jax.jit(
            lambda tables, own: {_rows_of(name): _repeated(tables[name], own[name], count) for name in tables},
            out_shardings=key.sharding,
        )
        return take({name: params[name] for name in own}, own), params

    def combine(frozen: Params, trainable: Params) -> Params:
        longer = {
            name: jnp.concatenate([frozen[name], trainable[_rows_of(name)].astype(frozen[name].dtype)])
            for name in tables(frozen)
        }
        return frozen | longer

    return Method(
        shapes,
        start,
        combine,
        f"{count} new token{'s' * (count > 1)}",
        adapter=dict,
        decays=lambda name: not is_row(name),
    )


def _rows_of(table: str) -> str:
    return table.removesuffix(".embedding") + ROWS


def _repeated(table: Array, ids: Int[Array, "n"], count: int) -> Array:
    return table[ids[jnp.arange(count) % len(ids)]].astype(jnp.float32)


def is_row(name: str) -> bool:
    """Whether a trainable parameter is the rows of new tokens."""
    return name.endswith(ROWS)


def rows_of(trainable: Tensors) -> dict[str, Array | np.ndarray]:
    """Text part -> rows of its new tokens [n, D]."""
    return {name.partition(".")[0]: value for name, value in trainable.items() if is_row(name)}


def with_rows(params: Params, rows: Tensors) -> Params:
    """`params` with the rows of new tokens, text part -> [n, D], at the end of their tables."""
    tables = {name: rows.get(name.partition(".")[0]) for name in params if _TABLE.search(name)}
    longer = {n: jnp.concatenate([params[n], jnp.asarray(new)]) for n, new in tables.items() if new is not None}
    return params | longer


def widths(shapes: Shapes) -> dict[str, int]:
    """Text part -> width of its token embeddings."""
    return {name.partition(".")[0]: x.shape[1] for name, x in shapes.items() if _TABLE.search(name)}


def both(rows: Method, other: Method) -> Method:
    """New rows beside another method: pivotal tuning with LoRA, Custom Diffusion with full fine-tuning."""

    def divided(trainable: Tensors) -> tuple[dict[str, Array | np.ndarray], dict[str, Array | np.ndarray]]:
        new = {name: value for name, value in trainable.items() if is_row(name)}
        return new, {name: value for name, value in trainable.items() if name not in new}

    def shapes(params: Shapes) -> tuple[Shapes, Shapes]:
        trainable, frozen = other.shapes(params)
        return rows.shapes(params)[0] | trainable, frozen

    def start(params: Params, key: Key[Array, ""]) -> tuple[Params, Params]:
        trainable, frozen = other.start(params, key)
        return rows.start(params, key)[0] | trainable, frozen

    def combine(frozen: Params, trainable: Params) -> Params:
        new, rest = divided(trainable)
        return rows.combine(other.combine(frozen, rest), new)

    def adapter(trainable: Tensors) -> dict[str, Array | np.ndarray]:
        new, rest = divided(trainable)
        return {**new, **other.adapter(rest)}

    return Method(
        shapes,
        start,
        combine,
        f"{rows.says}, {other.says}",
        adapter=adapter if other.adapter else None,
        multiplier=lambda name: 1.0 if is_row(name) else other.multiplier(name),
        decays=lambda name: not is_row(name) and (other.decays is None or other.decays(name)),
    )


def stop_after(step: int, stops: Callable[[str], bool]) -> optax.GradientTransformation:
    """No more updates of the parameters whose name `stops`, from `step` on."""

    def update(updates: Params, count: Array, params: Params | None = None) -> tuple[Params, Array]:
        kept = {n: jnp.where(count < step, u, jnp.zeros_like(u)) if stops(n) else u for n, u in updates.items()}
        return kept, count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
