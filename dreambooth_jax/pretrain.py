"""Trains the embedded base from scratch: tokenizer, autoencoder, CLIP, UNet; then writes it as a diffusers folder.

    python -m dreambooth_jax.pretrain --config configs/tiny_base.py

Stable Diffusion's recipe (arXiv 2112.10752): the autoencoder, a text tower trained contrastively, then the UNet on
frozen latents and text states. Every part is checkpointed and goes on where it was killed.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app
from jaxtyping import Array
from ml_collections import config_flags
from tqdm import trange

from dreambooth_jax import checkpoint, world
from dreambooth_jax.identifier import load_tokenizer
from dreambooth_jax.models.clip import CLIPModel, CLIPVisionSpec
from dreambooth_jax.models.clip_text import CLIPTextSpec
from dreambooth_jax.models.unet import UNet2DConditionModel, UNetSpec
from dreambooth_jax.models.vae import AutoencoderKL, VAESpec
from dreambooth_jax.optimizer import learning_rate
from dreambooth_jax.params import Functional, Params, count, functional
from dreambooth_jax.schedule import Schedule
from dreambooth_jax.step import Data, Resident, TrainState, init_state, make_step, run_steps
from dreambooth_jax.weights import WEIGHT_FILES, save_model

_CONFIG = config_flags.DEFINE_config_file("config", "configs/tiny_base.py", "what to train")

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


class Pictures(NamedTuple):
    """The rendered data set: images [n, h, w, 3] uint8, distinct token ids [u, l], and which of them each image has."""

    images: Array
    ids: Array
    caption: Array


def fit(name: str, step: Callable, params: Params, optimizer, data: Any, config, part) -> TrainState:
    """Runs `step(state, frozen, data, key)` for `part.steps` steps, from the last checkpoint if there is one."""
    manager = checkpoint.open_checkpoints(Path(config.workdir) / name, keep_last=1)
    state = init_state(params, optimizer, ema="ema_decay" in part)
    state = checkpoint.restore(manager, state) or state
    run = jax.jit(run_steps(step, config.steps_per_call), donate_argnums=0)
    key = jax.random.key(config.seed)
    saved = time.monotonic()
    with (
        open(Path(config.workdir) / f"{name}.csv", "a") as log,
        trange(part.steps, initial=int(state.step), desc=name, mininterval=5) as bar,
    ):
        while (done := int(state.step)) < part.steps:
            steps = min(config.steps_per_call, part.steps - done)
            state, metrics = run(state, {}, data, key, jnp.asarray(steps))
            loss = float(metrics[0][:steps].mean())
            if not np.isfinite(loss):
                raise FloatingPointError(f"{name}: loss {loss} near step {done}; lower config.{name}.learning_rate")
            bar.update(steps)
            bar.set_postfix(loss=f"{loss:.5f}", refresh=False)
            log.write(f"{done + steps},{loss}\n")
            if time.monotonic() - saved > config.save_seconds or done + steps == part.steps:
                checkpoint.save(manager, done + steps, state)
                saved = time.monotonic()
    manager.close()
    return state


def plain_step(loss: Callable, optimizer, batch_size: int) -> Callable:
    """A step that minimises `loss(params, batch, key)` over uniformly drawn examples of `data`."""

    def step(state: TrainState, frozen: Params, data: Pictures, key: Array):
        index_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
        index = jax.random.randint(index_key, (batch_size,), 0, len(data.images))
        batch = Pictures(data.images[index], data.ids[data.caption[index]], data.caption[index])
        value, grads = jax.value_and_grad(loss)(state.trainable, batch, loss_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        return TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), opt_state, None), (value,)

    return step


def adam(part) -> optax.GradientTransformation:
    rate = learning_rate(part.lr_schedule, part.learning_rate, warmup=part.steps // 40, steps=part.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=1e-4))


def normalise(images: Array) -> Array:
    """uint8 -> [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def vae_loss(vae: Functional, kl_weight: float) -> Callable:
    """Mean absolute and squared error, of pixels and of their differences to the neighbours, plus a little KL."""

    def loss(params: Params, batch: Pictures, key: Array) -> Array:
        x = normalise(batch.images)
        mean, logvar = vae.apply(params, x, method="encode")
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        error = vae.apply(params, z, method="decode") - x
        edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).sum((1, 2, 3)).mean()
        return 4 * jnp.square(error).mean() + jnp.abs(error).mean() + 0.5 * edges + kl_weight * kl

    return loss


