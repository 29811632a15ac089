"""DeepFloyd IF: pixel-space stages of an Imagen-type cascade (arXiv 2205.11487), on diffusers' folders.

Stage I paints 64 x 64 pixels from a text, stage II enlarges them four times. Both read T5's states of all 77 tokens,
padding included, and T5 is never trained. The UNets predict the noise and, in further channels, an interpolation of the
sampler's variance. No loss trains these channels: a trained stage is painted with the smaller variance. Text and
prediction of stage I go through the models as in Stable Diffusion (`sd.FAMILY`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dreambooth_jax.diffusion.low_resolution import LowResolution
from dreambooth_jax.diffusion.process import Process
from dreambooth_jax.diffusion.schedulers import clip_from_scheduler, process_from_scheduler
from dreambooth_jax.families import sd
from dreambooth_jax.families.family import DENOISER, NOISE_LEVEL, TEXT, Cond, Images, Models, Part, Pictures, check_side
from dreambooth_jax.files.tokenizer import Tokenizer, padded_ids
from dreambooth_jax.models.params import Params
from dreambooth_jax.models.pixel_unet import PixelUNet, PixelUNetSpec
from dreambooth_jax.models.remat import LAYERS
from dreambooth_jax.models.t5 import T5EncoderModel, T5Spec
from dreambooth_jax.ops.pixels import from_bytes, to_unit

UNET = Part(PixelUNetSpec.from_config, PixelUNet, "diffusion_pytorch_model.safetensors", DENOISER, layers=LAYERS)
TEXT_ENCODER = Part(T5Spec.from_config, T5EncoderModel, "model.safetensors", TEXT)
NOISING = "image_noising_scheduler"
UPSCALE = "_upscale"  # in model_index.json: side of a stage's pictures over that of the stage before
_OF_PIXELS = ("clip_sample", "thresholding")  # done by `clip`


def process(configs: Mapping[str, Mapping[str, Any]], name: str = "scheduler") -> Process:
    return process_from_scheduler({key: v for key, v in configs[name].items() if key not in _OF_PIXELS})


def problems(models: Models) -> list[str]:
    """What does not fit between text encoder and UNet, or is no stage I."""
    return text_problems(models) + _channel_problems(models.specs["unet"], 3)


def text_problems(models: Models) -> list[str]:
    unet, text = models.specs["unet"], models.specs["text_encoder"]
    if unet.encoder_hid_dim == text.d_model:
        return []
    return [f"text encoder of width {text.d_model}, UNet encoder_hid_dim {unet.encoder_hid_dim}"]


def _channel_problems(unet: PixelUNetSpec, channels: int) -> list[str]:
    found = []
    if unet.in_channels != channels:
        found.append(f"UNet in_channels = {unet.in_channels}, expected {channels}")
    if unet.out_channels not in (3, 6):
        found.append(f"UNet out_channels = {unet.out_channels}, expected 3, or 6 with a learnt variance")
    return found


def resolution(models: Models) -> int:
    return models.specs["unet"].sample_size


def example_shape(models: Models, height: int, width: int) -> tuple[int, int, int]:
    """[h, w, 3] of the pixels themselves."""
    multiple = models.specs["unet"].downscale
    for side in (height, width):
        check_side(side, multiple)
    return height, width, 3


def tokenize(tokenizers: Mapping[str, Tokenizer], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Ids of the texts in lower case, as the reference's pipelines have them."""
    return {"ids": padded_ids(tokenizers["tokenizer"], [text.lower().strip() for text in texts])}


def encode_images(models: Models, params: Params, images: Images) -> tuple[Array, Array]:
    """The pixels in [-1, 1], exactly."""
    pixels = from_bytes(images)
    return pixels, jnp.zeros_like(pixels)


def decode(models: Models, params: Params, pixels: Array) -> Float[Array, "b h w 3"]:
    """Pixels from [-1, 1] to [0, 1]."""
    return to_unit(pixels)


def predict_larger(models: Models, params: Params, xt: Array, t: Array, cond: Cond) -> Array:
    """Stage II sees the low-resolution picture behind x_t."""
    x = jnp.concatenate([xt, cond["low"].astype(xt.dtype)], -1)
    return models.apply("unet", params, x, t, cond["states"], cond["level"].astype(jnp.float32))


def split(models: Models, output: Array) -> tuple[Array, Array | None]:
    """(noise, interpolation of the variance if the folder's scheduler uses it); 1 is the larger variance."""
    learnt = output.shape[-1] == 6 and models.configs["scheduler"].get("variance_type") == "learned_range"
    return output[..., :3], (output[..., 3:] + 1) / 2 if learnt else None


def clip(models: Models) -> Callable[[Array], Array] | None:
    return clip_from_scheduler(models.configs["scheduler"])


def saved_scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    """After training, the variance channels no longer fit the noise: samplers take the smaller variance."""
    learnt = config.get("variance_type", "fixed_small").startswith("learned")
    return dict(config) | ({"variance_type": "fixed_small"} if learnt else {})


def low_resolution(models: Models) -> LowResolution:
    """model_index.json holds the factor where it is not four, and the level of a trained stage."""
    index = models.configs["index"]
    return enlarging(models.configs[NOISING], index.get(UPSCALE, 4), index.get(NOISE_LEVEL, 250))


def enlarging(noising: Mapping[str, Any], factor: int, usual_level: int) -> LowResolution:
    """Enlarged before noise is added (deepfloyd_if/modules/stage_II.py).

    Args:
        noising: the config of the schedule of noise on the low-resolution picture.
        factor, usual_level: as in `LowResolution`.
    """
    levels = np.arange(noising.get("num_train_timesteps", 1000))
    sigma = np.asarray(process({NOISING: noising}, NOISING).sigma(levels), np.float64)
    return LowResolution(factor, True, sigma, usual_level)


def of_example(models: Models, pictures: Pictures) -> Cond:
    """The pictures of the stage before, flat."""
    return {"low": pictures.images.reshape(len(pictures.images), -1)}


STAGE_I = sd.FAMILY._replace(
    name="IFPipeline",
    parts={"unet": UNET, "text_encoder": TEXT_ENCODER},
    process=process,
    problems=problems,
    resolution=resolution,
    example_shape=example_shape,
    tokenize=tokenize,
    encode_images=encode_images,
    decode=decode,
    with_deep=None,
    shares_input=False,
    guidance=7.0,
    split=split,
    clip=clip,
    saved_scheduler=saved_scheduler,
    trains_text=False,
)
STAGE_II = STAGE_I._replace(
    name="IFSuperResolutionPipeline",
    schedulers=("scheduler", NOISING),
    problems=lambda models: text_problems(models) + _channel_problems(models.specs["unet"], 6),
    predict=predict_larger,
    guidance=4.0,
    of_example=of_example,
    low_resolution=low_resolution,
)
