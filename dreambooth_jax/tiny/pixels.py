"""The embedded cascade's stages: pixel UNets of DeepFloyd IF's kind with a text encoder of T5's kind, trained on
pictures that the step itself composes and makes small."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from dreambooth_jax.diffusion.low_resolution import UNIFORM, Cond, LowResolution, make_augment
from dreambooth_jax.diffusion.process import Process, corrupt, target
from dreambooth_jax.families.imagen import enlarging, process
from dreambooth_jax.files.hub import resolve_base
from dreambooth_jax.files.safetensors import read_model
from dreambooth_jax.files.tokenizer import Tokenizer
from dreambooth_jax.models.params import Functional, Params, functional, under_prefix, with_prefix
from dreambooth_jax.models.pixel_unet import PixelUNet, PixelUNetSpec
from dreambooth_jax.models.t5 import T5EncoderModel, T5Spec
from dreambooth_jax.ops.pixels import from_bytes
from dreambooth_jax.tiny.contrastive import Loss, Pictures, View, draw_any
from dreambooth_jax.tiny.fit import adam, fit, make_step, muon
from dreambooth_jax.tiny.parts import Part
from dreambooth_jax.tiny.rare_words import draw_captions, louder, rare_loss, rare_tokens
from dreambooth_jax.tiny.world.atlas import Atlas

USUAL_LEVEL = 100  # of 1,000: noise on the picture of the stage before when an untuned stage II paints


class Texts(NamedTuple):
    """How a stage reads captions.

    Attributes:
        encoder: T5, named "text_encoder." in the parameters.
        empty: token ids of the empty caption.
        unconditional: share of examples without caption, for classifier-free guidance.
    """

    encoder: Functional
    empty: tuple[int, ...]
    unconditional: float


def shrink(images: UInt8[Array, "b h w 3"], factor: int) -> UInt8[Array, "b rows columns 3"]:
    """The pictures `factor` times smaller as `data.low_resolution.shrink` makes them, inside a jitted function: Pillow
    rounds to bytes between the axes."""
    count, height, width, _ = images.shape
    for shape in ((count, height, width // factor, 3), (count, height // factor, width // factor, 3)):
        resized = jax.image.resize(images.astype(jnp.float32), shape, "lanczos3", antialias=True)
        images = jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)
    return images


def pixel_loss(
    unet: Functional,
    texts: Texts,
    noise: Process,
    *,
    factor: int,
    low: LowResolution | None,
    level_power: float = 1.0,
) -> Loss:
    """||target - f(x_t, t, c)||^2 of Imagen's stages (arXiv 2205.11487, section 2).

    Args:
        unet: the denoiser, named "unet." in the parameters.
        noise: noise levels and the prediction.
        factor: side of the batch's pictures over that of stage I's.
        low: the condition of stage II, whose noise has any level; None for stage I.
        level_power: level = levels u^level_power of a uniform u: above 1, fewer draws at the noisiest levels.
    """

    def loss(params: Params, batch: Pictures, key: Array) -> Float[Array, ""]:
        eps_key, t_key, drop_key, low_key = jax.random.split(key, 4)
        small = shrink(batch.images, factor)
        x0 = from_bytes(small if low is None else batch.images)
        eps = jax.random.normal(eps_key, x0.shape)
        t = jax.vmap(noise.draw_t)(jax.random.split(t_key, len(x0)))
        dropped = jax.random.bernoulli(drop_key, texts.unconditional, (len(x0), 1))
        ids = jnp.where(dropped, jnp.asarray(texts.empty), batch.ids)
        states = texts.encoder.apply(under_prefix("text_encoder.", params), ids)
        x, level = corrupt(noise, x0, eps, t), None
        if low is not None:
            level_key, noise_key = jax.random.split(low_key)
            uniform = jax.random.uniform(level_key, (len(small),))
            levels = (len(low.sigma) * uniform**level_power).astype(jnp.int32)
            keys = jax.random.split(noise_key, len(small))

            def augment(picture: Array, level: Array, key: Array) -> Cond:
                return make_augment(low, x0.shape[1], UNIFORM, level)({"low": picture}, key)

            cond = jax.vmap(augment)(small.reshape(len(small), -1), levels, keys)
            x, level = jnp.concatenate([x, cond["low"]], -1), cond["level"].astype(jnp.float32)
        output = unet.apply(under_prefix("unet.", params), x, t.astype(jnp.float32), states, level)
        prediction, _ = jnp.split(output, 2, -1)  # IF's folders have channels of the variance too, and they stay idle
        return jnp.square(prediction.astype(jnp.float32) - target(noise, x0, eps, t)).mean()

    return loss


def text_config(config: ConfigDict, tokenizer: Tokenizer) -> dict[str, Any]:
    """The config.json of T5."""
    return config.text.to_dict() | {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def train_stages(config: ConfigDict, atlas: Atlas, tokenizer: Tokenizer, key: Array) -> dict[str, Mapping[str, Part]]:
    """Stage I together with T5, unless `config.start` has both; T5 once more, so that it tells rare words apart; then
    stage II with this T5.

    Returns:
        UNet and text encoder of "stage1" and "stage2".
    """
    text_key, first_key, second_key = jax.random.split(key, 3)
    about = text_config(config, tokenizer)
    spec = T5Spec.from_config(about)
    encoder = functional(lambda rngs: T5EncoderModel(spec, dtype=jnp.dtype(config.dtype), rngs=rngs))
    empty = tokenizer("", padding="max_length", max_length=config.max_length).input_ids
    texts = Texts(encoder, tuple(empty), config.unconditional)
    if config.start:
        folder = resolve_base(config.start)
        first = read_model(folder / "unet", _unet(config, "stage1").shapes)
        text = read_model(folder / "text_encoder", encoder.shapes)
    else:
        start = with_prefix("text_encoder.", first_weights(encoder, spec, text_key))
        trained = _train_stage(config, "stage1", atlas, texts, None, first_key, start, {})
        first, text = (under_prefix(prefix, trained) for prefix in ("unet.", "text_encoder."))
    text = _train_text(config, atlas, tokenizer, texts, text)
    low = enlarging(config.noising.to_dict(), config.factor, USUAL_LEVEL)
    frozen = with_prefix("text_encoder.", text)
    second = under_prefix("unet.", _train_stage(config, "stage2", atlas, texts, low, second_key, {}, frozen))
    return {
        name: {"unet": Part(params, config[name].model.to_dict()), "text_encoder": Part(text, about)}
        for name, params in (("stage1", first), ("stage2", second))
    }


def _train_text(config: ConfigDict, atlas: Atlas, tokenizer: Tokenizer, texts: Texts, text: Params) -> Params:
    """T5 as `text` that tells rare words apart; see `rare_words`."""
    part = config.rare_words
    if not part.steps:
        return text
    pad = tokenizer.pad_token_id
    rare = rare_tokens(atlas, len(tokenizer), 1 + max(pad, tokenizer.eos_token_id, tokenizer.unk_token_id))
    optimizer = adam(part)
    loss = rare_loss(texts.encoder, rare, texts.empty, texts.unconditional, pad)
    step = make_step(loss, optimizer, draw_captions(part.batch_size, config.max_length), part.ema_decay)
    start, frozen = with_prefix("text_encoder.", louder(text, rare)), with_prefix("before.", text)
    return under_prefix("text_encoder.", fit("rare_words", step, start, frozen, optimizer, atlas, config, part))


def _unet(config: ConfigDict, name: str) -> Functional:
    spec, dtype = PixelUNetSpec.from_config(config[name].model.to_dict()), jnp.dtype(config.dtype)
    return functional(lambda rngs: PixelUNet(spec, dtype=dtype, rngs=rngs))


def _train_stage(
    config: ConfigDict,
    name: str,
    atlas: Atlas,
    texts: Texts,
    low: LowResolution | None,
    key: Array,
    start: Params,
    frozen: Params,
) -> Params:
    """A UNet from random weights, and what is in `start`."""
    part, unet = config[name], _unet(config, name)
    noise = process({"scheduler": config.scheduler.to_dict()})
    loss = pixel_loss(unet, texts, noise, factor=config.factor, low=low, level_power=part.level_power)
    start = start | with_prefix("unet.", unet.init(key))
    optimizer = muon(part)
    draw = draw_any(View(part.batch_size, config.resolution, config.max_length))
    step = make_step(loss, optimizer, draw, part.ema_decay)
    return fit(name, step, start, frozen, optimizer, atlas, config, part)


def first_weights(encoder: Functional, spec: T5Spec, key: Array) -> Params:
    """Random weights with queries small enough for scores that no 1/sqrt(d) divides (arXiv 1910.10683)."""
    scale = 1 / math.sqrt(spec.d_kv)
    return {name: scale * x if name.endswith(".q.kernel") else x for name, x in encoder.init(key).items()}
