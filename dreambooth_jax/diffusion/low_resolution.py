"""The low-resolution picture on which a super-resolution stage is conditioned, and the noise on it.

    low = sqrt(1 - v) enlarged(picture) + sqrt(v) z,   z ~ N(0, 1)

Noise on the condition makes a stage robust against the errors of the one before it (arXiv 2106.15282, section 4.2).
DreamBooth lowers its variance v from 1e-3 to 1e-5 while it tunes the stage, so that the stage learns fine detail of the
subject (arXiv 2208.12242, supplement). The level of the noise is a condition of the model, in training and sampling
alike: the timestep of the stage's own schedule whose variance sigma^2 is nearest to v.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dreambooth_jax.ops.pixels import from_bytes

UNIFORM = "uniform"
Cond = dict[str, Array | np.ndarray]


class LowResolution(NamedTuple):
    """How a super-resolution stage takes the picture of the stage before.

    Attributes:
        factor: side of its pictures over that of the stage before.
        enlarged: whether the picture is enlarged before noise is added, or goes in as small as it is.
        sigma: standard deviation of the noise at every level, [T], float64.
        usual_level: level at which published pictures of an untuned stage are painted.
    """

    factor: int
    enlarged: bool
    sigma: np.ndarray
    usual_level: int

    def nearest_level(self, variance: float) -> int:
        """The level whose variance is nearest."""
        return int(np.argmin(np.abs(self.sigma**2 - variance)))

    def levels(self, noise: str) -> range:
        """The levels on which a stage was trained with `noise`, "uniform" or a variance."""
        if noise == UNIFORM:
            return range(len(self.sigma))
        level = self.nearest_level(float(noise))
        return range(level, level + 1)

    def sampling_level(self, noise: str, level: int | None = None) -> int:
        """The level to paint at: `level`, by default that of training, or the usual one after uniform training.

        Raises:
            ValueError: the stage was not trained on `level`; names those that it was.
        """
        trained = self.levels(noise)
        if level is None:
            return self.usual_level if noise == UNIFORM else trained[0]
        if level not in trained:
            known = f"{trained[0]}" if len(trained) == 1 else f"0 to {trained[-1]}"
            raise ValueError(
                f"noise_level = {level}: this stage was trained with sr_noise = {noise}, on level {known} alone; "
                "paint at that level, or train with another sr_noise"
            )
        return level


def make_augment(
    low: LowResolution, side: int, noise: str, level: int | Int[Array, ""] | None = None
) -> Callable[[Cond, Key[Array, ""]], Cond]:
    """Builds `augment(condition of one example, key)`: turns its "low", uint8 [h*w*3], into the float picture that goes
    into the model, in [-1, 1] before noise, and adds its "level".

    Args:
        side: side in pixels of the stage's own pictures.
        noise: "uniform", for a level drawn per example, or a variance: 1e-5 lies below level 0 of IF's schedule.
        level: the level where `noise` is "uniform", for sampling; None draws it.
    """
    small, variances = side // low.factor, jnp.asarray(low.sigma**2, jnp.float32)
    weights = _bilinear(small, side) if low.enlarged else np.eye(small, dtype=np.float32)

    def augment(cond: Cond, key: Key[Array, ""]) -> Cond:
        level_key, noise_key = jax.random.split(key)
        if noise != UNIFORM:
            number, variance = jnp.int32(low.nearest_level(float(noise))), jnp.float32(float(noise))
        else:
            number = jax.random.randint(level_key, (), 0, len(low.sigma)) if level is None else jnp.int32(level)
            variance = variances[number]
        clean = from_bytes(cond["low"].reshape(small, small, 3))
        enlarged = jnp.einsum("Hh,Ww,hwc->HWc", weights, weights, clean, precision="highest")
        z = jax.random.normal(noise_key, enlarged.shape)
        return cond | {"low": jnp.sqrt(1 - variance) * enlarged + jnp.sqrt(variance) * z, "level": number}

    return augment


def _bilinear(small: int, large: int) -> Float[np.ndarray, "large small"]:
    """Weights of bilinear interpolation whose first and last samples are those of the small picture, as IF has it."""
    place = np.linspace(0, small - 1, large)[:, None]
    return np.maximum(0, 1 - np.abs(place - np.arange(small))).astype(np.float32)
