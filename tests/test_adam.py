"""Adam with moments in 16 or 8 bits: decay, the float32 optimizer's updates, memory, resumption, devices and lanes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dreambooth_jax.devices.sharding import make_mesh, state_shardings
from dreambooth_jax.diffusion.adam import largest_magnitudes, scale_by_adam
from dreambooth_jax.diffusion.optimizer import make_optimizer
from dreambooth_jax.diffusion.rounding import EightBits, from_eight_bits, in_eight_bits
from dreambooth_jax.diffusion.step import apply_gradients, init_state
from dreambooth_jax.runs import checkpoint

SMALL = [("float32", "bfloat16"), ("float32", "int8"), ("int8", "float32"), ("int8", "bfloat16"), ("int8", "int8")]
PARAMS = {"a.kernel": jnp.zeros((64, 32)), "c.kernel": jnp.zeros((3, 3, 8, 16)), "b.bias": jnp.zeros(7)}


def gradients(step, params=PARAMS):
    """Of very different size per row and tensor."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), len(params))
    found = {name: jax.random.normal(key, x.shape) for (name, x), key in zip(params.items(), keys, strict=True)}
    rows = 10.0 ** -(jnp.arange(64) % 4)
    return found | {"a.kernel": 1e-3 * rows[:, None] * found["a.kernel"]}


def ones_as(dtype):
    if dtype == "bfloat16":
        return jnp.ones((64, 64), jnp.bfloat16)
    return in_eight_bits(jnp.ones((64, 64)), jnp.float32(1), jnp.zeros((64, 64), jnp.uint32), jnp.uint8)


def value_of(moment):
    return from_eight_bits(moment) if isinstance(moment, EightBits) else moment.astype(jnp.float32)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.01), ("int8", 0.03)])
def test_the_second_moment_falls_where_gradients_end(dtype, tolerance):
    """To the nearest number it would stay: .999 of a number is nearest to itself."""
    optimizer = scale_by_adam(0.9, 0.999, 1e-8, jnp.float32, dtype)
    params = {"w": jnp.ones((64, 64))}
    state = optimizer.init(params)._replace(nu={"w": ones_as(dtype)})
    zero = jax.tree.map(jnp.zeros_like, params)
    state = jax.lax.fori_loop(0, 1000, lambda _, state: optimizer.update(zero, state)[1], state)
    moment = value_of(state.nu["w"])
    np.testing.assert_allclose(moment.mean(), 0.999**1000, rtol=tolerance)
    assert (moment > 0).all()


@pytest.mark.parametrize("dtypes", SMALL)
def test_updates_are_those_of_float32_but_for_rounding(dtypes):
    """Roundings of v by up to 2^-8, or 2^-3, are forgotten after a thousand steps: some percent of it, or some tens,
    and nothing in the mean. Rows whose gradients are a thousand times smaller are as exact."""
    ours, theirs = scale_by_adam(0.9, 0.999, 1e-8, *dtypes), optax.scale_by_adam(0.9, 0.999, 1e-8)

    def follow(states, step):
        grads = gradients(step)
        (one, states_one), (other, states_other) = ours.update(grads, states[0]), theirs.update(grads, states[1])
        return (states_one, states_other), (one, other)

    _, (one, other) = jax.lax.scan(follow, (ours.init(PARAMS), theirs.init(PARAMS)), jnp.arange(600))
    np.testing.assert_allclose(one["b.bias"][0], other["b.bias"][0], rtol=1e-5)  # the first is made before rounding
    error = {}
    for name in ("a.kernel", "c.kernel"):
        apart = one[name][-200:] - other[name][-200:]
        error[name] = float(jnp.sqrt(jnp.mean(apart**2) / jnp.mean(other[name][-200:] ** 2)))
        slope = jnp.sum(one[name][-200:] * other[name][-200:]) / jnp.sum(other[name][-200:] ** 2)
        assert abs(slope - 1) < 0.02, (name, slope)
    limit = 0.15 if "int8" in dtypes else 0.03
    assert max(error.values()) < limit, error
    if "int8" in dtypes:
        np.testing.assert_allclose(one["b.bias"], other["b.bias"], rtol=0.05)  # vectors stay in float32
    rows = jnp.sqrt(jnp.mean((one["a.kernel"][-200:] - other["a.kernel"][-200:]) ** 2, (0, 2)))
    assert rows.max() < 1.5 * limit


