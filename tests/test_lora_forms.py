"""LoRA's relatives and options: every form starts at the base, and one training step is the step of peft."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from flax import nnx

from dreambooth_jax.adapters.factors import add, by_module, difference, merge
from dreambooth_jax.adapters.lora import TARGETS, lora
from dreambooth_jax.diffusion.optimizer import make_optimizer
from dreambooth_jax.models.layers import Conv, Linear
from dreambooth_jax.models.params import functional

RATE, RANK, ALPHA = 0.1, 3, 6.0
CONFIGS = {
    "lora": peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["conv", "linear"]),
    "dora": peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["conv", "linear"], use_dora=True),
    "loha": peft.LoHaConfig(r=RANK, alpha=ALPHA, target_modules=["linear"]),
    "lokr": peft.LoKrConfig(r=RANK, alpha=ALPHA, target_modules=["conv", "linear"]),
}


class Net(nnx.Module):
    """A convolution and a linear layer over its pixels."""

    def __init__(self, rngs):
        self.conv = Conv(6, 16, 3, stride=2, dtype=jnp.float32, rngs=rngs)
        self.linear = Linear(16, 24, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x):
        return self.linear(self.conv(x))


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = torch.nn.Conv2d(6, 16, 3, stride=2, padding=1), torch.nn.Linear(16, 24)

    def forward(self, x):
        return self.linear(self.conv(x).movedim(1, -1))


@pytest.fixture(scope="module")
def net():
    model = functional(Net)
    params = model.init(jax.random.key(0))
    return model, params | {n: x + 0.1 for n, x in params.items() if n.endswith("bias")}


def torch_layout(name: str, value) -> torch.Tensor:
    array = np.asarray(value)
    if name.endswith(".kernel"):
        array = array.T if array.ndim == 2 else np.moveaxis(array, (3, 2), (0, 1))
    return torch.from_numpy(np.ascontiguousarray(array))


def peft_model(form: str, params, trainable):
    """A peft model with our base and our factors, and what it calls each of them."""
    base = TorchNet()
    base.load_state_dict({n.replace("kernel", "weight"): torch_layout(n, x) for n, x in params.items()})
    model = peft.get_peft_model(base, CONFIGS[form])
    names, theirs = {}, dict(model.named_parameters())
    for name, value in trainable.items():
        module, factor, _ = name.rsplit(".", 2)
        stem = f"base_model.model.{module}.{factor}.default"
        names[name] = next(n for n in (stem, f"{stem}.weight") if n in theirs)
        with torch.no_grad():
            tensor = torch_layout(name, value)
            theirs[names[name]].copy_(tensor.reshape(theirs[names[name]].shape))
    return model, names


@pytest.mark.parametrize("form", CONFIGS)
def test_a_step_is_the_step_of_peft(net, form):
    model, params = net
    method = lora("", "linear" if form == "loha" else "conv|linear", RANK, ALPHA, form=form)
    trainable, frozen = method.start(params, jax.random.key(1))
    trainable = {
        n: x + 0.05 * jax.random.normal(jax.random.key(i), x.shape) for i, (n, x) in enumerate(trainable.items())
    }
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((2, 8, 8, 6), np.float32), rng.standard_normal((2, 4, 4, 24), np.float32)

    def loss(trainable):
        return jnp.square(model.apply(method.combine(frozen, trainable), x) - target).mean()

    optimizer = optax.sgd(RATE)
    value, grads = jax.value_and_grad(loss)(trainable)
    ours = optax.apply_updates(trainable, optimizer.update(grads, optimizer.init(trainable))[0])

    theirs, names = peft_model(form, params, trainable)
    their_optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], RATE)
    their_loss = (theirs(torch.from_numpy(x).movedim(-1, 1)) - torch.from_numpy(target)).square().mean()
    their_loss.backward()
    their_optimizer.step()
    np.testing.assert_allclose(value, their_loss.item(), rtol=1e-5)
    updated = dict(theirs.named_parameters())
    assert {n for n, p in updated.items() if p.requires_grad} == set(names.values())
    for name, before in trainable.items():
        moved = torch_layout(name, ours[name]) - torch_layout(name, before)
        their_move = updated[names[name]].detach().reshape(moved.shape) - torch_layout(name, before)
        assert their_move.abs().max() > 1e-5, name
        np.testing.assert_allclose(moved, their_move, atol=1e-4 * float(their_move.abs().max()), err_msg=name)


@pytest.mark.parametrize("form", CONFIGS)
def test_every_form_starts_at_the_base(net, form):
    model, params = net
    method = lora("", "conv|linear", RANK, ALPHA, form=form)
    trainable, frozen = method.start(params, jax.random.key(1))
    assert {n: x.shape for n, x in trainable.items()} == {n: s.shape for n, s in method.shapes(model.shapes)[0].items()}
    x = jax.random.normal(jax.random.key(2), (2, 8, 8, 6))
    start, base = model.apply(method.combine(frozen, trainable), x), model.apply(params, x)
    np.testing.assert_allclose(start, base, atol=1e-6 if form == "dora" else 0)
    # A step away it computes with the merged kernels what it computes with the factors, and weight 0 is the base.
    other = {n: x + 0.1 for n, x in trainable.items()}
    combined = method.combine(frozen, other)
    away, merged = model.apply(combined, x), model.apply(merge(combined), x)
    np.testing.assert_allclose(away, merged, atol=1e-5)
    assert np.abs(away - base).max() > 1e-2
    np.testing.assert_allclose(model.apply(add(params, method.adapter(other)), x), away, atol=1e-5)
    for name, value in add(params, method.adapter(other), 0.0).items():
        np.testing.assert_array_equal(value, params[name])


def test_ranks_and_alphas_follow_the_first_matching_regex(net):
    model, _ = net
    method = lora("", ".*", 2, 2.0, ranks=(("conv", 4, 8.0), ("linear", 0, 1.0)))
    shapes = {n: x.shape for n, x in method.shapes(model.shapes)[0].items()}
    assert shapes == {"conv.lora_A.kernel": (3, 3, 6, 4), "conv.lora_B.kernel": (4, 16)}
    ones = {n: jnp.ones(s) for n, s in shapes.items()}
    np.testing.assert_array_equal(method.adapter(ones)["conv.lora_B.kernel"], np.full((4, 16), 2.0))
    stabilized = lora("", ".*", 2, 2.0, ranks=(("conv", 4, 8.0), ("linear", 0, 1.0)), stabilized=True)
    np.testing.assert_array_equal(stabilized.adapter(ones)["conv.lora_B.kernel"], np.full((4, 16), 4.0))
    for rank, ranks, message in (
        (2, (("attn9", 4, 4.0),), "'attn9' is found in none of the 2 modules"),
        (2, (("conv", 7, 4.0),), "lora_ranks: 7 is above the rank of conv, 6"),
        (7, (), "lora_rank = 7: 7 is above the rank of conv, 6, and of 0 others"),
    ):
        with pytest.raises(ValueError, match=message):
            lora("", ".*", rank, 2.0, ranks=ranks).shapes(model.shapes)


def test_the_second_factor_has_a_rate_of_its_own_and_magnitudes_do_not_decay(net):
    _, params = net
    method = lora("", ".*", 2, 2.0, form="dora", ratio=16.0)
    trainable, _ = method.start(params, jax.random.key(0))
    optimizer = make_optimizer(
        "adamw",
        optax.constant_schedule(0.1),
        weight_decay=0.5,
        clip_norm=None,
        multiplier=method.multiplier,
        decays=method.decays,
    )
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    still, _ = optimizer.update(zeros, optimizer.init(trainable), trainable)
    moved, _ = optimizer.update(jax.tree.map(jnp.ones_like, trainable), optimizer.init(trainable), zeros)
    for name in trainable:
        assert (np.abs(still[name]).max() > 0) == name.endswith("lora_A.kernel"), name  # B is zero
        np.testing.assert_allclose(moved[name], -1.6 if name.endswith("lora_B.kernel") else -0.1, rtol=1e-4)


class Wide(nnx.Module):
    def __init__(self, rngs):
        self.linear = Linear(256, 256, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


def test_the_base_is_shared_by_many_subjects():
    """Under vmap over the factors x W stays one product: the work of N subjects is that of N batches, no N kernels."""
    model, count, rows = functional(Wide), 16, 4
    method = lora("", ".*", 2, 2.0)
    shapes, frozen = method.shapes(model.shapes)
    many = {n: jax.ShapeDtypeStruct((count, *x.shape), x.dtype) for n, x in shapes.items()}
    x = jax.ShapeDtypeStruct((count, rows, 256), jnp.float32)
    gradient = jax.grad(lambda trainable, frozen, x: model.apply(method.combine(frozen, trainable), x).sum())
    cost = jax.jit(jax.vmap(gradient, in_axes=(0, None, 0))).lower(many, frozen, x).compile().cost_analysis()
    assert cost["flops"] < 1.5 * 2 * count * rows * 256 * 256  # merged kernels would take 2 * 16 * 256 * 256 * 2 more


def test_presets_widen():
    names = [
        "unet.mid_block.a.attn1.to_q",
        "unet.mid_block.a.attn2.to_k",
        "unet.mid_block.a.attn2.to_out.0",
        "unet.mid_block.ff.net.0.proj",
        "unet.up_blocks.0.proj_in",
        "unet.up_blocks.0.resnets.0.conv1",
        "unet.conv_in",
        "text_encoder.layers.0.self_attn.q_proj",
        "text_encoder.layers.0.mlp.fc1",
        "unet.time_embedding.linear_1",
    ]
    shapes = {f"{name}.kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32) for name in names}
    found = [len(by_module(lora("", preset, 2, 2.0).shapes(shapes)[0])) for preset in TARGETS]
    assert found == [2, 4, 7, 8]
    assert difference(jnp.zeros((4, 4)), {"diff.kernel": jnp.ones((4, 4))}).sum() == 16
