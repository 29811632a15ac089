"""The embedded base's UNet and text tower, trained on pictures that the step itself composes and encodes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreambooth_jax.diffusion.process import Process, corrupt, target
from dreambooth_jax.models.params import Functional, Params, under_prefix
from dreambooth_jax.ops.pixels import from_bytes
from dreambooth_jax.tiny.contrastive import Loss, Pictures


def unet_loss(
    vae: Functional,
    unet: Functional,
    tower: Functional,
    process: Process,
    *,
    times: int,
    scale: float,
    empty: tuple[int, ...],
    unconditional: float,
    t_power: float,
) -> Loss:
    """||target - f(x_t, t, c)||^2 of latent diffusion (arXiv 2112.10752, equation 3).

    Args:
        vae, unet, tower: autoencoder, UNet and text tower, named "vae.", "unet." and "text_encoder." in the parameters.
        process: noise levels and the prediction.
        times: T, number of the training times.
        scale: factor on the latents, `scaling_factor` of the autoencoder.
        empty: token ids of the empty caption.
        unconditional: share of examples without caption, for classifier-free guidance.
        t_power: t = T u^t_power of a uniform u: above 1, fewer draws at the noisiest levels.
    """

    def loss(params: Params, batch: Pictures, key: Array) -> Float[Array, ""]:
        posterior_key, eps_key, t_key, drop_key = jax.random.split(key, 4)
        mean, logvar = vae.apply(under_prefix("vae.", params), from_bytes(batch.images), method="encode")
        x0 = mean + jnp.exp(0.5 * logvar) * jax.random.normal(posterior_key, mean.shape)
        x0 = jax.lax.stop_gradient(x0.astype(jnp.float32)) * scale
        eps = jax.random.normal(eps_key, x0.shape)
        uniform = jax.random.uniform(t_key, (len(x0),))
        t = jnp.minimum(times * uniform**t_power, times - 1).astype(jnp.int32)
        dropped = jax.random.bernoulli(drop_key, unconditional, (len(x0), 1))
        ids = jnp.where(dropped, jnp.asarray(empty), batch.ids)
        states = tower.apply(under_prefix("text_encoder.", params), ids)
        prediction = unet.apply(
            under_prefix("unet.", params), corrupt(process, x0, eps, t), t.astype(jnp.float32), states
        )
        return jnp.square(prediction.astype(jnp.float32) - target(process, x0, eps, t)).mean()

    return loss
