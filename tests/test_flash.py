"""The attention kernel for TPUs: its values by interpretation, its memory and placement by the TPU compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from dreambooth_jax.devices import chips, tpu
from dreambooth_jax.devices.sharding import batch_sharding, make_mesh
from dreambooth_jax.ops import flash
from dreambooth_jax.ops.attention import attention

pytestmark = pytest.mark.slow


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def squares(attend):
    return lambda *qkv: jnp.square(attend(*qkv).astype(jnp.float32)).sum()


@pytest.mark.parametrize(("length", "width"), [(1024, 40), (1024, 128), (2048, 40)])
def test_value_and_gradients_are_those_of_plain_attention(length, width):
    qkv = [normal(seed, 2, length, 2, width) for seed in range(3)]

    def kernel(*qkv):
        return flash.flash_attention(*qkv, interpret=True)

    np.testing.assert_allclose(kernel(*qkv), jax.nn.dot_product_attention(*qkv), atol=2e-5)
    ours = jax.grad(squares(kernel), (0, 1, 2))(*qkv)
    for found, expected in zip(ours, jax.grad(squares(jax.nn.dot_product_attention), (0, 1, 2))(*qkv), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("queries", "keys", "width", "pays"),
    [
        (4096, 4096, 40, True),
        (4096, 77, 40, False),
        (256, 256, 40, False),
        (1536, 1536, 40, False),
        (4096, 4096, 512, False),
    ],
)
def test_only_large_scores_of_narrow_heads_go_to_the_kernel(queries, keys, width, pays):
    """The autoencoder's head is 512 wide: tiles of it exceed a TPU's own memory, and its compiler refuses them."""
    shapes = [jax.ShapeDtypeStruct((2, length, 8, width), jnp.bfloat16) for length in (queries, keys)]
    assert flash.worthwhile(*shapes) == pays
    place = SingleDeviceSharding(tpu.devices_of("v5e:1x1")[0])
    query, key = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in shapes)
    cost = tpu.compile_for(chips.CHIPS["v5e"], jax.jit(attention).lower(query, key, key), quick=True)
    assert (cost.kernel_seconds > 0) == pays


@pytest.mark.parametrize(
    ("topology", "shape"),
    [
        ("v4:2x2x1", (8, 4096, 8, 40)),
        ("v4:2x2x1", (2, 9216, 8, 40)),
        ("v4:2x2x1", (8, 1024, 8, 80)),
        ("v5e:1x1", (2, 4096, 8, 40)),
        ("v5e:1x1", (2, 9216, 8, 40)),
        ("v5p:2x2x1", (2, 9216, 8, 40)),
        ("v6e:1x1", (2, 9216, 8, 40)),
    ],
)
def test_every_generation_has_room_for_its_tiles(topology, shape):
    """512 and 768 pixels, few and many images: a chip's own memory holds the tiles of both passes."""
    place = SingleDeviceSharding(tpu.devices_of(topology)[0])
    qkv = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)] * 3
    lowered = jax.jit(jax.grad(squares(attention), (0, 1, 2))).lower(*qkv)
    assert tpu.compile_for(chips.chip_of(topology), lowered, quick=True).kernel_seconds > 0


@pytest.mark.parametrize("devices", [1, 8])
def test_on_tpus_the_scores_are_never_held_and_nothing_is_exchanged(devices):
    mesh = make_mesh(-1, devices // 2 or 1, tpu.devices_of("v5e:2x4")[:devices])
    shape = (2 * devices, 4096, 8, 40)
    qkv = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=batch_sharding(mesh, shape[0]))] * 3
    temporaries = {}
    for name, attend in (("kernel", attention), ("plain", jax.nn.dot_product_attention)):
        with jax.set_mesh(mesh):
            lowered = jax.jit(jax.grad(squares(attend), (0, 1, 2))).lower(*qkv)
        cost = tpu.compile_for(chips.CHIPS["v5e"], lowered)
        assert cost.collectives == {}
        temporaries[name] = cost.temporaries
        if name == "kernel":  # counted by hand: two products forward, five backward, on heads padded to 128
            assert cost.kernel_seconds == pytest.approx(7 * 2 * 2 * 8 * 4096**2 * 128 / 197e12)
        else:
            assert cost.kernel_seconds == 0
    scores = 2 * 8 * 4096 * 4096 * 2  # of one device, in bfloat16
    assert temporaries["kernel"] < scores / 4 < scores < temporaries["plain"]