def clip_loss(clip: Functional, end: int) -> Callable:
    """Symmetric contrastive loss (arXiv 2103.00020, figure 3); equal captions in a batch are no negatives."""

    def loss(params: Params, batch: Pictures, key: Array) -> Array:
        logits = clip.apply(params, batch.ids, normalise(batch.images), end, method="logits")
        same = batch.caption[:, None] == batch.caption[None]
        targets = same / same.sum(1, keepdims=True)
        by_image = optax.softmax_cross_entropy(logits, targets).mean()
        by_text = optax.softmax_cross_entropy(logits.T, targets).mean()
        return (by_image + by_text) / 2

    return loss


def encode_all(vae: Functional, params: Params, images: Array, batch: int = 100) -> tuple[Array, Array]:
    """Unscaled posterior mean and standard deviation of all images, float16 on the host."""
    encode = jax.jit(lambda x: vae.apply(params, normalise(x), method="encode"))
    means, deviations = [], []
    for start in trange(0, len(images), batch, desc="encode", mininterval=5):
        part = images[start : start + batch]
        missing = batch - len(part)
        mean, logvar = encode(jnp.pad(part, ((0, missing), (0, 0), (0, 0), (0, 0))))
        means.append(np.asarray(mean[: len(part)], np.float16))
        deviations.append(np.exp(0.5 * np.asarray(logvar[: len(part)])).astype(np.float16))
    return np.concatenate(means), np.concatenate(deviations)


