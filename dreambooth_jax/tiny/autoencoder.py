"""The embedded base's autoencoder: its loss, and latents of mean 0 and variance 1 in every channel."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreambooth_jax.models.params import Functional, Params, under_prefix
from dreambooth_jax.ops.pixels import from_bytes
from dreambooth_jax.tiny.contrastive import Loss, Pictures


def vae_loss(vae: Functional, lpips: Functional | None, *, kl_weight: float, lpips_weight: float) -> Loss:
    """Absolute error of pixels and of their differences to the neighbours, LPIPS, and a little KL (arXiv 2112.10752,
    section 3.1).

    Args:
        vae: the autoencoder, named "vae." in the parameters.
        lpips: the perceptual distance, named "lpips."; None for none.
        kl_weight: of the KL divergence to a standard normal, summed over a picture's latents.
        lpips_weight: of the perceptual distance.
    """

    def loss(params: Params, batch: Pictures, key: Array) -> Float[Array, ""]:
        x, own = from_bytes(batch.images), under_prefix("vae.", params)
        mean, logvar = vae.apply(own, x, method="encode")
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        again = vae.apply(own, z, method="decode")
        error = again - x
        edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).sum((1, 2, 3)).mean()
        total = jnp.abs(error).mean() + jnp.square(error).mean() + 0.5 * edges + kl_weight * kl
        if lpips is not None:
            total += lpips_weight * lpips.apply(under_prefix("lpips.", params), again, x).mean()
        return total

    return loss


def normalise_latents(params: Params, mean: Float[Array, "c"], std: Float[Array, "c"]) -> Params:
    """The same autoencoder with the latents (z - mean) / std: both are folded into the 1x1 convolutions around them.

    Args:
        params: of an AutoencoderKL, unprefixed.
        mean, std: of the latents of a data set, per channel.
    """
    kernel, bias = params["quant_conv.kernel"], params["quant_conv.bias"]  # channels: c of mean, c of log variance
    scale = jnp.concatenate([1 / std, jnp.ones_like(std)])
    shift = jnp.concatenate([-mean / std, -2 * jnp.log(std)])
    back, back_bias = params["post_quant_conv.kernel"], params["post_quant_conv.bias"]
    return params | {
        "quant_conv.kernel": kernel * scale,
        "quant_conv.bias": bias * scale + shift,
        "post_quant_conv.kernel": back * std[:, None],
        "post_quant_conv.bias": back_bias + mean @ back[0, 0],
    }
