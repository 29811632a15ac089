"""The training step: equal to PyTorch's AdamW, a function of its number, blind to devices and to how it is cut up."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers.training_utils import EMAModel
from test_models import as_ours, torch_loss

from dreambooth_jax.devices.sharding import (
    batch_sharding,
    make_mesh,
    param_sharding,
    replicated,
    state_shardings,
    unshard,
)
from dreambooth_jax.diffusion.examples import EncodedExamples, TrainingData, draw, pick
from dreambooth_jax.diffusion.optimizer import make_optimizer
from dreambooth_jax.diffusion.schedulers import process_from_scheduler
from dreambooth_jax.diffusion.step import TrainState, init_state, make_step, run_steps
from dreambooth_jax.families.pipeline import build_pipeline
from dreambooth_jax.models.remat import LAYERS

PROCESS = process_from_scheduler({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
KEY = jax.random.key(3)


def resident(count, cond, seed, shape=(4, 4, 3)) -> EncodedExamples:
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal((count, *shape), np.float32)
    return EncodedExamples(
        mean, np.full_like(mean, 0.1), cond, np.arange(count, dtype=np.int32) % len(jax.tree.leaves(cond)[0])
    )


@pytest.fixture(scope="module")
def data():
    cond = np.random.default_rng(9).standard_normal((2, 5), np.float32)
    return jax.device_put(TrainingData(resident(4, cond, 0), resident(6, cond[1:] + 1, 1)))


def predict(params, x, t, cond):
    hidden = jnp.tanh(
        x @ params["in.kernel"] + (cond @ params["cond.kernel"])[:, None, None] + t[:, None, None, None] / 1000
    )
    return hidden @ params["out.kernel"] + params["out.bias"]


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(5)
    shapes = {"in.kernel": (3, 16), "cond.kernel": (5, 16), "out.kernel": (16, 3), "out.bias": (3,)}
    return {name: 0.3 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


OPTIMIZER = make_optimizer("adamw", optax.constant_schedule(1e-2))


def trained(params, data, *, steps, optimizer=OPTIMIZER, frozen=None, **kw):
    """(state, metrics of each step) after `steps` steps, one call."""
    step = make_step(predict, optimizer, PROCESS, **({"batch_size": 2} | kw))
    state = init_state(jax.tree.map(jnp.array, params), optimizer, ema=kw.get("ema_decay") is not None)
    return jax.jit(run_steps(step, steps))(state, frozen or {}, data, KEY, steps)


def assert_same(one, other, **tolerance):
    paths = jax.tree_util.tree_leaves_with_path(one)
    for (path, a), b in zip(paths, jax.tree.leaves(other), strict=True):
        compare = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
        compare(a, b, err_msg=jax.tree_util.keystr(path), **tolerance)


# ---- against PyTorch


STEPS, BATCH, RATE, TEXT_RATE = 5, 2, 1e-3, 0.5


@pytest.fixture(scope="module")
def real(sd15):
    """UNet and text encoder, their data, and how `run` trains them: (run on a mesh, trainable, data, optimizer)."""
    pipeline = sd15.pipeline
    ids = [pipeline.tokenize([text]) for text in ("a sks dog", "a dog")]
    data = TrainingData(resident(4, ids[0], 0, (8, 8, 4)), resident(6, ids[1], 1, (8, 8, 4)))
    trainable = {name: value for name, value in sd15.params.items() if not name.startswith("vae.")}
    multiplier = lambda name: TEXT_RATE if name.startswith("text_encoder.") else 1.0  # noqa: E731
    optimizer = make_optimizer("adamw", optax.constant_schedule(RATE), multiplier=multiplier)

    def run(mesh, remat="nothing"):
        of_remat = build_pipeline(pipeline.folder, pipeline.models.configs, remat=remat)
        placement = batch_sharding(mesh, 2 * BATCH)
        step = make_step(
            of_remat.denoise_tokens,
            optimizer,
            pipeline.process,
            batch_size=BATCH,
            prior_weight=0.7,
            snr_gamma=5.0,
            constrain=lambda batch: jax.lax.with_sharding_constraint(batch, placement),
            combine=lambda frozen, trainable: unshard(mesh, frozen | trainable, later=of_remat.later),
        )
        placed = {n: jax.device_put(v, param_sharding(mesh, n, v.shape)) for n, v in trainable.items()}
        shardings = state_shardings(mesh, placed, jax.eval_shape(lambda p: init_state(p, optimizer), placed))
        state = jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings)(placed)
        rest = jax.device_put(({}, data, KEY, jnp.int32(1)), replicated(mesh))
        jitted = jax.jit(run_steps(step, 1), donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
        with jax.set_mesh(mesh):
            compiled = jitted.lower(state, *rest).compile()
        losses = []
        for _ in range(STEPS):  # a compiled program takes only what it was compiled for: no second compile hides here
            state, metrics = compiled(state, *rest)
            losses.append([float(metrics.loss[0]), float(metrics.instance[0]), float(metrics.prior[0])])
        return state, np.float64(losses), compiled.as_text()

    return run, trainable, data


@pytest.fixture(scope="module")
def on_one_device(real):
    return real[0](make_mesh(1, 1, devices=jax.devices()[:1]))


@pytest.mark.slow
def test_five_steps_of_adamw(sd15, real, on_one_device):
    _, trainable, data = real
    (state, losses, _), pipe = on_one_device, sd15.torch
    before = {name: torch.from_numpy(np.array(value)) for name, value in trainable.items()}
    start = {
        part: {n: v.clone() for n, v in getattr(pipe, part).state_dict().items()} for part in ("unet", "text_encoder")
    }
    groups = [
        {"params": list(pipe.unet.parameters()), "lr": RATE},
        {"params": list(pipe.text_encoder.parameters()), "lr": RATE * TEXT_RATE},
    ]
    everything = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-2)
    for number in range(STEPS):
        batch = draw(data, sd15.pipeline.process, BATCH, KEY, jnp.int32(number))
        optimizer.zero_grad()
        loss = torch_loss(pipe, batch, BATCH, 0.7, gamma=5.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(everything, 1.0)
        optimizer.step()
        assert abs(losses[number, 0] / loss.item() - 1) <= 1e-4
    after = as_ours(pipe, trainable, lambda parameter: parameter.data.clone())
    for part, values in start.items():
        getattr(pipe, part).load_state_dict(values)
    assert after.keys() == state.trainable.keys()
    for name, expected in after.items():
        out = torch.from_numpy(np.array(state.trainable[name]))
        if "k_proj.bias" in name:  # no gradient but rounding, which Adam scales up: see test_models
            assert (out - expected).abs().max() <= 2 * STEPS * RATE
            continue
        assert (expected - before[name]).norm() > 1e-3 * before[name].norm(), name
        assert (out - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["nothing", "layers"])
def test_eight_devices_and_one_train_alike(real, on_one_device, remat):
    """Two examples of each half on eight devices: some compute the same, and nothing changes. What the devices exchange
    is parameters and their gradients, not activations; parameters of recomputed layers twice."""
    mesh = make_mesh(2, 4)
    state, losses, program = real[0](mesh, remat)
    split = [name for name, value in state.trainable.items() if not value.is_fully_replicated]
    twice = [name for name in split if re.match(rf"unet\.{LAYERS}", name)] if remat == "layers" else []
    gathers = len(re.findall(r"f32\[\S* all-gather(-start)?\(", program))
    assert len(split) > 50 and gathers == len(split) + len(twice)
    np.testing.assert_allclose(losses, on_one_device[1], rtol=1e-5)
    kernel = state.trainable["unet.mid_block.resnets.0.conv1.kernel"]
    moments = [
        v
        for p, v in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "mid_block.resnets.0.conv1.kernel" in str(p)
    ]
    assert len(moments) == 2
    for value in (kernel, *moments):
        assert {shard.data.size for shard in value.addressable_shards} == {kernel.size // 4}


@pytest.mark.parametrize("sizes", [(8, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_every_mesh_trains_alike(params, data, sizes, batch_size):
    """Also four images and a batch of one on eight devices."""

    def on(mesh):
        placement = batch_sharding(mesh, 2 * batch_size)
        constrain = lambda batch: jax.lax.with_sharding_constraint(batch, placement)  # noqa: E731
        placed = {name: jax.device_put(v, param_sharding(mesh, name, v.shape)) for name, v in params.items()}
        return trained(
            placed, jax.device_put(data, replicated(mesh)), steps=4, batch_size=batch_size, constrain=constrain
        )

    state, metrics = on(make_mesh(*sizes))
    alone, expected = on(make_mesh(1, 1, devices=jax.devices()[:1]))
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-5)
    assert_same(state.trainable, alone.trainable, rtol=1e-3, atol=1e-5)


# ---- what trains


def test_accumulated_parts_are_the_whole_batch(params, data):
    (state, metrics), (parts, each) = (trained(params, data, steps=3, batch_size=4, accumulate=a) for a in (1, 4))
    assert_same(metrics, each, rtol=1e-4)
    assert_same(state.trainable, parts.trainable, rtol=1e-3, atol=1e-5)
    alone = data._replace(prior=None)
    (state, metrics), (parts, each) = (trained(params, alone, steps=3, batch_size=4, accumulate=a) for a in (1, 2))
    assert_same(metrics, each, rtol=1e-4)
    assert not metrics.prior.any() and np.array_equal(metrics.loss, metrics.instance)
    with pytest.raises(ValueError, match=r"accumulate = 3 does not divide batch_size = 4; possible: \[1, 2, 4\]"):
        trained(params, data, steps=1, batch_size=4, accumulate=3)


def test_frozen_parameters_are_neither_differentiated_nor_clipped_nor_in_the_state(params, data):
    """A frozen parameter whose derivative is infinite: a gradient through it would make the clip norm infinite too."""
    frozen = {"out.bias": params["out.bias"], "root": np.float32(0)}
    trainable = {name: value for name, value in params.items() if name not in frozen}

    def infinite(params, x, t, cond):
        return predict(params, x, t, cond) + jnp.sqrt(params["root"])

    step = make_step(infinite, OPTIMIZER, PROCESS, batch_size=2)
    state = init_state(jax.tree.map(jnp.array, trainable), OPTIMIZER)
    after, metrics = jax.jit(step)(state, frozen, data, KEY)
    assert np.isfinite(metrics.grad_norm)
    names = {str(path[-1].key) for path, leaf in jax.tree_util.tree_leaves_with_path(after.opt_state) if leaf.ndim}
    assert names == trainable.keys() == after.trainable.keys()
    # Its value is 0: trained without it, the others move the same.
    plain, _ = trained(trainable, data, steps=1, frozen={"out.bias": params["out.bias"]})
    assert_same(after.trainable, plain.trainable, rtol=1e-5, atol=1e-7)
    assert all(np.abs(after.trainable[name] - trainable[name]).max() > 1e-3 for name in trainable)


def test_ema_is_that_of_diffusers(params, data):
    """From the second step on (at the first, theirs forgets the initial weights altogether) and beyond the limit."""
    step = jax.jit(make_step(predict, OPTIMIZER, PROCESS, batch_size=2, ema_decay=0.22))
    state, _ = step(init_state(jax.tree.map(jnp.array, params), OPTIMIZER, ema=True), {}, data, KEY)
    for name, before in params.items():
        moved = np.linalg.norm(state.ema[name] - before)
        assert 0 < np.linalg.norm(state.ema[name] - state.trainable[name]) < moved
    theirs = EMAModel([torch.from_numpy(np.array(state.ema[name])) for name in params], decay=0.22)
    theirs.optimization_step = 1
    for _ in range(4):
        state, _ = step(state, {}, data, KEY)
        theirs.step([torch.from_numpy(np.array(state.trainable[name])).requires_grad_() for name in params])
        average = dict(zip(params, (value.numpy() for value in theirs.shadow_params), strict=True))
        for name in params:
            np.testing.assert_allclose(state.ema[name], average[name], rtol=1e-5, atol=1e-6)
            assert np.abs(state.ema[name] - state.trainable[name]).max() > 1e-4


def test_training_lowers_the_loss(params, data):
    small = data._replace(prior=None)
    _, metrics = trained(params, small, steps=300, batch_size=4)
    assert metrics.loss[-50:].mean() < 0.8 * metrics.loss[:50].mean()


# ---- a function of its number


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(params, data):
    """Ten steps in calls of 4, 4 and 2, and stopped after 3: one program serves them all."""
    traces = []

    def traced(*args):
        traces.append(len(traces))
        return predict(*args)

    run = jax.jit(run_steps(make_step(traced, OPTIMIZER, PROCESS, batch_size=2, ema_decay=0.9), 4), donate_argnums=0)

    def train(state: TrainState, counts):
        logs = []
        for count in counts:
            state, log = run(state, {}, data, KEY, jnp.int32(count))
            assert not log.loss[count:].any() and log.loss[:count].all()
            logs.append(log.loss[:count])
        return state, np.concatenate(logs)

    fresh = init_state(jax.tree.map(jnp.array, params), OPTIMIZER, ema=True)
    state, losses = train(jax.tree.map(jnp.copy, fresh), [4])
    of_one_program = len(traces)
    state, more = train(state, [4, 2])
    losses = np.concatenate([losses, more])
    stopped, first = train(fresh, [3])
    stored = jax.tree.map(np.asarray, stopped)
    again, rest = train(jax.tree.map(jnp.asarray, stored), [4, 3])
    assert int(again.step) == int(state.step) == 10
    assert_same(again, state)
    np.testing.assert_array_equal(np.concatenate([first, rest]), losses)
    assert len(set(losses.tolist())) == 10
    assert len(traces) == of_one_program > 0


@pytest.mark.parametrize(("n", "count"), [(4, 1), (5, 2), (3, 4), (1, 2), (200, 3), (7, 7)])
def test_every_example_is_used_once_per_epoch(n, count):
    steps = np.arange(3 * n)
    order = np.asarray(jax.vmap(lambda step: pick(n, count, KEY, step))(steps)).ravel()
    epochs = order[: len(order) // n * n].reshape(-1, n)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (len(epochs), 1)))
    assert n <= 2 or len({tuple(epoch) for epoch in epochs}) > 1
    other = jax.vmap(lambda step: pick(n, count, jax.random.key(4), step))(steps)
    assert n == 1 or not np.array_equal(order, np.ravel(other))


def drawn(data, steps=400, batch_size=2):
    return jax.jit(jax.vmap(lambda step: draw(data, PROCESS, batch_size, KEY, step)))(np.arange(steps))


def test_what_is_drawn(data):
    batches = drawn(data)
    assert batches.x0.shape == (400, 4, 4, 4, 3)
    # Instance first, then prior, each with the caption of its example.
    for half, part in ((slice(0, 2), data.instance), (slice(2, 4), data.prior)):
        x0, cond = (np.asarray(a[:, half]).reshape(800, *a.shape[2:]) for a in (batches.x0, batches.cond))
        nearest = np.abs(x0[:, None] - np.asarray(part.mean)).mean((2, 3, 4)).argmin(1)
        np.testing.assert_array_equal(np.sort(np.unique(nearest)), np.arange(len(part.mean)))
        np.testing.assert_array_equal(cond, np.asarray(part.cond)[np.asarray(part.cond_index)[nearest]])
        # The posterior is sampled anew every time.
        residue = x0 - np.asarray(part.mean)[nearest]
        assert abs(residue.std() - 0.1) < 0.003 and abs(residue.mean()) < 0.003
        assert len(np.unique(residue[:, 0, 0, 0])) > 790
    eps, t = np.asarray(batches.eps), np.asarray(batches.t)
    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02
    assert t.min() < 10 and t.max() > 989 and t.max() <= 999 and abs(t.mean() - 499.5) < 30
    flat = eps.reshape(1600, -1)
    assert np.abs(np.corrcoef(flat[:200]) - np.eye(200)).max() < 0.75  # no two examples share their noise
    residue = np.asarray(batches.x0[:, :2]).reshape(800, -1)
    assert abs(np.corrcoef(residue.ravel(), eps[:, :2].ravel())[0, 1]) < 0.03


def test_means_without_spread_are_used_as_they_are(data):
    still = data._replace(instance=data.instance._replace(std=0 * data.instance.std), prior=None)
    x0 = np.asarray(drawn(still, 20).x0).reshape(40, 4, 4, 3)
    mean = np.asarray(data.instance.mean)
    assert all((x == mean).all((1, 2, 3)).sum() == 1 for x in x0)


def test_draws_do_not_depend_on_devices(data):
    mesh = make_mesh(8, 1)
    placement = batch_sharding(mesh, 8)

    def sharded(step):
        return jax.lax.with_sharding_constraint(draw(data, PROCESS, 4, KEY, step), placement)

    for step in (0, 7):
        one, many = jax.jit(lambda s: draw(data, PROCESS, 4, KEY, s))(step), jax.jit(sharded)(step)
        assert len(many.x0.sharding.device_set) == 8
        assert_same(many._replace(x0=0), one._replace(x0=0))
        np.testing.assert_allclose(many.x0, one.x0, rtol=1e-6)


def test_flat_data_are_the_same_examples():
    ids = np.zeros((1, 4), np.int32)
    data = jax.device_put(TrainingData(resident(4, ids, 0, (8, 8, 4)), resident(6, ids, 1, (8, 8, 4))))
    flat = jax.tree.map(lambda x: x.reshape(len(x), -1) if x.ndim == 4 else x, data)
    for step in (0, 3):
        assert_same(draw(data, PROCESS, 2, KEY, step), draw(flat, PROCESS, 2, KEY, step, (8, 8, 4)))