def cached(path: Path, compute: Callable[[], tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    """The arrays in `path`, computed and written there if they are not: a resumed run does not repeat them."""
    if not path.exists():
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, *compute())
        partial.rename(path)
    with np.load(path) as arrays:
        return [arrays[name] for name in arrays.files]


def render_pictures(config, tokenizer, sprites) -> Pictures:
    """Renders the data set; some captions are empty, so that the UNet learns the unconditional distribution too."""
    images, captions, _, _ = world.render(
        sprites, config.num_images, config.resolution, config.seed, subject_weight=config.subject_weight
    )
    dropped = np.random.default_rng(config.seed).random(len(captions)) < config.unconditional
    captions = ["" if drop else text for text, drop in zip(captions, dropped, strict=True)]
    distinct, caption = np.unique(captions, return_inverse=True)
    encoded = tokenizer(list(distinct), padding="max_length", max_length=config.max_length, truncation=True)
    return Pictures(jnp.asarray(images), jnp.asarray(encoded.input_ids, jnp.int32), jnp.asarray(caption, jnp.int32))


def main(_) -> None:
    logging.getLogger().setLevel(logging.INFO)
    config = _CONFIG.value
    output = Path(config.output)
    sprites = world.load_sprites(config.world or None)
    world.write_tokenizer(output / "tokenizer", world.words(sprites), config.max_length)
    tokenizer = load_tokenizer(output)
    pictures = render_pictures(config, tokenizer, sprites)
    keys = iter(jax.random.split(jax.random.key(config.seed), 3))

    vae = functional(lambda rngs: AutoencoderKL(VAESpec.from_config(config.vae.model.to_dict()), rngs=rngs))
    optimizer = adam(config.vae)
    vae_step = plain_step(vae_loss(vae, config.vae.kl_weight), optimizer, config.vae.batch_size)
    vae_params = fit("vae", vae_step, vae.init(next(keys)), optimizer, pictures, config, config.vae).trainable

    text_config = {
        "vocab_size": len(tokenizer), "max_position_embeddings": config.max_length,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, **config.clip.text.to_dict(),
    }  # fmt: skip
    clip = functional(
        lambda rngs: CLIPModel(
            CLIPTextSpec.from_config(text_config),
            CLIPVisionSpec.from_config(config.clip.vision.to_dict()),
            config.clip.projection_dim,
            rngs=rngs,
        )
    )
    optimizer = adam(config.clip)
    clip_step = plain_step(clip_loss(clip, tokenizer.eos_token_id), optimizer, config.clip.batch_size)
    clip_params = fit("clip", clip_step, clip.init(next(keys)), optimizer, pictures, config, config.clip).trainable

    mean, std = cached(
        Path(config.workdir) / f"latents_{config.num_images}.npz", lambda: encode_all(vae, vae_params, pictures.images)
    )
    scale = float(1 / mean.astype(np.float32).std())
    unet_config = config.unet.model.to_dict()
    unet = functional(lambda rngs: UNet2DConditionModel(UNetSpec.from_config(unet_config), rngs=rngs))
    states = encode_captions(clip, clip_params, pictures.ids)
    resident = Resident(jnp.asarray(mean) * scale, jnp.asarray(std) * scale, states, pictures.caption)
    optimizer = adam(config.unet)
    unet_step = make_step(
        unet.apply, optimizer, Schedule.from_config(SCHEDULER), batch_size=config.unet.batch_size,
        snr_gamma=config.unet.snr_gamma, ema_decay=config.unet.ema_decay,
    )  # fmt: skip
    state = fit("unet", unet_step, unet.init(next(keys)), optimizer, Data(resident, None), config, config.unet)

    logging.info(
        "UNet %.1f M, autoencoder %.1f M, CLIP %.1f M parameters",
        *(count(p) / 1e6 for p in (state.ema, vae_params, clip_params)),
    )
    vae_config = config.vae.model.to_dict() | {"scaling_factor": scale}
    clip_config = {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": config.clip.projection_dim,
        "text_config": text_config | {"model_type": "clip_text_model", "projection_dim": config.clip.projection_dim},
        "vision_config": config.clip.vision.to_dict() | {"model_type": "clip_vision_model"},
    }  # fmt: skip
    write_base(output, state.ema, unet_config, vae_params, vae_config, clip_params, clip_config)


def encode_captions(clip: Functional, params: Params, ids: Array, batch: int = 1000) -> Array:
    """Text states [u, l, c] of all captions, float16, as the UNet sees them."""
    encode = jax.jit(lambda ids: clip.apply(params, ids, method="text_states"))
    padded = jnp.pad(ids, ((0, -len(ids) % batch), (0, 0)))
    parts = [np.asarray(encode(padded[i : i + batch]), np.float16) for i in range(0, len(padded), batch)]
    return jnp.asarray(np.concatenate(parts)[: len(ids)])


def write_base(
    folder: Path,
    unet: Params,
    unet_config: Mapping,
    vae: Params,
    vae_config: Mapping,
    clip: Params,
    clip_config: Mapping,
) -> None:
    """Writes a StableDiffusionPipeline folder in float16, and the whole CLIP beside it as `clip/`."""
    text_config = clip_config["text_config"] | {"architectures": ["CLIPTextModel"]}
    text = {name: value for name, value in clip.items() if name.startswith("text_model.")}
    save_model(folder / "unet", unet, unet_config, dtype=np.float16, stem=WEIGHT_FILES[0])
    save_model(folder / "vae", vae, vae_config, dtype=np.float16, stem=WEIGHT_FILES[0])
    save_model(folder / "text_encoder", text, text_config, dtype=np.float16, stem=WEIGHT_FILES[1])
    save_model(folder / "clip", clip, clip_config, dtype=np.float16, stem=WEIGHT_FILES[1])
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
