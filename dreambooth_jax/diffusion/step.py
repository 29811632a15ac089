"""The training step, a pure function of its number: draw a batch, differentiate the loss, update the parameters."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from dreambooth_jax.devices import runtime
from dreambooth_jax.diffusion.adam import largest_magnitudes
from dreambooth_jax.diffusion.examples import Augment, Number, TrainingData, draw
from dreambooth_jax.diffusion.loss import Batch, Losses, Predict, dreambooth_loss
from dreambooth_jax.diffusion.process import Process
from dreambooth_jax.ops.recompute import recompute_gradients

Scalar = Float[Array, ""]
# Parameters as arrays in any tree; the library's own are flat.
Params: TypeAlias = PyTree[Array]
Sums = tuple[Params, Losses]
# (trainable, frozen, batch) -> (gradient, losses)
Gradient = Callable[[Params, Params, Batch], tuple[Params, Losses]]
# (trainable, frozen, batch) -> (gradient, losses, function of the gradient's norm -> gradient for the optimizer)
Held = Callable[[Params, Params, Batch], tuple[Params, Losses, Callable[[Scalar], Params]]]


class TrainState(NamedTuple):
    """Contents of a checkpoint. `ema` is None without an average."""

    step: Int[Array, ""]
    trainable: Params
    opt_state: PyTree
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


def kept(gradient: Gradient) -> Held:
    """Keeps all gradients until their global norm is known."""

    def held(trainable: Params, frozen: Params, batch: Batch) -> tuple[Params, Losses, Callable[[Scalar], Params]]:
        grads, losses = gradient(trainable, frozen, batch)
        return grads, losses, lambda norm: grads

    return held


def recomputed(gradient: Gradient) -> Held:
    """Recomputes a gradient once the norm is known, instead of keeping it, where it is larger than its two factors."""

    def held(trainable: Params, frozen: Params, batch: Batch) -> tuple[Params, Losses, Callable[[Scalar], Params]]:
        (grads, losses), again = recompute_gradients(gradient)(trainable, frozen, batch)

        def for_optimizer(grad: Array, norm: Scalar) -> Array:
            second = again(grad, norm)
            return grad if second is None else second

        return grads, losses, lambda norm: jax.tree.map(lambda grad: for_optimizer(grad, norm), grads)

    return held


def make_step(
    predict: Predict,
    optimizer: optax.GradientTransformation,
    process: Process,
    *,
    batch_size: int,
    combine: Callable[[Params, Params], Params] = lambda frozen, trainable: frozen | trainable,
    prior_weight: Number = 1.0,
    snr_gamma: Number | None = None,
    accumulate: int = 1,
    hold: Callable[[Gradient], Held] = kept,
    ema_decay: Number | None = None,
    example_shape: tuple[int, ...] | None = None,
    augment: Augment | None = None,
    constrain: Callable[[Batch], Batch] = lambda batch: batch,
    base: Callable[[Params], Params] | None = None,
    paired: bool = False,
    dropout: Number | None = None,
) -> Callable[[TrainState, Params, TrainingData, Key[Array, ""]], tuple[TrainState, Metrics]]:
    """Builds `step(state, frozen, data, key) -> (state, metrics)`.

    Args:
        predict: (params, x_t, t, cond) -> prediction like x_t.
        optimizer: transformation of the gradient of `state.trainable`. Called with the keywords `grad_norm`, the global
            norm of the gradient, and `grad_peaks`, the largest magnitudes in its arrays.
        process: noise levels, prediction and times.
        batch_size: instance examples per step; with prior preservation as many class examples join them.
        combine: (frozen, trainable) -> params of `predict`; this is where methods differ.
        prior_weight, snr_gamma: see `dreambooth_loss`.
        accumulate: number of equal parts in which the batch is computed, one after the other.
        hold: way in which gradients are kept until their global norm is known: `kept` or `recomputed`.
        ema_decay: decay of the parameter average, warmed up (see `_decay`); None: no average.
        example_shape: [h, w, c], where the data are flat.
        augment: see `draw`.
        constrain: function applied to every part of the batch, to place it on a mesh.
        base: frozen -> params of the base model, see `dreambooth_loss`; None: the prior half has the noise's targets.
        paired, dropout: see `draw`.

    Raises:
        ValueError: `accumulate` does not divide `batch_size`.
    """
    if batch_size % accumulate:
        divisors = [d for d in range(1, batch_size + 1) if batch_size % d == 0]
        raise ValueError(f"accumulate = {accumulate} does not divide batch_size = {batch_size}; possible: {divisors}")
    runtime.warn_unless_started()

    def loss_of_part(trainable: Params, frozen: Params, batch: Batch) -> tuple[Scalar, Losses]:
        losses = dreambooth_loss(
            predict,
            combine(frozen, trainable),
            constrain(batch),
            process,
            num_instance=batch_size // accumulate,
            prior_weight=prior_weight,
            snr_gamma=snr_gamma,
            base=base and base(frozen),
        )
        return losses.loss, losses

    gradient = hold(mean_gradient(loss_of_part, accumulate, batch_size))

    def step(state: TrainState, frozen: Params, data: TrainingData, key: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        batch = draw(data, process, batch_size, key, state.step, example_shape, augment, paired, dropout)
        grads, losses, for_optimizer = gradient(state.trainable, frozen, batch)
        norm = _global_norm(grads)
        after = apply_gradients(optimizer, state, for_optimizer(norm), norm, largest_magnitudes(grads), ema_decay)
        return after, Metrics(*losses, norm)

    return step


def mean_gradient(
    loss: Callable[[Params, Params, Batch], tuple[Scalar, Losses]], parts: int, num_instance: int
) -> Gradient:
    """The gradient of `loss` for its first argument, and the losses: means over `parts` equal parts of the batch, each
    with its share of the `num_instance` instance examples and of the prior examples."""
    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        return gradient

    def mean(trainable: Params, frozen: Params, batch: Batch) -> tuple[Params, Losses]:
        def add_part(total: Sums, batch: Batch) -> tuple[Sums, None]:
            return jax.tree.map(lambda a, b: a + b / parts, total, gradient(trainable, frozen, batch)), None

        halves = 1 if len(batch.x0) == num_instance else 2
        divided = jax.tree.map(lambda x: _divide(x, halves, parts), batch)
        shapes = jax.eval_shape(gradient, trainable, frozen, jax.tree.map(lambda x: x[0], divided))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add_part, zeros, divided)[0]

    return mean


def _divide(x: Array, halves: int, parts: int) -> Array:
    """[halves * parts * b, ...] -> [parts, halves * b, ...]."""
    by_half = x.reshape(halves, parts, -1, *x.shape[1:])
    return by_half.swapaxes(0, 1).reshape(parts, -1, *x.shape[1:])


def _global_norm(grads: Params) -> Scalar:
    """The norm over all gradients. Vectors are concatenated first: one reduction for each would be a seventh of all CPU
    kernels and slow compilation."""
    vectors, others = ([g for g in jax.tree.leaves(grads) if (g.ndim == 1) == flat] for flat in (True, False))
    return optax.tree.norm([jnp.concatenate(vectors), *others] if vectors else others)


def apply_gradients(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: Params,
    norm: Scalar,
    peaks: Params,
    ema_decay: Number | None,
) -> TrainState:
    """The state after the update by `grads`, whose global norm and largest magnitudes the optimizer is given."""
    optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable, grad_norm=norm, grad_peaks=peaks)
    trainable = optax.apply_updates(state.trainable, updates)
    ema = state.ema and optax.incremental_update(trainable, state.ema, 1.0 - _decay(ema_decay, state.step))
    return TrainState(state.step + 1, trainable, opt_state, ema)


def _decay(limit: Number, step: Int[Array, ""]) -> Scalar:
    """(1 + step) / (10 + step) up to `limit`: the average forgets the initial weights from the start instead of
    carrying them for 1 / (1 - limit) steps (tf.train.ExponentialMovingAverage with num_updates)."""
    return jnp.minimum(limit, (1 + step) / (10 + step))


def run_steps(
    step: Callable[..., tuple[TrainState, PyTree]], capacity: int
) -> Callable[..., tuple[TrainState, PyTree]]:
    """Builds `run(state, frozen, data, key, count) -> (state, metrics stacked [capacity])`, up to `capacity` steps on
    the device in one call.

    `count` is an array, so that the last, shorter call runs the same program: neither a second compile nor other
    rounding. Metrics from `count` on are 0.
    """
    step = jax.jit(step, inline=True)  # traced once, for its shapes and for the loop

    def run(
        state: TrainState, frozen: Params, data: PyTree, key: Key[Array, "..."], count: Int[Array, ""] | int
    ) -> tuple[TrainState, PyTree]:
        def body(i: Int[Array, ""], carry: tuple[TrainState, PyTree]) -> tuple[TrainState, PyTree]:
            state, log = carry
            state, metrics = step(state, frozen, data, key)
            return state, jax.tree.map(lambda all_, one: all_.at[i].set(one), log, metrics)

        shapes = jax.eval_shape(step, state, frozen, data, key)[1]
        empty = jax.tree.map(lambda one: jnp.zeros((capacity, *one.shape), one.dtype), shapes)
        return jax.lax.fori_loop(0, count, body, (state, empty))

    return run
