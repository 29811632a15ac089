"""The metrics of the paper (arXiv 2208.12242, section 4.2), and of sets of pictures, as pure functions of features.

Features are unit vectors unless said otherwise: the class token of a self-supervised ViT (DINO), of CLIP's image tower
(CLIP-I) and of its text tower (CLIP-T).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

Features = Float[Array, "n c"] | Float[np.ndarray, "n c"]
OtherFeatures = Float[Array, "m c"] | Float[np.ndarray, "m c"]
Matrix = Float[Array, "n n"] | Float[np.ndarray, "n n"]


def similarity(ours: Features, theirs: OtherFeatures) -> Float[Array, ""]:
    """The mean cosine of all pairs, in [-1, 1].

    Subject fidelity for `ours` generated and `theirs` real pictures of the subject (DINO and CLIP-I). PRES for `ours`
    generated for the bare class noun: the lower, the better.
    """
    return (jnp.asarray(ours) @ jnp.asarray(theirs).T).mean()


def real_bound(reals: Features) -> Float[Array, ""]:
    """The mean cosine of all pairs of different real pictures: the subject fidelity of the photos themselves.

    Raises:
        ValueError: fewer than two pictures.
    """
    if len(reals) < 2:
        raise ValueError(f"the bound of real pictures needs at least two of them, got {len(reals)}")
    one, other = np.triu_indices(len(reals), k=1)
    return (jnp.asarray(reals)[one] * jnp.asarray(reals)[other]).sum(-1).mean()


def prompt_fidelity(images: Features, texts: Features) -> Float[Array, ""]:
    """CLIP-T: the mean cosine of each picture and its own prompt."""
    return (jnp.asarray(images) * jnp.asarray(texts)).sum(-1).mean()


class Closest(NamedTuple):
    """Of each picture, the largest cosine to a real picture and the number of that one."""

    similarity: Float[np.ndarray, "n"]
    number: Int[np.ndarray, "n"]


def closest(ours: Features, theirs: OtherFeatures) -> Closest:
    """The copy detector: each generated picture's most similar training photo."""
    cosines = np.asarray(ours) @ np.asarray(theirs).T
    return Closest(cosines.max(1), cosines.argmax(1))


def perceptual_distance(
    states: Sequence[Float[Array, "n l c"]], others: Sequence[Float[Array, "n l c"]]
) -> Float[Array, "n"]:
    """How different pictures look: the squared distance of their unit-normalised patch features, averaged over patches
    and layers (LPIPS, arXiv 1801.03924, equation 1, without learnt weights). In [0, 4].

    Args:
        states, others: hidden states of a ViT, one array per layer, without the class token.
    """
    layers = [jnp.square(_unit(a) - _unit(b)).sum(-1).mean(-1) for a, b in zip(states, others, strict=True)]
    return jnp.stack(layers).mean(0)


def diversity(states: Sequence[Float[Array, "n l c"]]) -> Float[Array, ""]:
    """DIV with the weight-free `perceptual_distance`; see `mean_of_pairs`."""
    one, other = np.triu_indices(_several(len(states[0])), k=1)
    return perceptual_distance([s[one] for s in states], [s[other] for s in states]).mean()


def mean_of_pairs(distances: Matrix) -> float:
    """DIV: the mean distance of all pairs among pictures of one prompt; higher is better.

    Raises:
        ValueError: fewer than two pictures.
    """
    return float(np.asarray(distances)[np.triu_indices(_several(len(distances)), k=1)].mean())


def _several(count: int) -> int:
    if count < 2:
        raise ValueError(f"diversity needs at least two pictures of a prompt, got {count}")
    return count


def precision_recall(real: OtherFeatures, ours: Features, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991, equations 1 and 2), in [0, 1].

    Precision: the share of our pictures within the manifold of real ones, the union of the balls that reach from each
    to its k-th nearest neighbour. Recall: the share of real pictures within the manifold of ours.

    Args:
        real, ours: features, not normalised; as many of one as of the other where the two values are compared.
        k: number of the neighbour; the picture itself does not count.

    Raises:
        ValueError: a set of no more than k pictures.
    """
    if min(len(real), len(ours)) <= k:
        raise ValueError(f"precision and recall need more than k = {k} pictures of both, got {len(real)}, {len(ours)}")
    real, ours = np.asarray(real, np.float64), np.asarray(ours, np.float64)
    between = _squared_distances(ours, real)
    precision = (between <= _radii(real, k)).any(1).mean()
    recall = (_radii(ours, k) >= between.T).any(1).mean()
    return float(precision), float(recall)


def _radii(features: np.ndarray, k: int) -> np.ndarray:
    """Of each point, the squared distance to its k-th nearest neighbour."""
    return np.sort(_squared_distances(features, features), axis=1)[:, k]  # column 0 is the point itself


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    if a is b:
        np.fill_diagonal(squares, 0)
    return np.maximum(squares, 0)


def kid(real: OtherFeatures, ours: Features) -> float:
    """The kernel inception distance (arXiv 1801.01401, section 4): the unbiased estimate of the squared maximum mean
    discrepancy with the kernel (x . y / c + 1)^3, over all pictures. Below 0 for sets closer than chance.

    Args:
        real, ours: features, not normalised.

    Raises:
        ValueError: fewer than two pictures of either.
    """
    if min(len(real), len(ours)) < 2:
        raise ValueError(f"KID needs at least two pictures of both, got {len(real)}, {len(ours)}")
    real, ours = np.asarray(real, np.float64), np.asarray(ours, np.float64)

    def within(x: np.ndarray) -> float:
        kernel = _kernel(x, x)
        return (kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1))

    return float(within(real) + within(ours) - 2 * _kernel(real, ours).mean())


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def sharpness(images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n"]:
    """The variance of the Laplacian of each picture's luma (Rec. 601), grey levels 0 to 255, without the border."""
    luma = images.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    middle = luma[:, 1:-1, 1:-1]
    laplacian = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4 * middle
    return laplacian.var((1, 2))


class Interval(NamedTuple):
    """A mean and the ends of its 95 % bootstrap interval; without an interval both ends are the mean."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float] | Float[np.ndarray, "n"], *, draws: int = 10_000, seed: int = 0) -> Interval:
    """The mean of values and its 95 % percentile bootstrap interval (Efron); one value has no interval.

    Args:
        values: one per independent unit: per subject, or per prompt of a single subject.
    """
    sample = np.asarray(values, np.float64)
    picks = np.random.default_rng(seed).integers(len(sample), size=(draws, len(sample)))
    low, high = np.quantile(sample[picks].mean(1), (0.025, 0.975))
    return Interval(float(sample.mean()), float(low), float(high))


def _unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
