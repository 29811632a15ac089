"""Numbers in 16 and 8 bits: neighbours, unbiased, the same on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.diffusion.rounding import EightBits, from_eight_bits, in_bfloat16, in_eight_bits, random_bits

CODES = {"int8": jnp.int8, "uint8": jnp.uint8}


def bits(step, shape, number=0):
    return random_bits(shape, jnp.asarray(step, jnp.int32), number)


def eight(x, step, dtype, bound=None):
    bound = jnp.abs(x).max() if bound is None else jnp.float32(bound)
    return in_eight_bits(x, bound, bits(step, x.shape), dtype)


def numbers(dtype, bound):
    """All numbers that there are for a bound, in order."""
    info = jnp.iinfo(dtype)
    return from_eight_bits(EightBits(jnp.arange(info.min + (dtype == jnp.int8), info.max + 1).astype(dtype), bound))


def test_bfloat16_takes_a_neighbour_and_has_the_right_mean():
    x = jnp.abs(jax.random.normal(jax.random.key(0), (64, 32))) * 1e-6
    rounded = jax.vmap(lambda step: in_bfloat16(x, bits(step, x.shape)))(jnp.arange(4096)).astype(jnp.float32)
    below = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0xFFFF0000), jnp.float32
    )
    spacing = rounded.max(0) - below
    assert ((rounded == below) | (rounded == below + spacing)).all()
    assert (spacing <= x * 2.0**-7).all()
    share = (rounded > below).mean(0) - (x - below) / spacing
    assert jnp.abs(share).max() < 5 * 0.5 / 64  # five deviations of a mean of 4,096 draws
    assert jnp.abs(share.mean()) < 5 * 0.5 / 64 / np.sqrt(x.size)


@pytest.mark.parametrize("dtype", CODES.values(), ids=CODES)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 3e4])
def test_eight_bits_take_a_neighbour_and_have_the_right_mean(dtype, scale):
    """Magnitudes over seven orders, and 0."""
    x = scale * jnp.exp(jax.random.uniform(jax.random.key(0), (48, 32), minval=-16, maxval=0)).at[0].set(0)
    if dtype == jnp.int8:
        x = x * jnp.where(jnp.arange(32) % 2, 1, -1)
    rounded = np.asarray(jax.vmap(lambda step: from_eight_bits(eight(x, step, dtype)))(jnp.arange(4096)))
    grid = np.asarray(numbers(dtype, jnp.abs(x).max()))
    assert (np.diff(grid) > 0).all()
    place = np.clip(np.searchsorted(grid, np.asarray(x), side="right") - 1, 0, grid.size - 2)
    below, above = grid[place], grid[place + 1]
    assert ((rounded == below) | (rounded == above)).all()
    np.testing.assert_array_equal(rounded[:, 0], 0)
    share = (rounded > below).mean(0) - (x - below) / (above - below)
    raised = np.asarray((x > 0) & (below == 0)) if dtype == jnp.uint8 else np.zeros(x.shape, bool)
    assert np.abs(share[~raised]).max() < 5 * 0.5 / 64 and abs(share[~raised].mean()) < 1e-3
    assert (rounded[:, raised] > 0).all()


@pytest.mark.parametrize("dtype", CODES.values(), ids=CODES)
def test_spacing_is_an_eighth_of_the_number_and_the_range_is_wide(dtype):
    grid = np.asarray(numbers(dtype, jnp.float32(1.0)), np.float64)
    grid = grid[grid >= 0]
    assert 1 <= grid[-1] < 4 and grid[0] == 0
    smallest = {"int8": 2.0**-17, "uint8": 2.0**-33}[jnp.dtype(dtype).name]
    np.testing.assert_allclose(grid[1], smallest)
    relative = np.diff(grid)[16:] / grid[16:-1]
    assert relative.max() < 0.17 and relative.min() > 1 / 17


@pytest.mark.parametrize("dtype", CODES.values(), ids=CODES)
def test_numbers_stay_when_the_bound_changes(dtype):
    """Rounding anew in every step would add up: the numbers of one bound are nearly those of twice that."""
    x = jnp.exp(jax.random.uniform(jax.random.key(0), (64, 64), minval=-4, maxval=0))
    held = eight(x, 0, dtype, 1.0)
    once = from_eight_bits(held)
    same = from_eight_bits(eight(once, 1, dtype, 1.3))
    np.testing.assert_array_equal(once, same)
    twice = from_eight_bits(eight(once, 1, dtype, 2.6))
    assert (jnp.abs(once - twice) > once / 20).mean() < (0.05 if dtype == jnp.int8 else 1e-3)


def test_bounds_of_zero_and_large_ones():
    for dtype in CODES.values():
        zero = eight(jnp.zeros((4, 4)), 0, dtype)
        np.testing.assert_array_equal(from_eight_bits(zero), 0)
        large = jnp.full((4, 4), 1e30)
        np.testing.assert_allclose(from_eight_bits(eight(large, 0, dtype)), large, rtol=0.13)


def test_elements_tensors_and_steps_are_rounded_independently():
    up = [(bits(step, (128, 128), number) >> 31).ravel() for step, number in ((1, 0), (1, 1), (2, 0))]
    for one in up:
        assert abs(one.mean() - 0.5) < 0.02
        assert abs((one[1:] == one[:-1]).mean() - 0.5) < 0.02 and abs((one[128:] == one[:-128]).mean() - 0.5) < 0.02
    assert all(abs((up[a] == up[b]).mean() - 0.5) < 0.02 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_devices_round_alike():
    mesh = make_mesh(2, 4)
    x = jnp.abs(jax.random.normal(jax.random.key(1), (16, 8, 3)))
    divided = jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec("fsdp", None, None)))

    @jax.jit
    def both(x, step):
        noise = random_bits(x.shape, step, 2)
        return in_bfloat16(x, noise), in_eight_bits(x, x.max(), noise, jnp.uint8)

    one, eight = (both(value, jnp.int32(5)) for value in (x, divided))
    jax.tree.map(np.testing.assert_array_equal, one, eight)
