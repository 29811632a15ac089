"""Reads scheduler_config.json, which diffusers' schedulers write, as a `Process`.

Training needs the noise levels and the prediction. Spacing, offset and end of the sampler's steps are those of
diffusers' own schedulers. Other fields, which only some samplers read, are ignored with one line in the log.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dreambooth_jax.diffusion.process import PREDICTIONS, Nodes, Process, flow_process, shifted, table_process
from dreambooth_jax.models.spec import UnsupportedConfig

FLOW = "FlowMatchEulerDiscreteScheduler"
_SPACINGS = ("leading", "linspace", "trailing")  # arXiv 2305.08891, table 2
_DEFAULT_SPACING = {"ddim": "leading", "ddpm": "leading", "dpm++": "linspace", "euler": "linspace"}
_TRAINING = {"prediction_type": tuple(PREDICTIONS), "trained_betas": (None,)}
# Fields that only samplers read -> the values that this library's samplers assume. Spacing None: each sampler's own.
_SAMPLING = {
    "clip_sample": (False,),
    "thresholding": (False,),
    "timestep_spacing": (*_SPACINGS, None),
    "timestep_type": ("discrete",),
    "interpolation_type": ("linear",),
    "final_sigmas_type": ("zero",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None,),
    "stochastic_sampling": (False,),
}


def process_from_scheduler(config: Mapping[str, Any]) -> Process:
    """The process that a scheduler_config.json describes. Absent fields take diffusers' defaults (DDIM's where
    schedulers differ). One line of the log names the fields that only samplers read and that ours do not implement.

    Raises:
        UnsupportedConfig: names every field that would change training and is not implemented.
    """
    flow = config.get("_class_name") == FLOW
    ignored = [
        f"{name} = {config[name]!r}" for name, known in _SAMPLING.items() if config.get(name, known[0]) not in known
    ]
    problems = _flow_problems(config) if flow else _table_problems(config)
    if problems:
        raise UnsupportedConfig("scheduler_config.json: not supported: " + "; ".join(problems))
    if ignored:
        logging.warning("scheduler_config.json: training does not need and sampling ignores %s", ", ".join(ignored))
    return _flow(config) if flow else _table(config)


def clip_from_scheduler(config: Mapping[str, Any]) -> Callable[[Array], Array] | None:
    """What a scheduler_config.json does to estimates of x0, for models of pixels: dynamic thresholding (arXiv
    2205.11487, section 2.3), clipping, or nothing.

    Dynamic thresholding divides by s, the quantile of |x0| of each picture, where that lies in [1, sample_max_value].

    Raises:
        UnsupportedConfig: a bound is no number.
    """
    if problems := _no_numbers(config, "sample_max_value", "dynamic_thresholding_ratio", "clip_sample_range"):
        raise UnsupportedConfig("scheduler_config.json: not supported: " + "; ".join(problems))
    most, ratio = config.get("sample_max_value", 1.0), config.get("dynamic_thresholding_ratio", 0.995)
    if config.get("thresholding", False):
        return lambda x0: _threshold(x0, ratio, most)
    extent = config.get("clip_sample_range", 1.0)
    return (lambda x0: jnp.clip(x0, -extent, extent)) if config.get("clip_sample", True) else None


def _threshold(x0: Float[Array, "b h w c"], ratio: float, most: float) -> Float[Array, "b h w c"]:
    s = jnp.quantile(jnp.abs(x0.reshape(len(x0), -1)), ratio, axis=1)
    s = jnp.clip(s, 1.0, most)[:, None, None, None]
    return jnp.clip(x0, -s, s) / s


def _no_numbers(config: Mapping[str, Any], *names: str, kinds: tuple[type, ...] = (int, float)) -> list[str]:
    """The fields of these names whose values are no numbers, in words."""
    words = "a number" if float in kinds else "a whole number"
    return [f"{n} = {config[n]!r} (expected {words})" for n in names if n in config and type(config[n]) not in kinds]


def _table_problems(config: Mapping[str, Any]) -> list[str]:
    known = _TRAINING | {"beta_schedule": tuple(_BETAS)}
    problems = [
        f"{name} = {config[name]!r} (implemented: {' or '.join(map(repr, values))})"
        for name, values in known.items()
        if name in config and config[name] not in values
    ]
    problems += _no_numbers(config, "beta_start", "beta_end")
    problems += _no_numbers(config, "num_train_timesteps", "steps_offset", kinds=(int,))
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") == "epsilon":
        problems.append("rescale_betas_zero_snr with epsilon (noise alone does not determine x0: use v_prediction)")
    return problems


def _flow_problems(config: Mapping[str, Any]) -> list[str]:
    problems = ["invert_sigmas = True (implemented: False)"] if config.get("invert_sigmas") else []
    return problems + _no_numbers(config, "shift") + _no_numbers(config, "num_train_timesteps", kinds=(int,))


_BETAS: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "linear": lambda start, end, count: np.linspace(start, end, count),
    "scaled_linear": lambda start, end, count: np.linspace(math.sqrt(start), math.sqrt(end), count) ** 2,
    "squaredcos_cap_v2": lambda start, end, count: _cosine_betas(count),
}


def _cosine_betas(count: int) -> np.ndarray:
    """arXiv 2102.09672, equation 17."""
    alpha_bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def _table(config: Mapping[str, Any]) -> Process:
    """alpha_t^2 = prod_{s <= t} (1 - beta_s), sigma_t^2 = 1 - alpha_t^2 (arXiv 2006.11239, equation 4)."""
    betas = _BETAS[config.get("beta_schedule", "linear")]
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    alpha_bar = np.cumprod(1.0 - betas(start, end, config.get("num_train_timesteps", 1000)))
    if config.get("rescale_betas_zero_snr"):
        alpha_bar = _rescale_zero_snr(alpha_bar)
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)
    prediction, spacing = config.get("prediction_type", "epsilon"), config.get("timestep_spacing")
    offset, final_one = config.get("steps_offset", 0), config.get("set_alpha_to_one", True)

    def nodes(grid: str, steps: int) -> Nodes:
        rule = spacing if spacing in _SPACINGS else _DEFAULT_SPACING[grid]
        t = _times(grid, rule, offset, len(alpha), steps)
        at, after, init_scale = _LEVELS[grid](alpha, sigma, t, rule, steps, final_one)
        return Nodes(t, *at, *PREDICTIONS[prediction](*at), *after, init_scale)

    return table_process(alpha, sigma, prediction, nodes)


def _rescale_zero_snr(alpha_bar: np.ndarray) -> np.ndarray:
    """sqrt(alpha_bar) shifted and scaled: it begins where it did and ends at 0 (arXiv 2305.08891, algorithm 1)."""
    root = np.sqrt(alpha_bar)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def _times(grid: str, spacing: str, offset: int, count: int, steps: int) -> np.ndarray:
    """Descending times of a table with `count` of them.

    Raises:
        ValueError: the table does not hold that many steps.
    """
    t = _spaced(grid, spacing, offset, count, steps) if 1 <= steps <= count else np.zeros(0)
    if not (t.size and t[0] < count and np.all(np.diff(t) < 0)):
        most = f"fewer than the {count} training timesteps, for {grid} at {spacing} spacing"
        raise ValueError(f"{steps} sampling steps: expected at least 1 and {most}")
    return t


def _spaced(grid: str, spacing: str, offset: int, count: int, steps: int) -> np.ndarray:
    # DPM-Solver++ spaces out the clean image too, to which its last step goes.
    number = steps + 1 if grid == "dpm++" else steps
    if spacing == "linspace":
        t = np.linspace(0, count - 1, number)[::-1][:steps]
        return t if grid == "euler" else np.round(t).astype(int)
    if spacing == "leading":
        return (np.arange(number) * (count // number))[::-1][:steps] + offset
    # diffusers' own expression: rounding errors decide between neighbours where the exact value ends in a half.
    return np.round(np.arange(count, 0, -count / steps)[:steps]).astype(int) - 1


_Levels = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], float]


def _ddim_levels(
    alpha: np.ndarray, sigma: np.ndarray, t: np.ndarray, spacing: str, steps: int, final_one: bool
) -> _Levels:
    """Every step goes T // steps times back, whatever the spacing; the last one to the clean image or to time 0."""
    earlier = t - len(alpha) // steps
    end = (1.0, 0.0) if final_one else (alpha[0], sigma[0])
    after = (np.where(earlier >= 0, values[earlier], last) for values, last in zip((alpha, sigma), end, strict=True))
    return (alpha[t], sigma[t]), tuple(after), 1.0


