"""The forward process and what the model predicts.

    x_t = alpha_t x0 + sigma_t eps,   alpha_t^2 + sigma_t^2 = 1,   alpha_t^2 = prod_{s <= t} (1 - beta_s)

(arXiv 2006.11239, equation 4). The model predicts eps, or v = alpha_t eps - sigma_t x0 (arXiv 2202.00512, appendix D).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dreambooth_jax.models.spec import UnsupportedConfig

PREDICTIONS = ("epsilon", "v_prediction")


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """alpha_t and sigma_t for every training timestep, and how samplers space their steps.

    Attributes:
        alpha, sigma: [T], float64 on the host: samplers subtract nearly equal numbers of them.
        prediction: "epsilon" or "v_prediction".
        spacing: "leading", "linspace" or "trailing" (arXiv 2305.08891, table 2); None leaves it to the sampler.
        steps_offset: added to "leading" timesteps.
        final_alpha_one: whether the last DDIM step goes to the clean image or to timestep 0.
    """

    alpha: np.ndarray
    sigma: np.ndarray
    prediction: str
    spacing: str | None = None
    steps_offset: int = 0
    final_alpha_one: bool = True

    @property
    def T(self) -> int:
        return len(self.alpha)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """Reads scheduler_config.json of any of diffusers' schedulers. What is absent has the default that all of
        them share, or of the DDIM scheduler: `from_config` would give the same.

        Raises:
            UnsupportedConfig: naming every field that asks for something not implemented.
        """
        prediction, zero_snr = config.get("prediction_type", "epsilon"), config.get("rescale_betas_zero_snr", False)
        problems = [
            f"{name} = {config[name]!r} (implemented: {' or '.join(map(repr, values))})"
            for name, values in _IMPLEMENTED.items()
            if name in config and config[name] not in values
        ]
        if config.get("clip_sample", config.get("_class_name") in _CLIP_BY_DEFAULT):
            problems.append("clip_sample (set it to false: latents are not images)")
        if zero_snr and prediction == "epsilon":
            problems.append("rescale_betas_zero_snr without v_prediction (noise alone tells nothing of x0)")
        if problems:
            raise UnsupportedConfig("scheduler_config.json: not supported: " + "; ".join(problems))
        alpha_bar = np.cumprod(1.0 - _betas(config))
        if zero_snr:
            alpha_bar = _rescale_zero_snr(alpha_bar)
        return cls(
            alpha=np.sqrt(alpha_bar),
            sigma=np.sqrt(1.0 - alpha_bar),
            prediction=prediction,
            spacing=config.get("timestep_spacing"),
            steps_offset=config.get("steps_offset", 0),
            final_alpha_one=config.get("set_alpha_to_one", True),
        )


_CLIP_BY_DEFAULT = ("DDIMScheduler", "DDPMScheduler")
_IMPLEMENTED = {
    "prediction_type": PREDICTIONS,
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "trained_betas": (None,),
    "thresholding": (False,),
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
}


def _betas(config: Mapping[str, Any]) -> np.ndarray:
    """beta_t in float64 for the three schedules of the format."""
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    count = config.get("num_train_timesteps", 1000)
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        return np.linspace(start, end, count)
    if kind == "scaled_linear":
        return np.linspace(math.sqrt(start), math.sqrt(end), count) ** 2
    # arXiv 2102.09672, equation 17
    alpha_bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def _rescale_zero_snr(alpha_bar: np.ndarray) -> np.ndarray:
    """sqrt(alpha_bar) shifted and scaled: it begins where it did and ends at 0 (arXiv 2305.08891, algorithm 1)."""
    root = np.sqrt(alpha_bar)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def at(values: np.ndarray, t: Int[Array, "b"], ndim: int) -> Array:
    """values[t], float32, shaped to multiply a batch of `ndim` axes."""
    return jnp.asarray(values, jnp.float32)[t].reshape(-1, *(1,) * (ndim - 1))


def corrupt(
    schedule: Schedule, x0: Float[Array, "b ..."], eps: Float[Array, "b ..."], t: Int[Array, "b"]
) -> Float[Array, "b ..."]:
    """x_t = alpha_t x0 + sigma_t eps (arXiv 2006.11239, equation 4)."""
    return at(schedule.alpha, t, x0.ndim) * x0 + at(schedule.sigma, t, x0.ndim) * eps


def target(
    schedule: Schedule, x0: Float[Array, "b ..."], eps: Float[Array, "b ..."], t: Int[Array, "b"]
) -> Float[Array, "b ..."]:
    """What the model should predict: eps, or v = alpha_t eps - sigma_t x0."""
    if schedule.prediction == "epsilon":
        return eps
    return at(schedule.alpha, t, x0.ndim) * eps - at(schedule.sigma, t, x0.ndim) * x0


def predicted_x0(prediction: str, output: Array, xt: Array, alpha: Array, sigma: Array) -> Array:
    """x0 from the model's output: (x_t - sigma eps) / alpha, or alpha x_t - sigma v."""
    return (xt - sigma * output) / alpha if prediction == "epsilon" else alpha * xt - sigma * output


def snr_weight(schedule: Schedule, t: Int[Array, "b"], gamma: float) -> Float[Array, "b"]:
    """Min-SNR-gamma weight of the squared error (arXiv 2303.09556, section 3.4): min(snr, gamma) / snr for eps,
    min(snr, gamma) / (snr + 1) for v, with snr = alpha^2 / sigma^2. Finite also where snr is 0."""
    alpha2, sigma2 = np.square(schedule.alpha), np.square(schedule.sigma)
    capped = np.minimum(alpha2, gamma * sigma2)  # min(snr, gamma) sigma^2
    weight = capped / alpha2 if schedule.prediction == "epsilon" else capped
    return jnp.asarray(weight, jnp.float32)[t]
