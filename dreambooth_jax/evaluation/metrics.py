"""The metrics of the paper (arXiv 2208.12242, section 4.2), as pure functions of features.

Features are unit vectors: the class token of a self-supervised ViT (DINO) or of CLIP's image tower (CLIP-I), and of
CLIP's text tower (CLIP-T).
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


def similarity(ours: Float[Array, "n c"], theirs: Float[Array, "m c"]) -> Float[Array, ""]:
    """The mean cosine of all pairs, in [-1, 1].

    Subject fidelity where `ours` are generated and `theirs` real pictures of the subject (DINO and CLIP-I). PRES where
    `ours` are pictures generated for the bare class noun: how far the subject has taken the class over; the lower, the
    better.
    """
    return (ours @ theirs.T).mean()


def prompt_fidelity(images: Float[Array, "n c"], texts: Float[Array, "n c"]) -> Float[Array, ""]:
    """CLIP-T: the mean cosine of each picture and its own prompt."""
    return (images * texts).sum(-1).mean()


def perceptual_distance(
    states: Sequence[Float[Array, "n l c"]], others: Sequence[Float[Array, "n l c"]]
) -> Float[Array, "n"]:
    """How different pictures look: the squared distance of their unit-normalised patch features, averaged over patches
    and layers (LPIPS, arXiv 1801.03924, equation 1, without learnt weights). In [0, 4].

    Args:
        states, others: hidden states of a ViT, one array per layer, without the class token.
    """
    layers = [jnp.square(_unit(a) - _unit(b)).sum(-1).mean(-1) for a, b in zip(states, others, strict=True)]
    return sum(layers) / len(layers)


def diversity(states: Sequence[Float[Array, "n l c"]]) -> Float[Array, ""]:
    """DIV: the mean perceptual distance of all pairs among pictures of one prompt; higher is better.

    Raises:
        ValueError: fewer than two pictures.
    """
    count = len(states[0])
    if count < 2:
        raise ValueError(f"diversity needs at least two pictures of a prompt, got {count}")
    one, other = jnp.triu_indices(count, k=1)
    return perceptual_distance([s[one] for s in states], [s[other] for s in states]).mean()


def _unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
