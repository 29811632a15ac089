"""Optimizers from optax, over flat trainable params."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from dreambooth_jax.diffusion.adam import scale_by_adam
from dreambooth_jax.diffusion.muon import scale_by_muon
from dreambooth_jax.models.params import Params

LR_SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "muon", "adafactor")
Number = float | Float[Array, ""]


def learning_rate(kind: str, peak: Number, *, warmup: int, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup` updates to `peak`, then constant, or linear or cosine decay to 0 at `steps`.

    Raises:
        ValueError: unknown kind, or a warm-up that is as long as the run.
    """
    if kind not in LR_SCHEDULES:
        raise ValueError(f"lr_schedule = {kind!r}; implemented: {', '.join(LR_SCHEDULES)}")
    if warmup >= steps:
        raise ValueError(f"lr_warmup_steps = {warmup} leaves nothing of {steps} steps")
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, steps - warmup),
        "cosine": optax.cosine_decay_schedule(peak, steps - warmup),
    }[kind]
    # The first update has 1/warmup of the peak, not 0.
    return (
        optax.join_schedules([lambda count: peak * (count + 1) / max(warmup, 1), after], [warmup]) if warmup else after
    )


def scale_by_name(factor: Callable[[str], Number]) -> optax.GradientTransformation:
    """Multiplies each named update by `factor(name)`: a per-module learning-rate multiplier."""

    def update(updates: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
        return {name: value * jnp.asarray(factor(name), value.dtype) for name, value in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def clip_by_global_norm(limit: Number) -> optax.GradientTransformationExtraArgs:
    """Scales updates whose norm over everything exceeds `limit` down to it (arXiv 1211.5063, algorithm 1).

    The keyword `grad_norm` gives a norm that is already known. Fusing the norm with the backward pass is free; optax's
    own clipping reads every gradient again.
    """

    def update(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree = None,
        *,
        grad_norm: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[PyTree, optax.OptState]:
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
        scale = limit / jnp.maximum(norm, limit)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_optimizer(
    name: str,
    rate: optax.Schedule,
    *,
    weight_decay: Number = 1e-2,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip_norm: Number | None = 1.0,
    moment_dtype: str = "float32",
    second_moment_dtype: str = "float32",
    multiplier: Callable[[str], Number] | None = None,
    decays: Callable[[str], bool] | None = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW (arXiv 1711.05101), Muon (diffusion.muon) or Adafactor (arXiv 1804.04235), after clipping by the global
    norm.

    Args:
        name: one of `OPTIMIZERS`.
        rate: update count -> learning rate.
        weight_decay: decoupled decay, multiplied by the learning rate in all.
        b1, b2, eps: constants of AdamW.
        clip_norm: limit of the gradient's global norm; None for no clipping.
        moment_dtype: dtype of the first moment of AdamW or Muon: "float32", "bfloat16" or, for AdamW, "int8".
        second_moment_dtype: dtype of AdamW's second moment, likewise; rounded at random where it is not float32.
        multiplier: parameter name -> factor on its learning rate.
        decays: parameter name -> whether weight decay applies; None for all.
        mesh: see `scale_by_muon`.

    Raises:
        ValueError: unknown name, or Muon with a moment in int8.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer = {name!r}; implemented: {', '.join(OPTIMIZERS)}")
    if name == "muon" and moment_dtype == "int8":
        raise ValueError("moment_dtype = 'int8': not implemented for optimizer = 'muon'; expected float32 or bfloat16")
    mask = None if decays is None else lambda params: {name: decays(name) for name in params}
    if name == "adafactor":  # optax's own does not multiply its decay by the learning rate
        scale = [optax.adafactor(None, multiply_by_parameter_scale=False, clipping_threshold=1.0), optax.scale(-1.0)]
    elif name == "muon":
        scale = [scale_by_muon(optax.scale_by_adam(b1, b2, eps), moment_dtype=moment_dtype, mesh=mesh)]
    elif moment_dtype == "int8" or second_moment_dtype != "float32":
        scale = [scale_by_adam(b1, b2, eps, moment_dtype, second_moment_dtype, clip_norm)]
    else:
        scale = [optax.scale_by_adam(b1, b2, eps, mu_dtype=moment_dtype)]
    core = optax.chain(*scale, optax.add_decayed_weights(weight_decay, mask), optax.scale_by_learning_rate(rate))
    clip = [] if clip_norm is None else [clip_by_global_norm(clip_norm)]
    return optax.chain(*clip, core, *([scale_by_name(multiplier)] if multiplier else []))
