"""Deterministic samplers of the probability-flow ODE with classifier-free guidance.

With x0 the model's estimate of the clean image, DDIM, Euler and DPM-Solver++(2M) are all linear in what they know:

    x_{i+1} = a_i x_i + b_i x0_i + c_i x0_{i-1}

so a sampler is a table of coefficients, computed once in float64, and one scan over it:

* DDIM (arXiv 2010.02502, equation 12, eta = 0): a = sigma'/sigma, b = alpha' - alpha sigma'/sigma, c = 0.
* Euler on dx/ds = (x - x0)/s of the variance-exploding form s = sigma/alpha (arXiv 2206.00364, algorithm 1): the same
  coefficients, at other timesteps and ending at s = 0.
* DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): x' = sigma'/sigma x - alpha' (e^{-h} - 1) D, with h the step in
  lambda = log(alpha/sigma) and D = x0_i + (x0_i - x0_{i-1}) / (2 r).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dreambooth_jax.diffusion.loss import Predict
from dreambooth_jax.diffusion.process import Schedule, predicted_x0

SAMPLERS = ("ddim", "dpm++", "euler")
_DEFAULT_SPACING = {"ddim": "leading", "dpm++": "linspace", "euler": "linspace"}


class Table(NamedTuple):
    """What a sampler does, one row per step, and the scale of the noise that it starts from."""

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    init_scale: float


def sampler_table(schedule: Schedule, sampler: str, steps: int) -> Table:
    """The coefficients of `sampler` in `steps` model calls, float64, equal to those of diffusers' schedulers.

    Raises:
        ValueError: unknown sampler, or a number of steps that the training timesteps do not hold.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler = {sampler!r}; implemented: {', '.join(SAMPLERS)}")
    spacing = schedule.spacing or _DEFAULT_SPACING[sampler]
    t = _timesteps(schedule, sampler, spacing, steps) if 1 <= steps <= schedule.T else np.zeros(0)
    if not (t.size and t[0] < schedule.T and np.all(np.diff(t) < 0)):
        most = f"fewer than the {schedule.T} training timesteps, for {sampler} at {spacing} spacing"
        raise ValueError(f"{steps} sampling steps: expected at least 1 and {most}")
    return {"ddim": _ddim, "dpm++": _dpm, "euler": _euler}[sampler](schedule, t)


