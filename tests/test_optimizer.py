"""Optimizers and learning rates against those of PyTorch, transformers and diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers.optimization import get_scheduler
from optax.contrib import MuonDimensionNumbers
from transformers.optimization import Adafactor

from dreambooth_jax.diffusion.optimizer import learning_rate, make_optimizer
from dreambooth_jax.tiny.fit import make_muon

NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("kind", NAMES)
def test_learning_rates(kind, warmup):
    """Those of diffusers after the warm-up, during which theirs starts with an update of 0 and ours with a step."""
    rate = learning_rate(kind, 3e-4, warmup=warmup, steps=50)
    ours = np.float64([rate(count) for count in range(50)])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(NAMES[kind], optimizer, num_warmup_steps=warmup, num_training_steps=50)
    theirs = []
    for _ in range(50):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(ours[warmup:], theirs[warmup:], rtol=1e-4, atol=1e-10)
    np.testing.assert_allclose([ours[warmup], ours.max()], 3e-4, rtol=1e-6)
    np.testing.assert_allclose(ours[:warmup], theirs[1 : warmup + 1], rtol=1e-5)
    assert (ours > 0).all()


def test_impossible_learning_rates():
    with pytest.raises(ValueError, match=r"lr_schedule = 'step'; implemented: constant, linear, cosine"):
        learning_rate("step", 1e-3, warmup=0, steps=10)
    with pytest.raises(ValueError, match="lr_warmup_steps = 10 leaves nothing of 10 steps"):
        learning_rate("cosine", 1e-3, warmup=10, steps=10)
    with pytest.raises(ValueError, match=r"optimizer = 'sgd'; implemented: adamw, muon, adafactor"):
        make_optimizer("sgd", optax.constant_schedule(1e-3))


SHAPES = {"a.kernel": (128, 160), "b.bias": (7,)}


def values(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: scale * rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def follow(optimizer, gradients, start):
    params = jax.tree.map(jnp.array, start)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def torch_follow(make, gradients, start, clip):
    params = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
    optimizer = make(params)
    for gradient in gradients:
        for name, parameter in params.items():
            parameter.grad = torch.from_numpy(gradient[name].copy())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(params.values()), clip)
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in params.items()}


THEIRS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    "adafactor": lambda groups: Adafactor(
        groups, scale_parameter=False, relative_step=False, warmup_init=False, weight_decay=0.1
    ),
}


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("name", THEIRS)
def test_updates(name, clip):
    """Clipping over everything trained, decay, and a learning rate of its own for some names."""
    start, gradients = values(0), [values(seed, 10.0 ** (seed % 3 - 2)) for seed in range(1, 8)]
    optimizer = make_optimizer(
        name,
        optax.constant_schedule(1e-2),
        weight_decay=0.1,
        b1=0.8,
        b2=0.95,
        eps=1e-6,
        clip_norm=clip,
        multiplier=lambda name: 0.5 if name.startswith("a.") else 1.0,
    )
    rates = {"a.kernel": 5e-3, "b.bias": 1e-2}
    ours, _ = follow(optimizer, gradients, start)
    theirs = torch_follow(
        lambda params: THEIRS[name]([{"params": [p], "lr": rates[n]} for n, p in params.items()]),
        gradients,
        start,
        clip,
    )
    for param in start:
        assert np.abs(ours[param] - start[param]).max() > 1e-3
        np.testing.assert_allclose(ours[param], theirs[param], atol=1e-5, err_msg=param)


def test_adafactor_keeps_rows_and_columns_only():
    start = values(0)
    _, state = follow(make_optimizer("adafactor", optax.constant_schedule(1e-2)), [values(1)], start)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 0.05 * start["a.kernel"].size


@pytest.mark.parametrize("name", THEIRS)
def test_the_rate_is_that_of_the_update_count(name):
    """Two updates at rates 0 and 1e-2: only the second moves anything, decay included."""
    start = values(0)
    optimizer = make_optimizer(name, lambda count: jnp.where(count == 0, 0.0, 1e-2), weight_decay=0.1)
    once, _ = follow(optimizer, [values(1)], start)
    twice, _ = follow(optimizer, [values(1), values(1)], start)
    for param in start:
        np.testing.assert_array_equal(once[param], start[param])
        assert np.abs(twice[param] - start[param]).max() > 1e-3


MATRICES = {
    "a.kernel": (24, 64),
    "conv.kernel": (3, 3, 16, 32),
    "to_q.lora_A.kernel": (48, 4),
    "to_q.lora_B.kernel": (4, 40),
    "to_q.hada_w1_a.weight": (40, 4),
    "to_q.hada_t1.weight": (4, 4, 3, 3),
}
OTHERS = {"conv_in.kernel": (3, 3, 4, 8), "token_embedding.embedding": (12, 8), "a.bias": (16,), "b.scale": ()}


def drawn(seed):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.standard_normal(shape), jnp.float32) for n, shape in (MATRICES | OTHERS).items()}


@pytest.mark.parametrize("make", ["run", "scratch"])
def test_muon_makes_updates_of_equal_singular_values_and_root_mean_square(make):
    params, rate = drawn(0), optax.constant_schedule(1e-2)
    scratch = make == "scratch"
    optimizer = make_muon(rate, weight_decay=0.0) if scratch else make_optimizer("muon", rate, weight_decay=0.0)
    update = jax.jit(lambda gradients: optimizer.update(gradients, optimizer.init(params), params)[0])
    updates = {name: np.asarray(x, np.float64) for name, x in update(params).items()}
    for name in MATRICES:
        sides = (-1, MATRICES[name][-1]) if name.endswith("kernel") else (MATRICES[name][0], -1)
        values = np.linalg.svd(updates[name].reshape(sides), compute_uv=False)
        assert values.max() < 2.5 * values.min(), name
        before = np.linalg.svd(np.asarray(params[name]).reshape(sides), compute_uv=False)
        assert before.max() > 3 * before.min() or name != "a.kernel"
        assert np.sqrt(np.mean(updates[name] ** 2)) == pytest.approx(0.2e-2, rel=0.2), name
        assert np.sum(updates[name] * np.asarray(params[name])) < 0  # downhill
    for name in OTHERS:  # AdamW's first step is as large for all, whatever the gradient
        first = -1.47e-2 if scratch else -1e-2
        np.testing.assert_allclose(updates[name] / np.sign(params[name]), first, rtol=1e-2, err_msg=name)


def test_muon_is_that_of_optax():
    """Its matrices and its AdamW for the others, with decay for some, after clipping."""
    rate, start, decays = optax.linear_schedule(1e-2, 1e-3, 4), drawn(0), lambda name: "kernel" in name
    ours = make_optimizer("muon", rate, weight_decay=0.1, clip_norm=0.5, decays=decays)
    axes = {name: MuonDimensionNumbers(tuple(range(len(s) - 1)), len(s) - 1) for name, s in MATRICES.items()}
    axes |= {name: MuonDimensionNumbers(tuple(range(1, len(s))), 0) for name, s in MATRICES.items() if "hada" in name}
    axes |= dict.fromkeys(OTHERS)
    plain = optax.contrib.muon(
        rate,
        weight_decay=0.1,
        weight_decay_mask=lambda params: {name: decays(name) for name in params},
        consistent_rms=0.2,
        muon_weight_dimension_numbers=axes,
    )
    theirs = optax.chain(optax.clip_by_global_norm(0.5), plain)
    gradients = [drawn(seed) for seed in range(1, 6)]
    (one, _), (other, _) = (follow(optimizer, gradients, start) for optimizer in (ours, theirs))
    for name in MATRICES:
        assert np.abs(one[name] - start[name]).max() > 1e-3
        np.testing.assert_allclose(one[name], other[name], atol=1e-6, err_msg=name)
    adamw = make_optimizer("adamw", rate, weight_decay=0.1, clip_norm=0.5, decays=decays)
    other, _ = follow(adamw, gradients, start)
    for name in OTHERS:
        np.testing.assert_allclose(one[name], other[name], atol=1e-6, err_msg=name)


def test_the_first_update_of_muon_is_that_of_pytorch():
    """PyTorch's iterates in bfloat16. Later updates mix gradient and momentum otherwise: optax corrects their bias."""
    start, gradient = drawn(0)["a.kernel"], drawn(1)["a.kernel"]
    optimizer = make_optimizer("muon", optax.constant_schedule(1e-2), weight_decay=0.1, clip_norm=None)
    ours, _ = follow(optimizer, [{"a.kernel": gradient}], {"a.kernel": start})
    theirs = torch_follow(
        lambda params: torch.optim.Muon(params.values(), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        [{"a.kernel": np.array(gradient)}],
        {"a.kernel": np.array(start)},
        None,
    )
    moved = theirs["a.kernel"] - start
    assert np.linalg.norm(ours["a.kernel"] - theirs["a.kernel"]) < 0.03 * np.linalg.norm(moved)


def test_muon_multiplies_rates_and_refuses_eight_bits():
    rate = optax.constant_schedule(1e-2)
    plain, half = (
        make_optimizer("muon", rate, multiplier=lambda name, factor=factor: factor if name.startswith("a.") else 1.0)
        for factor in (1.0, 0.5)
    )
    (one, _), (other, _) = (follow(optimizer, [drawn(1)], drawn(0)) for optimizer in (plain, half))
    for name, start in drawn(0).items():
        share = 0.5 if name.startswith("a.") else 1.0
        np.testing.assert_allclose(other[name] - start, share * (one[name] - start), atol=1e-6)
    with pytest.raises(ValueError, match="moment_dtype = 'int8': not implemented for optimizer = 'muon'"):
        make_optimizer("muon", rate, moment_dtype="int8")
