"""Adam with a second moment in bfloat16: unbiased rounding, decay, and the float32 optimizer's updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.diffusion.adam import round_at_random, scale_by_adam


def test_rounding_takes_a_neighbour_and_has_the_right_mean():
    x = jnp.abs(jax.random.normal(jax.random.key(0), (64, 32))) * 1e-6
    steps = jnp.arange(4096)
    rounded = jax.vmap(lambda step: round_at_random(x, step, 3))(steps).astype(jnp.float32)
    below = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0xFFFF0000), jnp.float32
    )
    spacing = rounded.max(0) - below
    assert ((rounded == below) | (rounded == below + spacing)).all()
    assert (spacing <= x * 2.0**-7).all()
    share = (rounded > below).mean(0) - (x - below) / spacing
    assert jnp.abs(share).max() < 5 * 0.5 / 64  # five deviations of a mean of 4,096 draws
    assert jnp.abs(share.mean()) < 5 * 0.5 / 64 / np.sqrt(x.size)


def test_elements_tensors_and_steps_are_rounded_independently():
    x = jnp.full((128, 128), 1 + 2.0**-8)  # half way between two numbers
    up = [(round_at_random(x, jnp.int32(step), number) > 1).ravel() for step, number in ((1, 0), (1, 1), (2, 0))]
    for one in up:
        assert abs(one.mean() - 0.5) < 0.02
        assert abs((one[1:] == one[:-1]).mean() - 0.5) < 0.02 and abs((one[128:] == one[:-128]).mean() - 0.5) < 0.02
    assert all(abs((up[a] == up[b]).mean() - 0.5) < 0.02 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_devices_round_alike():
    mesh = make_mesh(2, 4)
    x = jnp.abs(jax.random.normal(jax.random.key(1), (16, 8, 3)))
    divided = jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec("fsdp", None, None)))
    one, eight = (jax.jit(round_at_random, static_argnums=2)(value, jnp.int32(5), 2) for value in (x, divided))
    np.testing.assert_array_equal(one, eight)


def test_the_second_moment_falls_where_gradients_end():
    """To the nearest number it would stay: .999 of a number is nearest to itself."""
    optimizer = scale_by_adam(0.9, 0.999, 1e-8, jnp.bfloat16)
    params = {"w": jnp.ones((64, 64))}
    state = optimizer.init(params)._replace(nu={"w": jnp.ones((64, 64), jnp.bfloat16)})
    zero = jax.tree.map(jnp.zeros_like, params)
    state = jax.lax.fori_loop(0, 1000, lambda _, state: optimizer.update(zero, state)[1], state)
    moment = state.nu["w"]
    np.testing.assert_allclose(moment.astype(jnp.float32).mean(), 0.999**1000, rtol=0.01)


def test_updates_are_those_of_float32_but_for_rounding():
    """300 roundings of a moment by up to 2^-8 add up to some percent of it, and to nothing in the mean."""
    ours, theirs = scale_by_adam(0.9, 0.999, 1e-8, jnp.float32), optax.scale_by_adam(0.9, 0.999, 1e-8)
    params = {"a": jnp.zeros((64, 32)), "b": jnp.zeros((7,))}

    def follow(states, step):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), 2)
        grads = {name: jax.random.normal(key, x.shape) for (name, x), key in zip(params.items(), keys, strict=True)}
        (one, states_one), (other, states_other) = ours.update(grads, states[0]), theirs.update(grads, states[1])
        return (states_one, states_other), (one, other)

    states, (one, other) = jax.lax.scan(follow, (ours.init(params), theirs.init(params)), jnp.arange(300))
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1]) and states[0].nu["a"].dtype == jnp.bfloat16
    np.testing.assert_allclose(one["b"][0], other["b"][0], rtol=1e-5)  # nothing is rounded before the first update
    ratio = one["a"][-1] / other["a"][-1]
    assert abs(ratio.mean() - 1) < 0.002 and ratio.std() < 0.02
