"""The DreamBooth loss (arXiv 2208.12242, equation 2, in the notation of process.py).

    L = mean_instance ||target - f(x_t, t, c)||^2 + lambda mean_prior ||target - f(x_t', t', c_class)||^2

Both means come from one forward pass over the concatenated batch. `f` is any `predict(params, x_t, t, cond)`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Real

from dreambooth_jax.diffusion.process import Process, corrupt, snr_weight, target

Predict = Callable[[PyTree, Array, Array, PyTree], Array]


class Batch(NamedTuple):
    """A training batch with its noise: instance examples first, then prior examples.

    Attributes:
        x0: clean latents or pixels [b, ...].
        eps: standard normal noise, like x0.
        t: times, [b]: integers for a table of noise levels, real for a flow.
        cond: what `predict` takes as condition: any pytree with leading axis b.
        weight: weights of the squared errors, like x0 with one channel, not all 0 in any example; None: equal ones.
    """

    x0: Float[Array, "b ..."]
    eps: Float[Array, "b ..."]
    t: Real[Array, "b"]
    cond: PyTree
    weight: Float[Array, "b ..."] | None = None


class Losses(NamedTuple):
    """Scalars: `loss` = `instance` + lambda `prior`; `prior` is 0 without prior examples."""

    loss: Float[Array, ""]
    instance: Float[Array, ""]
    prior: Float[Array, ""]


def dreambooth_loss(
    predict: Predict,
    params: PyTree,
    batch: Batch,
    process: Process,
    *,
    num_instance: int,
    prior_weight: float | Float[Array, ""] = 1.0,
    snr_gamma: float | Float[Array, ""] | None = None,
    base: PyTree = None,
) -> Losses:
    """The prior-preserving loss of one batch.

    Args:
        predict: (params, x_t, t, cond) -> prediction like x_t.
        params: whatever `predict` takes; gradients flow to it.
        batch: the first `num_instance` examples show the subject, the rest the class.
        process: noise levels and prediction.
        num_instance: static; the batch's size turns prior preservation off.
        prior_weight: lambda.
        snr_gamma: min-SNR-gamma weighting of every example, in both halves; None for none.
        base: params of the frozen model, whose predictions are the prior half's targets; None: the noise's targets.
    """
    xt = corrupt(process, batch.x0, batch.eps, batch.t)
    prediction = predict(params, xt, batch.t, batch.cond).astype(jnp.float32)
    wanted = target(process, batch.x0, batch.eps, batch.t)
    if base is not None:
        prior = jax.tree.map(lambda x: x[num_instance:], (xt, batch.t, batch.cond))
        of_base = jax.lax.stop_gradient(predict(base, *prior)).astype(jnp.float32)
        wanted = jnp.concatenate([wanted[:num_instance], of_base])
    error = jnp.square(prediction - wanted)
    if batch.weight is not None:
        error = error * batch.weight / jnp.mean(batch.weight, range(1, xt.ndim), keepdims=True)
    error = error.mean(range(1, xt.ndim))
    if snr_gamma is not None:
        error = error * snr_weight(process, batch.t, snr_gamma)
    instance = error[:num_instance].mean()
    prior = error[num_instance:].mean() if len(error) > num_instance else jnp.zeros(())
    return Losses(instance + prior_weight * prior, instance, prior)
