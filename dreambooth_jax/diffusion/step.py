"""The training step, a pure function of its number: draw examples, corrupt, differentiate, update.

Every random draw comes from `fold_in(key, step)` and then per example, never from carried state or from the number of
devices: a resumed run repeats the uninterrupted one bit for bit, and four photos train on one chip or on 256.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from dreambooth_jax.diffusion.loss import Batch, Predict, dreambooth_loss
from dreambooth_jax.diffusion.process import Process
from dreambooth_jax.models.params import Params
from dreambooth_jax.ops.recompute import recompute_gradients


class EncodedExamples(NamedTuple):
    """Training examples as they stay on the devices.

    Attributes:
        mean, std: of the autoencoder's posterior, scaled latents [n, h, w, c]; std 0 for plain data. Or flat,
            [n, h*w*c]: a TPU pads the last axis of an array to 128, and so holds 4 channels in the place of 128.
        cond: distinct conditions: any pytree with leading axis u (token ids or text states).
        cond_index: which condition each example has, in [0, u), [n].
    """

    mean: Float[Array, "n ..."]
    std: Float[Array, "n ..."]
    cond: Any
    cond_index: Int[Array, "n"]


class TrainingData(NamedTuple):
    """The subject's examples, and the class examples or None to train without prior preservation."""

    instance: EncodedExamples
    prior: EncodedExamples | None


class TrainState(NamedTuple):
    """All that a checkpoint holds. `ema` is None without an average."""

    step: Int[Array, ""]
    trainable: Params
    opt_state: Any
    ema: Params | None


class Metrics(NamedTuple):
    """Scalars of one step; stacked over the steps of a call."""

    loss: Array
    instance: Array
    prior: Array
    grad_norm: Array


def init_state(trainable: Params, optimizer: optax.GradientTransformation, *, ema: bool = False) -> TrainState:
    """The state before the first step."""
    # The average starts as a copy: donated buffers must not be shared.
    average = jax.tree.map(jnp.copy, trainable) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), average)


def pick(n: int, count: int, key: Key[Array, ""], step: Int[Array, ""]) -> Int[Array, "count"]:
    """Which of `n` examples step `step` uses: every example once per epoch, each epoch in an order of its own."""
    number = step * count + jnp.arange(count)
    first = number[0] // n
    # `count` numbers in a row touch at most this many epochs, however they lie.
    epochs = first + jnp.arange((count - 1) // n + 2)
    orders = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), n))(epochs)
    return orders[number // n - first, number % n]


def draw(
    data: TrainingData,
    process: Process,
    batch_size: int,
    key: Key[Array, ""],
    step: Int[Array, ""],
    shape: tuple[int, ...] | None = None,
) -> Batch:
    """The noised batch of step `step`: `batch_size` instance examples, then as many prior examples if there are any.

    `shape` is that of an example, where the data are flat.
    """
    order_key, noise_key = jax.random.split(key)
    instance_key, prior_key = jax.random.split(order_key)
    halves = [_gather(data.instance, pick(len(data.instance.mean), batch_size, instance_key, step))]
    if data.prior is not None:
        halves.append(_gather(data.prior, pick(len(data.prior.mean), batch_size, prior_key, step)))
    mean, std, cond = jax.tree.map(lambda *parts: jnp.concatenate(parts), *halves)
    if shape is not None:
        mean, std = mean.reshape(-1, *shape), std.reshape(-1, *shape)

    step_key = jax.random.fold_in(noise_key, step)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(step_key, i), 3))(jnp.arange(len(mean)))
    posterior_key, eps_key, t_key = keys[:, 0], keys[:, 1], keys[:, 2]
    normal = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:]))
    t = jax.vmap(process.draw_t)(t_key)
    return Batch(mean + std * normal(posterior_key), normal(eps_key), t, cond)


def _gather(resident: EncodedExamples, index: Int[Array, "b"]):
    cond = jax.tree.map(lambda table: table[resident.cond_index[index]], resident.cond)
    return resident.mean[index], resident.std[index], cond


