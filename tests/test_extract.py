"""Adapters of a full fine-tuning: exact where the differences are of low rank, the best approximation elsewhere."""

import jax.numpy as jnp
import numpy as np
import pytest

from dreambooth_jax.adapters.extract import differences, low_rank
from dreambooth_jax.adapters.factors import add


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_only_what_changed_is_a_difference():
    base = {"a.kernel": normal(4, 3), "a.bias": normal(3), "b.kernel": normal(3, 4)}
    tuned = base | {"a.kernel": base["a.kernel"] + 1, "a.bias": base["a.bias"] - 2}
    found = differences(base, tuned)
    assert found.keys() == {"a.diff.kernel", "a.diff.bias"}
    np.testing.assert_allclose(found["a.diff.kernel"], 1, rtol=1e-5)
    np.testing.assert_allclose(found["a.diff.bias"], -2, rtol=1e-5)


def test_differences_lead_from_the_base_to_the_tuned_model():
    """Parameters of every kind, those without a kernel too; at weight 0.5 half of the way."""
    shapes = {"a.kernel": (4, 3), "a.bias": (3,), "norm.scale": (3,), "norm.bias": (3,), "words.embedding": (5, 4)}
    base, tuned = ({name: jnp.asarray(normal(*shape, seed=s)) for name, shape in shapes.items()} for s in (0, 1))
    for weight in (1.0, 0.5):
        reached = add(base, differences(base, tuned), weight)
        assert reached.keys() == base.keys()
        for name, value in reached.items():
            np.testing.assert_allclose(value, (1 - weight) * base[name] + weight * tuned[name], atol=1e-6)


@pytest.mark.parametrize("window", [(), (3, 3)])
def test_a_difference_of_low_rank_is_found_exactly(window):
    change = normal(*window, 20, 2) @ normal(2, 30, seed=1)
    factors, error = low_rank({"m.diff.kernel": change}, 2)
    assert {name: x.shape for name, x in factors.items()} == {
        "m.lora_A.kernel": (*window, 20, 2),
        "m.lora_B.kernel": (2, 30),
    }
    assert error < 1e-5
    base = {"m.kernel": normal(*window, 20, 30, seed=2)}
    np.testing.assert_allclose(add(base, factors)["m.kernel"], base["m.kernel"] + change, atol=1e-4)


def test_elsewhere_the_error_is_that_of_the_best_approximation():
    """By the full decomposition (Eckart and Young), of slowly falling singular values; factors share the scale."""
    left, right = (np.linalg.qr(normal(60, 60, seed=seed))[0] for seed in (0, 1))
    values = 0.8 ** np.arange(60)
    change = (left * values @ right).astype(np.float32)
    factors, error = low_rank({"m.diff.kernel": change}, 10)
    assert error == pytest.approx(np.sqrt(np.sum(values[10:] ** 2) / np.sum(values**2)), rel=1e-3)
    a, b = factors["m.lora_A.kernel"], factors["m.lora_B.kernel"]
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.sqrt(values[:10]), rtol=1e-2)
    np.testing.assert_allclose(np.linalg.norm(b, axis=1), np.sqrt(values[:10]), rtol=1e-2)


def test_what_has_no_factors_counts_as_error():
    kernel, bias = normal(8, 1) @ normal(1, 6, seed=1), normal(6, seed=2)
    factors, error = low_rank({"m.diff.kernel": kernel, "m.diff.bias": bias}, 1)
    assert factors.keys() == {"m.lora_A.kernel", "m.lora_B.kernel"}
    whole = np.sum(np.square(kernel)) + np.sum(np.square(bias))
    assert error == pytest.approx(np.sqrt(np.sum(np.square(bias)) / whole), rel=1e-4)
    assert low_rank({}, 1) == ({}, 0.0)


def test_no_rank_is_above_the_kernel_s_own():
    factors, error = low_rank({"m.diff.kernel": normal(3, 3, 4, 6)}, 64)
    assert factors["m.lora_A.kernel"].shape == (3, 3, 4, 4) and 0 < error < 1