def _ddpm_levels(
    alpha: np.ndarray, sigma: np.ndarray, t: np.ndarray, spacing: str, steps: int, final_one: bool
) -> _Levels:
    return (alpha[t], sigma[t]), _following(alpha[t], sigma[t]), 1.0


def _dpm_levels(
    alpha: np.ndarray, sigma: np.ndarray, t: np.ndarray, spacing: str, steps: int, final_one: bool
) -> _Levels:
    alpha, sigma = (values[t] for values in _never_zero(alpha, sigma))
    return (alpha, sigma), _following(alpha, sigma), 1.0


def _euler_levels(
    alpha: np.ndarray, sigma: np.ndarray, t: np.ndarray, spacing: str, steps: int, final_one: bool
) -> _Levels:
    """Levels at fractional times: sigma / alpha is interpolated."""
    alpha, sigma = _never_zero(alpha, sigma)
    s = np.interp(t, np.arange(len(alpha)), sigma / alpha)
    alpha, sigma = 1 / np.hypot(1, s), s / np.hypot(1, s)
    return (alpha, sigma), _following(alpha, sigma), 1.0 if spacing == "leading" else float(sigma[0])


_LEVELS: dict[str, Callable[..., _Levels]] = {
    "ddim": _ddim_levels,
    "ddpm": _ddpm_levels,
    "dpm++": _dpm_levels,
    "euler": _euler_levels,
}