def make_step(
    predict: Predict,
    optimizer: optax.GradientTransformation,
    process: Process,
    *,
    batch_size: int,
    combine: Callable[[Params, Params], Params] = operator.or_,
    prior_weight: float = 1.0,
    snr_gamma: float | None = None,
    accumulate: int = 1,
    grad_dtype=jnp.float32,
    twice: bool = False,
    ema_decay: float | None = None,
    example_shape: tuple[int, ...] | None = None,
    constrain: Callable[[Any], Any] = lambda batch: batch,
) -> Callable[[TrainState, Params, TrainingData, Key[Array, ""]], tuple[TrainState, Metrics]]:
    """Builds `step(state, frozen, data, key) -> (state, metrics)`.

    Args:
        predict: (params, x_t, t, cond) -> prediction like x_t.
        optimizer: over `state.trainable`; nothing else is differentiated or clipped. The gradient's norm is given to it
            as `grad_norm`.
        process: noise levels and prediction.
        batch_size: instance examples per step; with prior preservation as many class examples join them.
        combine: (frozen, trainable) -> the params that `predict` takes: what distinguishes the methods.
        prior_weight, snr_gamma: see `dreambooth_loss`.
        accumulate: number of equal parts in which the batch is computed, one after the other.
        grad_dtype: in which gradients wait for the optimizer; their clipping needs all of them.
        twice: whether gradients that take more room than what they are made of are computed again in place of waiting
            (`recompute_gradients`).
        ema_decay: of the running average of the trainable params, reached over the first steps (`_decay`); None for
            none.
        example_shape: [h, w, c], where the data are flat.
        constrain: applied to every part of the batch, to place it on a mesh.

    Raises:
        ValueError: `accumulate` does not divide `batch_size`.
    """
    if batch_size % accumulate:
        divisors = [d for d in range(1, batch_size + 1) if batch_size % d == 0]
        raise ValueError(f"accumulate = {accumulate} does not divide batch_size = {batch_size}; possible: {divisors}")
    part = batch_size // accumulate

    def loss_of_part(trainable, frozen, batch: Batch):
        losses = dreambooth_loss(
            predict, combine(frozen, trainable), constrain(batch), process,
            num_instance=part, prior_weight=prior_weight, snr_gamma=snr_gamma,
        )  # fmt: skip
        return losses.loss, losses

    optimizer = optax.with_extra_args_support(optimizer)
    gradient = jax.grad(loss_of_part, has_aux=True)

    def mean_gradient(trainable, frozen, batch: Batch):
        if accumulate == 1:
            return gradient(trainable, frozen, batch)

        def add_part(total, batch):
            return jax.tree.map(lambda a, b: a + b / accumulate, total, gradient(trainable, frozen, batch)), None

        halves = 1 if batch.x0.shape[0] == batch_size else 2
        parts = jax.tree.map(lambda x: _split(x, halves, accumulate), batch)
        shapes = jax.eval_shape(gradient, trainable, frozen, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add_part, zeros, parts)[0]

    def step(state: TrainState, frozen: Params, data: TrainingData, key: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        batch = draw(data, process, batch_size, key, state.step, example_shape)
        if twice:
            (grads, losses), again = recompute_gradients(mean_gradient)(state.trainable, frozen, batch)
        else:
            (grads, losses), again = mean_gradient(state.trainable, frozen, batch), lambda grad, after: None
        norm = _global_norm(grads)

        def wait(grad: Array) -> Array:
            recomputed = again(grad, norm)
            return _hold(grad, grad_dtype) if recomputed is None else recomputed

        updates, opt_state = optimizer.update(
            jax.tree.map(wait, grads), state.opt_state, state.trainable, grad_norm=norm
        )
        trainable = optax.apply_updates(state.trainable, updates)
        ema = state.ema and optax.incremental_update(trainable, state.ema, 1.0 - _decay(ema_decay, state.step))
        metrics = Metrics(*losses, norm)
        return TrainState(state.step + 1, trainable, opt_state, ema), metrics

    return step


def _global_norm(grads: Any) -> Array:
    """Over everything trained. All vectors are taken as one: most parameters are such, and a sum for each would be a
    seventh of the program's kernels on CPU, to compile and to read back."""
    vectors, others = ([g for g in jax.tree.leaves(grads) if (g.ndim == 1) == flat] for flat in (True, False))
    return optax.tree.norm([jnp.concatenate(vectors), *others] if vectors else others)


def _hold(grad: Array, dtype) -> Array:
    """Rounds to `dtype`. The compiler would cancel the rounding and hold float32, but for the barrier."""
    return grad if grad.dtype == dtype else jax.lax.optimization_barrier(grad.astype(dtype)).astype(grad.dtype)


def _decay(limit: float, step: Int[Array, ""]) -> Array:
    """(1 + step) / (10 + step) up to `limit`: the average forgets the initial weights from the start instead of
    carrying them for 1 / (1 - limit) steps (tf.train.ExponentialMovingAverage with num_updates)."""
    return jnp.minimum(limit, (1 + step) / (10 + step))


def _split(x: Array, halves: int, parts: int) -> Array:
    """[halves * parts * b, ...] -> [parts, halves * b, ...]: every part has its share of instance and of prior."""
    by_half = x.reshape(halves, parts, -1, *x.shape[1:])
    return by_half.swapaxes(0, 1).reshape(parts, -1, *x.shape[1:])


def run_steps(step: Callable, capacity: int) -> Callable:
    """Builds `run(state, frozen, data, key, count) -> (state, metrics stacked [capacity])`, up to `capacity` steps on
    the device in one call.

    `count` is an array, so that the last, shorter call runs the very same program: neither a second compile nor a
    different rounding. Metrics from `count` on are 0.
    """

    step = jax.jit(step, inline=True)  # traced once, for its shapes and for the loop

    def run(state: TrainState, frozen: Params, data: TrainingData, key: Key[Array, ""], count: Int[Array, ""]):
        def body(i, carry):
            state, log = carry
            state, metrics = step(state, frozen, data, key)
            return state, jax.tree.map(lambda all_, one: all_.at[i].set(one), log, metrics)

        shapes = jax.eval_shape(step, state, frozen, data, key)[1]
        empty = jax.tree.map(lambda one: jnp.zeros((capacity, *one.shape), one.dtype), shapes)
        return jax.lax.fori_loop(0, count, body, (state, empty))

    return run
