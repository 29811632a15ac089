"""Sums over pixels, and broadcasts with such gradients: values of numpy and JAX, and what each platform computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny_unet import normal

from dreambooth_jax.ops.channels import repeat_channels, row_sums, spread


@pytest.mark.parametrize(("shape", "kept"), [((7, 5), 0), ((2, 3, 4, 5), 0), ((2, 3, 4, 5), 1), ((2, 5), 1)])
def test_sums(shape, kept):
    x = normal(0, *shape)
    np.testing.assert_allclose(row_sums(x, kept), np.sum(x, tuple(range(kept, len(shape) - 1))), rtol=1e-5, atol=1e-6)


def test_sums_of_low_precision_are_taken_in_float32():
    ones = jnp.ones((1000, 3), jnp.bfloat16)
    sums = row_sums(ones)
    assert sums.dtype == jnp.bfloat16
    np.testing.assert_array_equal(sums, jnp.full(3, 1000, jnp.bfloat16))


@pytest.mark.parametrize("of", [(5,), (2, 5), (2, 3, 4, 5)])
def test_a_broadcast_and_its_gradient_are_those_of_jax(of):
    x, weight = normal(0, *of), normal(1, 2, 3, 4, 5)
    expanded = lambda x: x.reshape(*of[:-1], *[1] * (4 - len(of)), 5)  # noqa: E731
    ours = jax.vjp(lambda x: spread(x, weight.shape), x)
    theirs = jax.vjp(lambda x: jnp.broadcast_to(expanded(x), weight.shape), x)
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_allclose(ours[1](weight)[0], theirs[1](weight)[0], rtol=1e-5, atol=1e-6)


def test_a_broadcast_of_each_lane():
    x, weight = normal(0, 6, 5), normal(1, 6, 3, 4, 5)
    gradient = lambda x, weight: jax.vjp(lambda x: spread(x, weight.shape), x)[1](weight)[0]  # noqa: E731
    np.testing.assert_allclose(jax.vmap(gradient)(x, weight), weight.sum((1, 2)), rtol=1e-5, atol=1e-6)


def test_repetition():
    x = normal(0, 2, 3)
    np.testing.assert_array_equal(repeat_channels(x, 4), np.repeat(x, 4, 1))


def test_products_take_the_place_of_sums_and_repetition_on_cpu_alone():
    lowered = jax.jit(lambda x: repeat_channels(row_sums(x, 1), 2)).trace(normal(0, 2, 3, 4, 5))
    products = {platform: lowered.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu")}
    assert {platform: text.count("dot_general") for platform, text in products.items()} == {"cpu": 2, "tpu": 0}
