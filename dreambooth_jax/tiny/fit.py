"""Training of one part of the embedded base: steps on the device, checkpoints on the clock, resumption at any kill."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict
from tqdm import trange

from dreambooth_jax.devices import sharding
from dreambooth_jax.devices.sharding import split_batch
from dreambooth_jax.diffusion.muon import scale_by_muon
from dreambooth_jax.diffusion.optimizer import clip_by_global_norm, learning_rate
from dreambooth_jax.diffusion.step import TrainState, init_state, run_steps
from dreambooth_jax.models.params import Params
from dreambooth_jax.runs import checkpoint

Batch = TypeVar("Batch")


def fit(
    name: str,
    step: Callable[..., tuple[TrainState, tuple[Array]]],
    params: Params,
    frozen: Params,
    optimizer: optax.GradientTransformation,
    data: PyTree,
    config: ConfigDict,
    part: ConfigDict,
) -> Params:
    """Runs `step(state, frozen, data, key)` for `part.steps` steps, from the last checkpoint if there is one.

    Args:
        name: of the part: names its checkpoints and its CSV file of losses.
        params: initial values of the trainable parameters.
        frozen: parameters that `step` reads and does not change.
        data: pytree that stays on the device.
        config, part: the run's fields and those of the part.

    Returns:
        The average of the weights if `part.ema_decay` is not 0, else the weights.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    manager = checkpoint.open_checkpoints(Path(config.workdir) / name, keep_last=1)
    on_all = sharding.replicated(sharding.make_mesh())
    params = jax.device_put(jax.tree.map(np.array, params), on_all)  # copies: the state is donated
    state = jax.device_put(init_state(params, optimizer, ema=part.ema_decay > 0), on_all)
    state = checkpoint.restore(manager, state) or state
    frozen, data = jax.device_put(jax.tree.map(np.asarray, (frozen, data)), on_all)
    run = jax.jit(run_steps(step, config.steps_per_call), donate_argnums=0, out_shardings=on_all)
    key = jax.random.key(config.seed)
    saved = time.monotonic()
    with (
        open(Path(config.workdir) / f"{name}.csv", "a") as log,
        trange(part.steps, initial=int(state.step), desc=name, mininterval=5) as bar,
    ):
        while (done := int(state.step)) < part.steps:
            steps = min(config.steps_per_call, part.steps - done)
            state, metrics = run(state, frozen, data, key, jnp.asarray(steps))
            loss = float(metrics[0][:steps].mean())
            if not np.isfinite(loss):
                raise FloatingPointError(f"{name}: loss {loss} near step {done}; lower config.{name}.learning_rate")
            bar.update(steps)
            bar.set_postfix(loss=f"{loss:.5f}", refresh=False)
            log.write(f"{done + steps},{loss}\n")
            log.flush()
            if time.monotonic() - saved > config.save_seconds or done + steps == part.steps:
                checkpoint.save(manager, done + steps, state)
                saved = time.monotonic()
    manager.close()
    logging.info("%s: %d steps of %d pictures", name, int(state.step), part.batch_size)
    return state.trainable if state.ema is None else state.ema


def make_step(
    loss: Callable[[Params, Batch, Array], Array],
    optimizer: optax.GradientTransformation,
    draw: Callable[[PyTree, Array], Batch],
    ema_decay: float,
) -> Callable[[TrainState, Params, PyTree, Array], tuple[TrainState, tuple[Array]]]:
    """Builds a step for `run_steps` that minimises `loss(params, batch, key)`, a scalar.

    Args:
        loss: of the frozen and the trainable parameters together.
        draw: (data, key) -> the batch.
        ema_decay: of the running average of the trainable parameters; 0 for none.
    """

    def step(state: TrainState, frozen: Params, data: PyTree, key: Array) -> tuple[TrainState, tuple[Array]]:
        draw_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
        batch = split_batch(draw(data, draw_key))
        value, grads = jax.value_and_grad(lambda p: loss(frozen | p, batch, loss_key))(state.trainable)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))  # forgets the initial weights at first
        average = state.ema and optax.incremental_update(trainable, state.ema, 1 - decay)
        return TrainState(state.step + 1, trainable, opt_state, average), (value,)

    return step


def adam(part: ConfigDict) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm, with the schedule of `part.lr_schedule`."""
    rate = learning_rate(part.lr_schedule, part.learning_rate, warmup=max(part.steps // 40, 1), steps=part.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=1e-4))


def muon(part: ConfigDict) -> optax.GradientTransformation:
    """Muon at a constant learning rate, then with a linear decay to 0 over the last `part.decay_steps`."""
    stable = learning_rate("constant", part.learning_rate, warmup=max(part.steps // 40, 1), steps=part.steps)
    if part.decay_steps:
        decay = optax.linear_schedule(part.learning_rate, 0.0, part.decay_steps)
        stable = optax.join_schedules([stable, decay], [part.steps - part.decay_steps])
    return make_muon(stable, weight_decay=part.weight_decay)


def make_muon(rate: optax.Schedule, *, weight_decay: float) -> optax.GradientTransformation:
    """Muon after clipping by the global norm, with fewer iterations and a shorter memory than a run's, for training
    from scratch.

    Args:
        rate: update count -> learning rate.
        weight_decay: decoupled decay, multiplied by the learning rate.
    """
    others = optax.scale_by_adam(b2=0.99, nesterov=True)
    return optax.chain(
        clip_by_global_norm(1.0),
        scale_by_muon(others, iterations=4, mesh=sharding.make_mesh()),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