def _following(alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The levels of the next node; the last step goes to the clean image."""
    return np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)


def _never_zero(alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma, with alpha^2 = 2^-24 in place of a 0 at the end of a zero-SNR schedule, as in diffusers:
    quotients and logarithms of them stay finite."""
    zero = alpha == 0
    return np.where(zero, 2.0**-12, alpha), np.where(zero, np.sqrt(1 - 2.0**-24), sigma)


def _flow(config: Mapping[str, Any]) -> Process:
    """Without dynamic shifting, training draws logit-normal times and shifts them once (as diffusers' script for SD3).
    With it, training draws unshifted uniform times (as the one for Flux), and sampling, where the shift would depend
    on the picture's size, does not shift."""
    dynamic, count = config.get("use_dynamic_shifting", False), config.get("num_train_timesteps", 1000)
    shift = 1.0 if dynamic else config.get("shift", 1.0)

    def nodes(grid: str, steps: int) -> Nodes:
        if steps < 1:
            raise ValueError(f"{steps} sampling steps: expected at least 1")
        # The scheduler shifts twice: the ends of its range are shifted already. Pipelines with dynamic shifting go
        # from 1 to 1 / steps instead.
        end = 1 / steps if dynamic else shifted(1 / count, shift)
        s = shifted(np.linspace(1.0, end, steps), shift)
        one = np.ones(steps)
        return Nodes(count * s, 1 - s, s, one, one, *_following(1 - s, s), 1.0)

    return flow_process(nodes, scale=float(count), shift=shift, logit_normal=not dynamic)
