"""Stable Diffusion's x4 upscaler: a latent stage that enlarges pictures, the cascade's third.

Its autoencoder has a factor of 4, so that the low-resolution picture has the size of the latents and is not enlarged:
the UNet sees it behind them. The level of the noise on it has a row in a table of the UNet.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dreambooth_jax.diffusion.low_resolution import LowResolution
from dreambooth_jax.diffusion.schedulers import process_from_scheduler
from dreambooth_jax.families import sd
from dreambooth_jax.families.family import NOISE_LEVEL, Cond, Models
from dreambooth_jax.families.imagen import of_example
from dreambooth_jax.models.params import Params

_LOW = "low_res_scheduler"


def problems(models: Models) -> list[str]:
    """What does not fit between text encoder, UNet and autoencoder."""
    unet, vae, width = models.specs["unet"], models.specs["vae"], models.specs["text_encoder"].hidden_size
    found = []
    if {width} != set(unet.cross_attention_dim):
        found.append(f"text encoder of width {width}, UNet cross_attention_dim {unet.cross_attention_dim}")
    if unet.in_channels != vae.latent_channels + 3 or unet.out_channels != vae.latent_channels:
        found.append(
            f"UNet in_channels {unet.in_channels}, out_channels {unet.out_channels}, expected "
            f"{vae.latent_channels + 3} (latents and colours) and {vae.latent_channels}"
        )
    if not unet.num_class_embeds:
        found.append("UNet num_class_embeds = None (it needs the levels of the noise on the low-resolution picture)")
    return found


def predict(models: Models, params: Params, xt: Array, t: Array, cond: Cond) -> Array:
    return with_deep(models, params, xt, t, cond, None)[0]


def with_deep(
    models: Models, params: Params, xt: Array, t: Array, cond: Cond, deep: Array | None
) -> tuple[Array, Array]:
    texts = len(cond["low"]) // len(xt)  # of a picture, whose other conditions are the same
    low, level = (cond[name][::texts] for name in ("low", "level"))
    x = jnp.concatenate([xt, low.astype(xt.dtype)], -1)
    return models.apply("unet", params, deep, x, t, cond["states"], level, method="with_deep")


def low_resolution(models: Models) -> LowResolution:
    config = models.configs[_LOW]
    known = {name: value for name, value in config.items() if name != "clip_sample"}  # it only adds noise
    levels = np.arange(config.get("num_train_timesteps", 1000))
    sigma = np.asarray(process_from_scheduler(known).sigma(levels), np.float64)
    return LowResolution(models.specs["vae"].downscale, False, sigma, models.configs["index"].get(NOISE_LEVEL, 20))


FAMILY = sd.FAMILY._replace(
    name="StableDiffusionUpscalePipeline",
    parts={**sd.FAMILY.parts, "vae": sd.VAE},  # decodes in float32
    schedulers=("scheduler", _LOW),
    problems=problems,
    predict=predict,
    with_deep=with_deep,
    guidance=9.0,
    of_example=of_example,
    low_resolution=low_resolution,
)
