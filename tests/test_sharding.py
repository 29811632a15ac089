"""Meshes, rules and where everything lives on eight devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from dreambooth_jax.devices import chips, tpu
from dreambooth_jax.devices.sharding import (
    batch_sharding,
    make_mesh,
    param_sharding,
    replicate,
    replicated,
    split_largest,
    state_shardings,
    unshard,
)
from dreambooth_jax.diffusion.optimizer import make_optimizer
from dreambooth_jax.diffusion.step import init_state
from dreambooth_jax.models.params import functional
from dreambooth_jax.models.unet import UNet2DConditionModel, UNetSpec


@pytest.mark.parametrize(("asked", "got"), [((-1, 1), (8, 1)), ((2, -1), (2, 4)), ((4, 2), (4, 2)), ((-1, 8), (1, 8))])
def test_mesh_sizes(asked, got):
    mesh = make_mesh(*asked)
    assert dict(mesh.shape) == {"data": got[0], "fsdp": got[1]}
    assert set(mesh.devices.ravel()) == set(jax.devices())


def test_mesh_of_some_devices():
    assert make_mesh(-1, 1, devices=jax.devices()[:3]).shape["data"] == 3


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ((3, 1), "data=3 x fsdp=1 does not cover 8 devices; each axis must be one of [1, 2, 4, 8], their product 8"),
        ((-1, 3), "data=-1 x fsdp=3 does not cover 8 devices"),
        ((16, -1), "data=16 x fsdp=-1 does not cover 8 devices"),
        ((-1, -1), "give positive sizes, and -1 at most once"),
        ((0, 8), "give positive sizes"),
    ],
)
def test_impossible_meshes(sizes, match):
    with pytest.raises(ValueError, match=re.escape(match)):
        make_mesh(*sizes)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 320, 640), P(None, None, None, "fsdp")),
        ((3, 3, 640, 320), P(None, None, "fsdp")),
        ((64, 64), P(None, "fsdp")),  # of equals the last
        ((49408, 768), P("fsdp")),
        ((1000, 4), P("fsdp")),
        ((7, 24), P(None, "fsdp")),  # the larger axis need not be divisible
        ((9, 7), P()),
        ((), P()),
    ],
)
def test_the_largest_divisible_axis_is_split(shape, spec):
    assert split_largest(shape, 8) == spec
    assert split_largest(shape, 1) == P()


def test_the_first_rule_that_matches_places_a_parameter():
    mesh = make_mesh(2, 4)
    rules = ((r"attn.*kernel$", replicate), (r"kernel$", split_largest), (r".*", replicate))
    assert param_sharding(mesh, "x.attn1.to_q.kernel", (8, 8), rules).spec == P()
    assert param_sharding(mesh, "x.conv.kernel", (8, 8), rules).spec == P(None, "fsdp")
    assert param_sharding(mesh, "x.conv.bias", (8,)).spec == P()
    assert param_sharding(mesh, "x.norm.scale", (8,)).spec == P()
    assert param_sharding(mesh, "x.token_embedding.embedding", (8, 4)).spec == P("fsdp")


def test_stable_diffusion_is_spread_evenly():
    """Its UNet in full size: each of eight devices holds hardly more than an eighth."""
    spec = UNetSpec.from_config({"cross_attention_dim": 768})
    shapes = functional(lambda rngs: UNet2DConditionModel(spec, rngs=rngs)).shapes
    mesh = make_mesh(1, 8)
    held = sum(np.prod(param_sharding(mesh, name, s.shape).shard_shape(s.shape)) for name, s in shapes.items())
    total = sum(np.prod(s.shape) for s in shapes.values())
    assert held < 1.01 * total / 8


@pytest.mark.parametrize(
    ("sizes", "batch", "ways"),
    [((4, 2), 16, 8), ((4, 2), 4, 4), ((4, 2), 6, 2), ((4, 2), 3, 1), ((1, 8), 8, 8), ((8, 1), 2, 1)],
)
def test_batches_are_split_over_as_many_devices_as_divide_them(sizes, batch, ways):
    placed = jax.device_put(np.arange(2 * batch).reshape(batch, 2), batch_sharding(make_mesh(*sizes), batch))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(batch // ways, 2)}
    assert len(placed.sharding.device_set) == 8
    np.testing.assert_array_equal(placed, np.arange(2 * batch).reshape(batch, 2))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_train_state_lies_with_its_parameters(name):
    mesh = make_mesh(2, 4)
    params = {"a.kernel": jnp.ones((128, 256)), "a.bias": jnp.ones(256), "b.kernel": jnp.ones((4, 8))}
    optimizer = make_optimizer(name, optax.constant_schedule(1e-3))
    state = jax.eval_shape(lambda p: init_state(p, optimizer, ema=True), params)
    places = state_shardings(mesh, params, state)
    assert places.ema["a.kernel"] == places.trainable["a.kernel"] == param_sharding(mesh, "a.kernel", (128, 256))
    assert places.step == replicated(mesh)
    split, whole = 0, 0
    pairs = zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(places.opt_state), strict=True)
    for leaf, place in pairs:
        if leaf.shape in ((128, 256), (4, 8)):
            assert "fsdp" in place.spec
            split += 1
        else:
            assert place.spec == P()
            whole += 1
    # Both moments of both kernels; the factored second moment of the large one is only rows and columns.
    assert (split, whole > 3) == ({"adamw": 4, "adafactor": 1}[name], True)
    placed = jax.jit(lambda p: init_state(p, optimizer, ema=True), out_shardings=places)(
        jax.device_put(params, replicated(mesh))
    )
    assert placed.ema["a.kernel"].addressable_shards[0].data.shape == (128, 64)


def test_parameters_travel_rounded_and_gradients_to_those_who_hold_them():
    """By the TPU compiler: of a kernel split in four, three quarters arrive in bfloat16, and of its gradient every
    device gets its own quarter (3/4), summed up over the other axis too (2 * 1/2 * 1/4); never all of it (2 * 3/4)."""
    mesh = make_mesh(2, 4, tpu.devices_of("v5e:2x4"))
    home = param_sharding(mesh, "a.kernel", (1024, 4096))
    kernel = {"a.kernel": jax.ShapeDtypeStruct((1024, 4096), jnp.float32, sharding=home)}
    x = jax.ShapeDtypeStruct((64, 256, 1024), jnp.bfloat16, sharding=batch_sharding(mesh, 64))

    def loss(params, x):
        return jnp.square((x @ unshard(mesh, params, jnp.bfloat16)["a.kernel"]).astype(jnp.float32)).sum()

    lowered = jax.jit(jax.grad(loss), out_shardings={"a.kernel": home}).lower(kernel, x)
    exchanged = tpu.compile_for(chips.CHIPS["v5e"], lowered, quick=True).collectives
    size = 1024 * 4096 * 2
    assert exchanged == {
        "all-gather": (1, size * 3 // 4),
        "reduce-scatter": (1, size * 3 // 4),
        "all-reduce": (1, size // 4),
    }
