"""Attention by blocks, as the CPU computes it, beside XLA's plain one."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from dreambooth_jax.devices import chips, tpu
from dreambooth_jax.devices.sharding import batch_sharding, make_mesh
from dreambooth_jax.devices.workarounds import WORKAROUNDS, applies
from dreambooth_jax.ops.attention import BLOCK, attention, blockwise_attention


def qkv(queries, keys, dtype=jnp.float32, batch=2):
    return [
        jax.random.normal(jax.random.key(seed), (batch, length, 3, 16)).astype(dtype)
        for seed, length in enumerate((queries, keys, keys))
    ]


def loss(attend):
    return lambda *qkv: jnp.sin(attend(*qkv).astype(jnp.float32)).sum()


@pytest.mark.parametrize(("queries", "keys"), [(256, 256), (2 * BLOCK, 77), (BLOCK + 88, BLOCK + 88), (1, 5)])
def test_value_and_gradients_are_those_of_plain_attention(queries, keys):
    inputs = qkv(queries, keys)
    plain = jax.nn.dot_product_attention
    np.testing.assert_allclose(jax.jit(blockwise_attention)(*inputs), plain(*inputs), atol=1e-5)
    ours, expected = (jax.jit(jax.grad(loss(attend), (0, 1, 2)))(*inputs) for attend in (blockwise_attention, plain))
    for found, gradient in zip(ours, expected, strict=True):
        np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "wrap", [jax.checkpoint, lambda attend: lambda *qkv: jax.vmap(attend)(*(x[None] for x in qkv))[0]]
)
def test_recomputing_and_mapping_change_nothing(wrap):
    inputs = qkv(256, 128)
    plain, wrapped = (jax.jit(jax.grad(loss(attend), (0, 1, 2)))(*inputs) for attend in (attention, wrap(attention)))
    for found, expected in zip(wrapped, plain, strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


def test_scores_beyond_the_range_of_exp_stay_finite():
    query, key, value = qkv(256, 256)
    found, expected = (jax.jit(attend)(1e3 * query, key, value) for attend in (attention, jax.nn.dot_product_attention))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_low_precision_is_computed_in_float32():
    inputs = qkv(256, 256, jnp.bfloat16)
    out = jax.jit(blockwise_attention)(*inputs)
    exact = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in inputs))
    assert out.dtype == jnp.bfloat16
    # Half a unit in the last of bfloat16's 8 bits, and the rounding of the scaled queries.
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=2**-8 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize("lengths", [(1, 78), (7, 1), (1, 1)])
def test_one_query_or_one_key_in_low_precision(lengths):
    """As where IF's texts are pooled; XLA's own attention does not compile in every release."""
    inputs = qkv(*lengths, jnp.bfloat16)
    gradients = lambda attend: jax.jit(jax.grad(loss(attend), (0, 1, 2)))  # noqa: E731
    exact = gradients(attention)(*(x.astype(jnp.float32) for x in inputs))
    for found, expected in zip(gradients(attention)(*inputs), exact, strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=2**-6 * float(jnp.abs(expected).max() + 1))
    (row,) = (row for row in WORKAROUNDS if row.name == "products without a sum")
    with pytest.raises(jax.errors.JaxRuntimeError, match="not implemented") if applies(row) else nullcontext():
        gradients(jax.nn.dot_product_attention)(*inputs)


def test_large_scores_are_never_held():
    shapes = [jax.ShapeDtypeStruct((2, 4096, 8, 40), jnp.float32)] * 3
    compiled = jax.jit(jax.grad(loss(attention), (0, 1, 2))).lower(*shapes).compile()
    scores = 2 * 8 * 4096 * 4096 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 10


def test_one_wide_head_of_a_large_picture_takes_little_of_a_tpu():
    """The autoencoder's at 1024 x 1024 pixels: its scores are 1 GiB."""
    place = SingleDeviceSharding(tpu.devices_of("v5e:1x1")[0])
    shapes = [jax.ShapeDtypeStruct((1, 128 * 128, 1, 512), jnp.float32, sharding=place)] * 3
    cost = tpu.compile_for(chips.CHIPS["v5e"], jax.jit(attention).lower(*shapes), quick=True)
    assert cost.temporaries < 2**28


def test_devices_exchange_nothing():
    mesh = make_mesh()
    inputs = [jax.device_put(x, batch_sharding(mesh, len(x))) for x in qkv(256, 256, batch=2 * mesh.size)]
    assert mesh.size > 1
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss(attention), (0, 1, 2))).lower(*inputs).compile()
    text = compiled.as_text()
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    for found, expected in zip(compiled(*inputs), jax.grad(loss(attention), (0, 1, 2))(*inputs), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
