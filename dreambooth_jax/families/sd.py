"""Stable Diffusion 1.x and 2.x (arXiv 2112.10752)."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dreambooth_jax.devices.sharding import on_each_part
from dreambooth_jax.diffusion.schedulers import process_from_scheduler
from dreambooth_jax.families.family import CODEC, DENOISER, TEXT, Cond, Family, Images, Models, Part, check_side
from dreambooth_jax.files.tokenizer import Tokenizer, padded_ids
from dreambooth_jax.models.clip_text import CLIPTextModel, CLIPTextSpec
from dreambooth_jax.models.params import Params
from dreambooth_jax.models.remat import LAYERS
from dreambooth_jax.models.unet import UNet2DConditionModel, UNetSpec
from dreambooth_jax.models.vae import AutoencoderKL, VAESpec
from dreambooth_jax.ops.pixels import from_bytes, to_unit

DIFFUSERS_FILE, TRANSFORMERS_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
UNET = Part(UNetSpec.from_config, UNet2DConditionModel, DIFFUSERS_FILE, DENOISER, layers=LAYERS)
VAE = Part(VAESpec.from_config, AutoencoderKL, DIFFUSERS_FILE, CODEC)
TEXT_ENCODER = Part(CLIPTextSpec.from_config, CLIPTextModel, TRANSFORMERS_FILE, TEXT)


def problems(models: Models) -> list[str]:
    """What does not fit between text encoder, UNet and autoencoder."""
    unet, width = models.specs["unet"], models.specs["text_encoder"].hidden_size
    found = latent_problems(models)
    if {width} != set(unet.cross_attention_dim):
        found.append(f"text encoder of width {width}, UNet cross_attention_dim {unet.cross_attention_dim}")
    return found


def latent_problems(models: Models) -> list[str]:
    """Channels in which UNet and autoencoder differ."""
    unet, channels = models.specs["unet"], models.specs["vae"].latent_channels
    if unet.in_channels == 2 * channels + 1:
        return [f"UNet in_channels = {unet.in_channels}: an inpainting model; give its text-to-image base"]
    if {unet.in_channels, unet.out_channels} != {channels}:
        return [
            f"UNet in_channels {unet.in_channels}, out_channels {unet.out_channels}, VAE latent_channels {channels}"
        ]
    return []


def resolution(models: Models) -> int:
    """The side in pixels that the UNet was trained for."""
    size = models.specs["unet"].sample_size or 64
    return (size if isinstance(size, int) else size[0]) * models.specs["vae"].downscale


def latent_shape(models: Models, height: int, width: int) -> tuple[int, int, int]:
    """[h, w, c] of the latents of pictures of `height` x `width` pixels."""
    factor = models.specs["vae"].downscale
    multiple = factor * models.specs["unet"].downscale
    for side in (height, width):
        check_side(side, multiple)
    return height // factor, width // factor, models.specs["vae"].latent_channels


def token_shapes(models: Models, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {"ids": jax.ShapeDtypeStruct((count, models.specs["text_encoder"].max_length), jnp.int32)}


def tokenize(tokenizers: Mapping[str, Tokenizer], texts: Sequence[str]) -> dict[str, np.ndarray]:
    return {"ids": padded_ids(tokenizers["tokenizer"], texts)}


def encode_text(models: Models, params: Params, tokens: Cond) -> Cond:
    """The states that the UNet attends to."""
    return {"states": models.apply("text_encoder", params, tokens["ids"])}


def encode_images(models: Models, params: Params, images: Images) -> tuple[Array, Array]:
    """Mean and standard deviation of the posterior of the scaled latents, [b, h/f, w/f, c] each."""
    pixels = from_bytes(images)
    mean, logvar = _by_picture(lambda x: models.apply("vae", params, x, method="encode"), pixels, pixels.shape[1:3])
    scale = models.specs["vae"].scaling_factor
    return mean * scale, jnp.exp(0.5 * logvar) * scale


def decode(models: Models, params: Params, latents: Array) -> Float[Array, "b h w 3"]:
    """Scaled latents to pixels in [0, 1]."""
    spec = models.specs["vae"]
    z = latents / spec.scaling_factor
    size = [spec.downscale * side for side in z.shape[1:3]]
    pixels = _by_picture(lambda z: models.apply("vae", params, z, method="decode"), z, size)
    return to_unit(pixels.astype(jnp.float32))


Encoded = TypeVar("Encoded")  # arrays with leading axis b
# Pixels of a picture from which the autoencoder takes one at a time: its features are 128 to 256 numbers a pixel, a
# quarter of a gigabyte at 512 x 512 in float32.
ONE_BY_ONE = 512**2


def _by_picture(function: Callable[[Array], Encoded], batch: Array, size: Sequence[int]) -> Encoded:
    """`function` of a batch of pictures of height and width `size`; large ones are taken one at a time, by every device
    of the mesh in its own part of the batch."""
    if size[0] * size[1] < ONE_BY_ONE:
        return function(batch)

    def one_by_one(part: Array) -> Encoded:
        return jax.tree.map(lambda x: x[:, 0], jax.lax.map(lambda one: function(one[None]), part))

    return on_each_part(one_by_one, batch)


def predict(models: Models, params: Params, xt: Array, t: Array, cond: Cond) -> Array:
    return models.apply("unet", params, xt, t, cond["states"])


def with_deep(
    models: Models, params: Params, xt: Array, t: Array, cond: Cond, deep: Array | None
) -> tuple[Array, Array]:
    return models.apply("unet", params, deep, xt, t, cond["states"], method="with_deep")


FAMILY = Family(
    name="StableDiffusionPipeline",
    parts={"unet": UNET, "vae": VAE._replace(decoder=("decoder", "post_quant_conv")), "text_encoder": TEXT_ENCODER},
    tokenizers={"tokenizer": "text_encoder"},
    process=lambda configs: process_from_scheduler(configs["scheduler"]),
    problems=problems,
    resolution=resolution,
    example_shape=latent_shape,
    token_shapes=token_shapes,
    tokenize=tokenize,
    encode_text=encode_text,
    encode_images=encode_images,
    decode=decode,
    predict=predict,
    with_deep=with_deep,
    shares_input=True,
    guidance=7.5,
)
