"""The paper's metrics on features whose answers are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from dreambooth_jax.evaluation import metrics


def unit(key, *shape):
    x = jax.random.normal(jax.random.key(key), shape)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def test_similarity_is_the_mean_cosine_of_all_pairs():
    ours, theirs = unit(0, 5, 8), unit(1, 3, 8)
    assert metrics.similarity(ours, theirs) == pytest.approx(1 - cdist(ours, theirs, "cosine").mean(), abs=1e-6)
    assert metrics.similarity(ours[:1], ours[:1]) == pytest.approx(1, abs=1e-6)


def test_prompt_fidelity_pairs_each_picture_with_its_own_prompt():
    texts = unit(0, 6, 8)
    assert metrics.prompt_fidelity(texts, texts) == pytest.approx(1, abs=1e-6)
    assert metrics.prompt_fidelity(texts, -texts) == pytest.approx(-1, abs=1e-6)
    assert metrics.prompt_fidelity(texts, jnp.roll(texts, 1, 0)) < 0.9


def test_diversity_is_zero_for_copies_and_grows_with_difference():
    states = [jnp.tile(unit(i, 1, 4, 8), (3, 1, 1)) for i in range(2)]
    assert metrics.diversity(states) == pytest.approx(0, abs=1e-7)
    near = [s + 0.1 * jax.random.normal(jax.random.key(9), s.shape) for s in states]
    far = [s + 1.0 * jax.random.normal(jax.random.key(9), s.shape) for s in states]
    assert 0 < metrics.diversity(near) < metrics.diversity(far)


def test_diversity_counts_each_pair_once():
    # Two like pictures and their opposite: of three pairs, two are 4 apart (the squared distance of -1 and 1).
    states = [jnp.asarray([1.0, 1.0, -1.0]).reshape(3, 1, 1)]
    np.testing.assert_allclose(metrics.diversity(states), 8 / 3, rtol=1e-6)


def test_distance_ignores_the_length_of_features():
    one, other = [unit(0, 2, 4, 8)], [unit(1, 2, 4, 8)]
    scaled = [one[0] * 7]
    np.testing.assert_allclose(
        metrics.perceptual_distance(one, other), metrics.perceptual_distance(scaled, other), rtol=1e-5
    )


def test_one_picture_has_no_diversity():
    with pytest.raises(ValueError, match="at least two pictures"):
        metrics.diversity([unit(0, 1, 4, 8)])


def test_the_bound_of_real_pictures_leaves_out_their_pairs_with_themselves():
    reals = unit(0, 5, 8)
    cosines = 1 - cdist(reals, reals, "cosine")
    assert metrics.real_bound(reals) == pytest.approx((cosines.sum() - 5) / 20, abs=1e-6)
    with pytest.raises(ValueError, match="at least two"):
        metrics.real_bound(reals[:1])


def test_a_copy_is_found_with_its_photo():
    photos = np.asarray(unit(0, 4, 8))
    ours = np.stack([photos[2], -photos[1]])
    found = metrics.closest(ours, photos)
    assert found.similarity[0] == pytest.approx(1, abs=1e-6) and found.number[0] == 2
    assert found.similarity[1] < 0.9 and found.number[1] != 1


def of_balls(points, centres, k=3):
    """The share of points within a ball around a centre that reaches to its k-th neighbour."""
    tree = cKDTree(centres)
    radii = tree.query(centres, k + 1)[0][:, k]
    near = [np.flatnonzero(np.linalg.norm(centres - p, axis=1) <= radii) for p in points]
    return np.mean([len(n) > 0 for n in near])


def test_precision_and_recall_are_shares_within_the_others_manifold():
    rng = np.random.default_rng(0)
    real, ours = rng.normal(size=(60, 5)), rng.normal(size=(50, 5)) * 0.6 + 0.7
    precision, recall = metrics.precision_recall(real, ours)
    assert precision == pytest.approx(of_balls(ours, real)) and recall == pytest.approx(of_balls(real, ours))
    assert 0.1 < recall < precision < 1
    assert metrics.precision_recall(real, real) == (1, 1)
    assert metrics.precision_recall(real, ours + 100) == (0, 0)
    collapsed = real[:1] + 1e-3 * rng.normal(size=(50, 5))
    assert metrics.precision_recall(real, collapsed)[0] == 1 and metrics.precision_recall(real, collapsed)[1] < 0.1
    with pytest.raises(ValueError, match="more than k = 3"):
        metrics.precision_recall(real[:3], ours)


def test_kid_is_the_unbiased_discrepancy():
    rng = np.random.default_rng(1)
    real, ours = rng.normal(size=(7, 4)), rng.normal(size=(5, 4)) + 0.5
    kernel = lambda a, b: (np.dot(a, b) / 4 + 1) ** 3  # noqa: E731
    same = [np.mean([kernel(a, b) for a, b in itertools.permutations(x, 2)]) for x in (real, ours)]
    across = np.mean([kernel(a, b) for a, b in itertools.product(real, ours)])
    assert metrics.kid(real, ours) == pytest.approx(sum(same) - 2 * across, rel=1e-9)
    many = rng.normal(size=(2, 400, 4))
    assert abs(metrics.kid(*many)) < 0.1 < metrics.kid(many[0], many[1] + 1)


def test_sharpness_is_the_variance_of_the_laplacian():
    images = np.random.default_rng(0).integers(0, 256, (2, 12, 9, 3), dtype=np.uint8)
    luma = [np.asarray(image, np.float64) @ [0.299, 0.587, 0.114] for image in images]
    wanted = [scipy.ndimage.laplace(grey)[1:-1, 1:-1].var() for grey in luma]
    np.testing.assert_allclose(metrics.sharpness(images), wanted, rtol=1e-9)


def test_intervals_are_percentile_bootstraps():
    values = np.random.default_rng(0).normal(size=12)
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1)
    ours = metrics.bootstrap(values)
    assert ours.mean == pytest.approx(values.mean())
    np.testing.assert_allclose([ours.low, ours.high], theirs.confidence_interval, atol=0.02)
    assert metrics.bootstrap([0.5]) == (0.5, 0.5, 0.5)
