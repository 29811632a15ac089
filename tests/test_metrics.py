"""The paper's metrics on features whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