def test_two_bytes_for_a_parameter():
    params = {"a.kernel": jnp.zeros((64, 32)), "c.kernel": jnp.zeros((3, 3, 32, 64)), "b.bias": jnp.zeros(64)}
    optimizer = make_optimizer("adamw", lambda count: 1e-3, moment_dtype="int8", second_moment_dtype="int8")
    held = sum(x.nbytes for x in jax.tree.leaves(optimizer.init(params)))
    assert held < 2.05 * sum(x.size for x in params.values())


def trained(optimizer, state, steps, params=PARAMS):
    def step(state, number):
        grads = gradients(number, params)
        return apply_gradients(optimizer, state, grads, optax.tree.norm(grads), largest_magnitudes(grads), None), None

    return jax.jit(lambda state: jax.lax.scan(step, state, jnp.asarray(steps))[0])(state)


OPTIONS = {
    "adamw": {"moment_dtype": "int8", "second_moment_dtype": "int8"},
    "muon": {},  # a bfloat16 momentum may fall to another side of a rounding
}


def optimizer_of(name, mesh=None):
    return make_optimizer(name, optax.constant_schedule(1e-2), mesh=mesh, **OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_is_the_run(name, tmp_path):
    optimizer = optimizer_of(name)
    start = init_state(PARAMS, optimizer)
    half = trained(optimizer, start, range(5))
    manager = checkpoint.open_checkpoints(tmp_path)
    checkpoint.save(manager, 5, half)
    manager.wait_until_finished()
    found = checkpoint.restore(manager, half)
    manager.close()
    resumed, whole = trained(optimizer, found, range(5, 9)), trained(optimizer, half, range(5, 9))
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert any(np.abs(resumed.trainable[n] - half.trainable[n]).max() > 1e-3 for n in PARAMS)


@pytest.mark.parametrize("name", OPTIONS)
def test_eight_devices_and_one_train_alike(name):
    mesh = make_mesh(2, 4)
    alone, shared = optimizer_of(name), optimizer_of(name, mesh)
    state = init_state(PARAMS, alone)
    places = state_shardings(mesh, PARAMS, jax.eval_shape(lambda: init_state(PARAMS, shared)))
    on_all = jax.device_put(init_state(PARAMS, shared), places)
    if name == "adamw":
        codes = on_all.opt_state[1][0].mu["a.kernel"].codes
        assert {shard.data.shape for shard in codes.addressable_shards} == {(16, 32)}
    one, eight = (trained(*pair, range(6)).trainable for pair in ((alone, state), (shared, on_all)))
    for n in PARAMS:
        np.testing.assert_allclose(one[n], eight[n], atol=1e-6, rtol=1e-4, err_msg=n)


@pytest.mark.parametrize("name", OPTIONS)
def test_mapped_lanes_train_as_each_alone(name):
    optimizer = optimizer_of(name)
    starts = [init_state(jax.tree.map(lambda x, c=c: x + c, PARAMS), optimizer) for c in (0.0, 0.1)]
    states = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    mapped = jax.vmap(lambda state: trained(optimizer, state, range(4)))(states)
    for number, start in enumerate(starts):
        own = trained(optimizer, start, range(4))
        for n in PARAMS:
            np.testing.assert_allclose(mapped.trainable[n][number], own.trainable[n], atol=1e-6, rtol=1e-4, err_msg=n)


def test_bounds_hold_and_peaks_may_be_known_before():
    """Also where the gradient was scaled down after they were found, and grows a million times."""
    optimizer = scale_by_adam(0.9, 0.999, 1e-8, "int8", "int8", 0.01)
    known, found = optimizer.init(PARAMS), optimizer.init(PARAMS)
    for step in range(12):
        grads = jax.tree.map(lambda g, step=step: g * 10.0 ** (step - 6), gradients(step))
        norm = optax.tree.norm(grads)
        clipped = jax.tree.map(lambda g, norm=norm: g * 0.01 / jnp.maximum(norm, 0.01), grads)
        one, known = optimizer.update(clipped, known, grad_norm=norm, grad_peaks=largest_magnitudes(grads))
        other, found = optimizer.update(clipped, found)
        for name in PARAMS:
            np.testing.assert_allclose(one[name], other[name], rtol=0.2, atol=0.05)
        for state in (known, found):
            for moment in (state.mu["a.kernel"], state.nu["a.kernel"]):
                assert jnp.abs(from_eight_bits(moment)).max() <= 1.13 * moment.bound
                assert jnp.abs(moment.codes.astype(int)).max() <= (121 if moment.codes.dtype == jnp.int8 else 249)