def _timesteps(schedule: Schedule, sampler: str, spacing: str, steps: int) -> np.ndarray:
    """Descending timesteps (arXiv 2305.08891, table 2)."""
    # DPM-Solver++ counts the clean image, to which its last step goes, as one of those it spaces out.
    count = steps + 1 if sampler == "dpm++" else steps
    if spacing == "linspace":
        t = np.linspace(0, schedule.T - 1, count)[::-1][:steps]
        return t if sampler == "euler" else np.round(t).astype(int)
    if spacing == "leading":
        return (np.arange(count) * (schedule.T // count))[::-1][:steps] + schedule.steps_offset
    # The reference's own expression: halves, and what rounding makes of them, decide between neighbours.
    return np.round(np.arange(schedule.T, 0, -schedule.T / steps)[:steps]).astype(int) - 1


def _first_order(t, alpha, sigma, next_alpha, next_sigma, init_scale: float = 1.0) -> Table:
    a = next_sigma / sigma
    return Table(t, alpha, sigma, a, next_alpha - alpha * a, np.zeros_like(a), init_scale)


def _ddim(schedule: Schedule, t: np.ndarray) -> Table:
    end = (1.0, 0.0) if schedule.final_alpha_one else (schedule.alpha[0], schedule.sigma[0])
    # diffusers steps by T // steps rather than to the next timestep of the list; the two differ for linspace only.
    earlier = t - schedule.T // len(t)
    next_alpha = np.where(earlier >= 0, schedule.alpha[earlier], end[0])
    next_sigma = np.where(earlier >= 0, schedule.sigma[earlier], end[1])
    return _first_order(t, schedule.alpha[t], schedule.sigma[t], next_alpha, next_sigma)


def _never_zero(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma, with alpha^2 = 2^-24 in place of a 0 at the end of a zero-SNR schedule: quotients and logarithms
    of them stay finite. The reference has the same number."""
    zero = schedule.alpha == 0
    return np.where(zero, 2.0**-12, schedule.alpha), np.where(zero, np.sqrt(1 - 2.0**-24), schedule.sigma)


def _euler(schedule: Schedule, t: np.ndarray) -> Table:
    alpha, sigma = _never_zero(schedule)
    s = np.interp(t, np.arange(schedule.T), sigma / alpha)
    alpha, sigma = 1 / np.hypot(1, s), s / np.hypot(1, s)
    init_scale = 1.0 if schedule.spacing == "leading" else sigma[0]
    return _first_order(t, alpha, sigma, np.append(alpha[1:], 1), np.append(sigma[1:], 0), init_scale)


def _dpm(schedule: Schedule, t: np.ndarray) -> Table:
    alpha, sigma = (values[t] for values in _never_zero(schedule))
    table = _first_order(t, alpha, sigma, np.append(alpha[1:], 1), np.append(sigma[1:], 0))
    # Second order from the second step on; the last step goes to lambda = infinity, where only the first is defined.
    h = np.diff(np.log(alpha) - np.log(sigma))
    gain = np.zeros(len(t))
    gain[1:-1] = -alpha[2:] * np.expm1(-h[1:]) / (2 * h[:-1] / h[1:])
    return table._replace(b=table.b + gain, c=-gain)


def make_sampler(
    predict: Predict, schedule: Schedule, *, sampler: str = "ddim", steps: int = 50
) -> Callable[..., Float[Array, "b ..."]]:
    """Builds `sample(params, noise, cond, uncond, guidance) -> x0`, to be jitted by the caller.

    Args:
        predict: (params, x_t, t, cond) -> prediction like x_t.
        schedule: the model's noise levels.
        sampler: one of `SAMPLERS`.
        steps: model calls.

    The returned function takes
        params: of `predict`;
        noise: standard normal, [b, ...];
        cond, uncond: pytrees with leading axis b; `uncond` holds the negative prompts, or is None for no guidance;
        guidance: scale w of uncond + w (cond - uncond) (arXiv 2207.12598, equation 6 with w = 1 + w'); scalar.
    Both conditions go through the model in one batch of 2b.
    """
    table = sampler_table(schedule, sampler, steps)
    rows = jax.tree.map(lambda column: jnp.asarray(column, jnp.float32), table._replace(init_scale=None))

    def sample(params: Any, noise: Float[Array, "b ..."], cond: Any, uncond: Any, guidance: Float[Array, ""] | float):
        both = cond if uncond is None else jax.tree.map(lambda *pair: jnp.concatenate(pair), uncond, cond)

        def guided(x, t):
            if uncond is None:
                return predict(params, x, jnp.full(len(x), t), both).astype(jnp.float32)
            output = predict(params, jnp.concatenate([x, x]), jnp.full(2 * len(x), t), both).astype(jnp.float32)
            without, with_ = jnp.split(output, 2)
            return without + guidance * (with_ - without)

        def body(carry, row):
            x, before = carry
            x0 = predicted_x0(schedule.prediction, guided(x, row.t), x, row.alpha, row.sigma)
            return (row.a * x + row.b * x0 + row.c * before, x0), None

        start = noise * jnp.float32(table.init_scale)
        return jax.lax.scan(body, (start, jnp.zeros_like(noise)), rows)[0][0]

    return sample


def noise_for_seeds(seeds: Array, shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Standard normal noise [b, *shape], image i from `seeds[i]` alone: the same in any batch, on any device."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(jnp.asarray(seeds, jnp.uint32))
