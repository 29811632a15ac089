"""Recomputed gradients are the gradients, and only what must be kept is kept."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding
from support.tiny_unet import UNET, normal

from dreambooth_jax.devices import chips, tpu
from dreambooth_jax.devices.sharding import make_mesh, placed_shapes, unshard
from dreambooth_jax.diffusion.examples import EncodedExamples, TrainingData
from dreambooth_jax.diffusion.optimizer import make_optimizer
from dreambooth_jax.diffusion.schedulers import process_from_scheduler
from dreambooth_jax.diffusion.step import init_state, kept, make_step, recomputed, run_steps
from dreambooth_jax.families.pipeline import describe_base
from dreambooth_jax.models.layers import Linear
from dreambooth_jax.models.params import functional
from dreambooth_jax.models.remat import REMAT
from dreambooth_jax.models.unet import UNet2DConditionModel
from dreambooth_jax.ops import recompute
from dreambooth_jax.ops.barriers import after
from dreambooth_jax.ops.convolve import convolve
from dreambooth_jax.ops.recompute import recompute_gradients

PROCESS = process_from_scheduler({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})


def test_only_what_is_larger_than_its_factors_is_computed_again():
    params = {
        "wide": normal(0, 64, 64),
        "narrow": normal(1, 64, 2),
        "conv": normal(2, 3, 3, 8, 8),
        "bias": normal(3, 64),
    }
    x, image = normal(4, 2, 8, 64), normal(5, 1, 4, 4, 8)

    @jax.jit
    def run(params):
        def loss(params):
            hidden = jax.checkpoint(lambda w, b: jnp.tanh(x @ w + b))(params["wide"], params["bias"])
            return jnp.square(hidden @ params["narrow"]).sum() + jnp.sin(convolve(image, params["conv"], 1, 1)).sum()

        grads, again = recompute_gradients(jax.grad(loss))(params)
        return grads, {name: again(grad, grads["bias"][0]) for name, grad in grads.items()}

    grads, second = run(params)
    assert {name for name, grad in second.items() if grad is not None} == {"wide", "conv"}
    for name in ("wide", "conv"):
        np.testing.assert_array_equal(second[name], grads[name])


@pytest.mark.slow
@pytest.mark.parametrize("remat", REMAT)
def test_the_step_is_the_same(remat):
    unet = functional(lambda rngs: UNet2DConditionModel(UNET, remat=remat, rngs=rngs))
    optimizer = make_optimizer("adamw", optax.constant_schedule(1e-3))
    examples = EncodedExamples(normal(0, 2, 4, 4, 4), jnp.ones((2, 4, 4, 4)), normal(1, 1, 3, 16), jnp.zeros(2, int))
    data = TrainingData(examples, None)
    states = []
    for hold in (kept, recomputed):
        state = init_state(unet.init(jax.random.key(0)), optimizer)
        step = make_step(unet.apply, optimizer, PROCESS, batch_size=2, hold=hold)
        states.append(jax.jit(run_steps(step, 2))(state, {}, data, jax.random.key(1), 2))
    (once, its_metrics), (again, metrics) = states
    np.testing.assert_allclose(metrics.grad_norm, its_metrics.grad_norm, rtol=1e-5)
    for name, value in again.trainable.items():
        np.testing.assert_allclose(value, once.trainable[name], atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_on_a_tpu_wide_gradients_are_not_kept(monkeypatch):
    """Without the barrier they are kept: the compiler merges both computations."""
    width, layers = 2048, 8
    place = SingleDeviceSharding(tpu.devices_of("v5e:1x1")[0])

    def predict(params, xt, t, cond):
        for name in sorted(params):
            xt = jnp.tanh(xt.astype(jnp.bfloat16) @ params[name].astype(jnp.bfloat16))
        return xt.astype(jnp.float32)

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    optimizer = make_optimizer("adamw", optax.constant_schedule(1e-3))
    params = {f"{number}.kernel": shape(width, width) for number in range(layers)}
    state = jax.eval_shape(lambda params: init_state(params, optimizer), params)
    state = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), state)
    data = TrainingData(
        EncodedExamples(shape(4, 8, 8, width), shape(4, 8, 8, width), shape(1, 1), shape(4, dtype=jnp.int32)), None
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    temporaries = []
    for hold, barrier in ((kept, after), (recomputed, after), (recomputed, lambda values, earlier=(): values)):
        monkeypatch.setattr(recompute, "after", barrier)
        step = make_step(predict, optimizer, PROCESS, batch_size=2, hold=hold)
        lowered = jax.jit(run_steps(step, 1), donate_argnums=0).lower(
            state, {}, data, shape(dtype=key.dtype), shape(dtype=jnp.int32)
        )
        temporaries.append(tpu.compile_for(chips.CHIPS["v5e"], lowered, quick=True).temporaries)
    whole, second, merged = temporaries
    assert layers * width**2 * 2 < whole < layers * width**2 * 4  # bfloat16, as the layers compute them
    assert second < whole / 2 and merged > 0.9 * whole


def test_whole_parameters_are_not_kept():
    """By the TPU compiler: parameters that eight devices share are whole while their layer is computed, no longer."""
    width, depth = 2048, 8
    layer = REMAT["layers"](Linear.__call__)
    model = functional(lambda rngs: Chain(width, depth, rngs))
    mesh = make_mesh(1, 8, tpu.devices_of("v5e:2x4"))
    params = placed_shapes(mesh, model.shapes)

    def temporaries(later):
        def loss(params):
            return model.apply(unshard(mesh, params, jnp.bfloat16, later=later), layer, jnp.ones((8, width))).sum()

        with jax.set_mesh(mesh):
            lowered = jax.jit(jax.grad(loss), out_shardings={n: x.sharding for n, x in params.items()}).lower(params)
        return tpu.compile_for(chips.CHIPS["v5e"], lowered, quick=True).temporaries

    whole = depth * width**2 * 2
    assert temporaries("") > 0.8 * whole
    assert temporaries("layers") < 0.5 * whole


class Chain(nnx.Module):
    def __init__(self, width, depth, rngs):
        self.layers = nnx.List([Linear(width, width, dtype=jnp.bfloat16, rngs=rngs) for _ in range(depth)])

    def __call__(self, layer, x):
        for linear in self.layers:
            x = jnp.tanh(layer(linear, x))
        return x


def test_every_kernel_of_a_layer_is_left_to_it():
    """Of the UNets' kernels the pipeline leaves to the layers all but those of their ends and of the embeddings."""
    for base in ("stable-diffusion-v1-5/stable-diffusion-v1-5", "DeepFloyd/IF-I-M-v1.0"):
        pipeline = describe_base(base, remat="layers")
        left = {name for name in pipeline.shapes if not re.match(pipeline.later, name)}
        of_unet = {name.split(".")[1] for name in left if name.startswith("unet.")}
        assert of_unet <= {
            "conv_in",
            "time_embedding",
            "add_embedding",
            "encoder_hid_proj",
            "conv_norm_out",
            "conv_out",
        }
