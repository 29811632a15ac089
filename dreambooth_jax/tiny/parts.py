"""The parts of the embedded base: autoencoder, CLIP, ViT, UNet with its text tower; each from random weights or from
those of a finished base, the part's `start`."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from dreambooth_jax.diffusion.schedulers import process_from_scheduler
from dreambooth_jax.files.hub import resolve_base
from dreambooth_jax.files.safetensors import read_model
from dreambooth_jax.files.tokenizer import Tokenizer
from dreambooth_jax.models.clip import CLIPModel, CLIPVisionSpec
from dreambooth_jax.models.clip_text import CLIPTextModel, CLIPTextSpec
from dreambooth_jax.models.lpips import LPIPS
from dreambooth_jax.models.params import Functional, Params, functional, under_prefix, with_prefix
from dreambooth_jax.models.unet import UNet2DConditionModel, UNetSpec
from dreambooth_jax.models.vae import AutoencoderKL, VAESpec
from dreambooth_jax.models.vit import ViTModel, ViTSpec
from dreambooth_jax.ops.pixels import from_bytes
from dreambooth_jax.tiny.autoencoder import normalise_latents, vae_loss
from dreambooth_jax.tiny.contrastive import (
    Loss,
    Pictures,
    View,
    clip_loss,
    draw_alike,
    draw_any,
    draw_pairs,
    vit_loss,
)
from dreambooth_jax.tiny.denoiser import unet_loss
from dreambooth_jax.tiny.fit import fit, make_step, muon
from dreambooth_jax.tiny.world.atlas import Atlas


class Part(NamedTuple):
    """Trained parameters and the config.json beside them."""

    params: Params
    config: dict[str, Any]


def _start(base: str, folder: str, model: Functional, key: Array) -> Params:
    """Initial parameters: those of a base, or random ones where `base` is ""."""
    return read_model(resolve_base(base) / folder, model.shapes) if base else model.init(key)


def _view(config: ConfigDict, part: ConfigDict) -> View:
    return View(part.batch_size, config.resolution, config.max_length)


def train_vae(config: ConfigDict, atlas: Atlas, key: Array) -> Part:
    """The autoencoder; its latents have mean 0 and variance 1 in every channel unless the encoder stays as it was."""
    part = config.vae
    dtype = jnp.dtype(config.dtype)
    spec = VAESpec.from_config(part.model.to_dict())
    vae = functional(lambda rngs: AutoencoderKL(spec, dtype=dtype, rngs=rngs))
    start = with_prefix("vae.", _start(part.start, "vae", vae, key))
    trainable = {name: value for name, value in start.items() if re.search(part.trainable, name)}
    frozen = {name: value for name, value in start.items() if name not in trainable}
    lpips = None
    if config.lpips:
        lpips = functional(lambda rngs: LPIPS("alex", dtype=dtype, rngs=rngs))
        frozen |= with_prefix("lpips.", read_model(Path(os.path.expanduser(config.lpips)), lpips.shapes))
    optimizer = muon(part)
    loss = vae_loss(vae, lpips, kl_weight=part.kl_weight, lpips_weight=part.lpips_weight)
    step = make_step(loss, optimizer, draw_any(_view(config, part)), part.ema_decay)
    trained = fit("vae", step, trainable, frozen, optimizer, atlas, config, part)
    params = under_prefix("vae.", frozen | trained)
    if any(name.startswith("vae.encoder.") for name in trainable):
        mean, std = latent_statistics(config, vae, params, atlas)
        params = normalise_latents(params, mean * spec.scaling_factor, std * spec.scaling_factor)
    return Part(params, part.model.to_dict())


def latent_statistics(config: ConfigDict, vae: Functional, params: Params, atlas: Atlas) -> tuple[Array, Array]:
    """Mean and standard deviation of each channel of the unscaled latents of 1,024 pictures."""
    count = min(config.vae.batch_size, 64)
    draw = draw_any(View(count, config.resolution, config.max_length))

    @jax.jit
    def encode(key: Array) -> Array:
        return vae.apply(params, from_bytes(draw(atlas, key).images), method="encode")[0].astype(jnp.float32)

    keys = jax.random.split(jax.random.key(config.seed), -(-1024 // count))
    latents = np.concatenate([np.asarray(encode(key)) for key in keys])
    return jnp.asarray(latents.mean((0, 1, 2))), jnp.asarray(latents.std((0, 1, 2)))


def train_clip(config: ConfigDict, atlas: Atlas, tokenizer: Tokenizer, key: Array) -> Part:
    """Both towers of the CLIP."""
    part = config.clip
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": config.max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **part.text.to_dict(),
    }
    vision = part.vision.to_dict()
    towers = CLIPTextSpec.from_config(text), CLIPVisionSpec.from_config(vision)
    clip = functional(lambda rngs: CLIPModel(*towers, part.projection_dim, rngs=rngs))
    start = _start(part.start, "clip", clip, key)
    draw = draw_alike(_view(config, part))
    params = _train_tower("clip", clip_loss(clip, tokenizer.eos_token_id), draw, start, atlas, config)
    about = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": part.projection_dim,
        "text_config": text | {"model_type": "clip_text_model", "projection_dim": part.projection_dim},
        "vision_config": vision | {"model_type": "clip_vision_model"},
    }
    return Part(params, about)


def train_vit(config: ConfigDict, atlas: Atlas, key: Array) -> Part:
    """The image features of subject fidelity."""
    part = config.vit
    vit = functional(lambda rngs: ViTModel(ViTSpec.from_config(part.model.to_dict()), rngs=rngs))
    start = _start(part.start, "vit", vit, key)
    draw = draw_pairs(_view(config, part))
    params = _train_tower("vit", vit_loss(vit, part.temperature), draw, start, atlas, config)
    return Part(params, part.model.to_dict() | {"architectures": ["ViTModel"], "model_type": "vit"})


def _train_tower(
    name: str,
    loss: Loss,
    draw: Callable[[Atlas, Array], Pictures],
    start: Params,
    atlas: Atlas,
    config: ConfigDict,
) -> Params:
    part = config[name]
    if part.steps == 0:
        return start
    optimizer = muon(part)
    return fit(name, make_step(loss, optimizer, draw, part.ema_decay), start, {}, optimizer, atlas, config, part)


def train_unet(
    config: ConfigDict, atlas: Atlas, tokenizer: Tokenizer, vae: Part, clip: Part, key: Array
) -> tuple[Part, Part]:
    """UNet and text tower, trained together; the tower begins as that of CLIP's `start`, or as the CLIP's own."""
    part, dtype = config.unet, jnp.dtype(config.dtype)
    text_config, unet_spec = clip.config["text_config"], UNetSpec.from_config(part.model.to_dict())
    vae_spec, text_spec = VAESpec.from_config(vae.config), CLIPTextSpec.from_config(text_config)
    encoder = functional(lambda rngs: AutoencoderKL(vae_spec, dtype=dtype, rngs=rngs))
    unet = functional(lambda rngs: UNet2DConditionModel(unet_spec, dtype=dtype, rngs=rngs))
    tower = functional(lambda rngs: CLIPTextModel(text_spec, dtype=dtype, rngs=rngs))
    text = {name: value for name, value in clip.params.items() if name.startswith("text_model.")}
    if config.clip.start:
        text = _start(config.clip.start, "text_encoder", tower, key)
    start = with_prefix("unet.", _start(part.start, "unet", unet, key)) | with_prefix("text_encoder.", text)
    optimizer = muon(part)
    empty = tokenizer("", padding="max_length", max_length=config.max_length).input_ids
    loss = unet_loss(
        encoder,
        unet,
        tower,
        process_from_scheduler(config.scheduler.to_dict()),
        times=config.scheduler.num_train_timesteps,
        scale=vae_spec.scaling_factor,
        empty=tuple(empty),
        unconditional=config.unconditional,
        t_power=part.t_power,
    )
    step = make_step(loss, optimizer, draw_any(_view(config, part)), part.ema_decay)
    params = fit("unet", step, start, with_prefix("vae.", vae.params), optimizer, atlas, config, part)
    text_part = Part(under_prefix("text_encoder.", params), text_config | {"architectures": ["CLIPTextModel"]})
    return Part(under_prefix("unet.", params), part.model.to_dict()), text_part
