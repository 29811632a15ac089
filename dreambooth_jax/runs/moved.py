"""Whether what is said to train does: weights that an update leaves as they were train in name only."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from dreambooth_jax.adapters.inversion import is_row
from dreambooth_jax.models.params import Params

NEW_TOKENS = " (new tokens)"
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


class NothingMoved(ValueError):
    """A part of the model that should train has not changed."""


@jax.jit
def _sums(parts: dict[str, list[Array]]) -> dict[str, UInt32[Array, ""]]:
    """Sum of the bits of all numbers of a part, modulo 2^32: any update changes it."""
    return {name: sum((_sum(x) for x in values), jnp.uint32(0)) for name, values in parts.items()}


def _sum(x: Array) -> UInt32[Array, ""]:
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])
    return bits.astype(jnp.uint32).sum(dtype=jnp.uint32)


def checksums(trainable: Params) -> dict[str, int]:
    """Part of the model, or its new tokens -> a checksum of the trainable parameters."""
    parts: dict[str, list[Array]] = {}
    for name, value in trainable.items():
        part = name.partition(".")[0]
        parts.setdefault(f"{part}{NEW_TOKENS}" if is_row(name) else part, []).append(value)
    return {name: int(value) for name, value in _sums(parts).items()}


def check_moved(before: dict[str, int], after: dict[str, int], steps: int) -> str:
    """Compares checksums of before and after some steps at a learning rate above 0.

    Checked per part, not per tensor: LoRA's first factor has no gradient at the first step, and embeddings of absent
    tokens never have one.

    Returns:
        The parts that changed, for a person.

    Raises:
        NothingMoved: naming the parts that did not.
    """
    still = [name for name in before if before[name] == after[name]]
    if still:
        raise NothingMoved(
            f"{', '.join(still)} should train and did not change in {steps} steps: the learning rate is too small for "
            "its numbers (learning_rate, text_encoder_multiplier), or no gradient reaches it. Raise the rate, or leave "
            "it out (train_text_encoder=False)."
        )
    return f"trained: {', '.join(before)} changed in the first {steps} steps"
