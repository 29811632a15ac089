"""Trains the embedded base from scratch: tokenizer, autoencoder, CLIP, ViT, UNet; then writes it as a diffusers folder.

    python -m dreambooth_jax.pretrain --config configs/tiny_base.py

Latent diffusion's recipe (arXiv 2112.10752): the autoencoder, a text tower trained contrastively, then on frozen
latents the UNet together with the text tower (its equation 3); and a ViT for subject fidelity. Every part is
checkpointed and goes on where it was killed.
"""

import functools
import json
import logging
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jaxtyping import Array
from ml_collections import config_flags
from tqdm import trange

from dreambooth_jax.devices import sharding
from dreambooth_jax.devices.sharding import make_mesh, spread
from dreambooth_jax.diffusion.examples import EncodedExamples, TrainingData
from dreambooth_jax.diffusion.optimizer import learning_rate
from dreambooth_jax.diffusion.schedulers import process_from_scheduler
from dreambooth_jax.diffusion.step import TrainState, init_state, make_step, run_steps
from dreambooth_jax.files.safetensors import WEIGHT_FILES, save_model
from dreambooth_jax.files.tokenizer import load_tokenizer
from dreambooth_jax.models.clip import CLIPModel, CLIPVisionSpec
from dreambooth_jax.models.clip_text import CLIPTextModel, CLIPTextSpec
from dreambooth_jax.models.params import Functional, Params, count, functional, under_prefix, with_prefix
from dreambooth_jax.models.unet import UNet2DConditionModel, UNetSpec
from dreambooth_jax.models.vae import AutoencoderKL, VAESpec
from dreambooth_jax.models.vit import ViTModel, ViTSpec
from dreambooth_jax.runs import checkpoint
from dreambooth_jax.tiny import contrastive, world
from dreambooth_jax.tiny.contrastive import Pictures, normalise
from dreambooth_jax.tiny.muon import make_muon

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}


def fit(name: str, step: Callable, params: Params, optimizer, data: Any, config, part) -> TrainState:
    """Runs `step(state, frozen, data, key)` for `part.steps` steps, from the last checkpoint if there is one."""
    manager = checkpoint.open_checkpoints(Path(config.workdir) / name, keep_last=1)
    everywhere = sharding.replicated(sharding.make_mesh())
    state = jax.device_put(init_state(jax.tree.map(jnp.copy, params), optimizer), everywhere)  # which is donated
    state = checkpoint.restore(manager, state) or state
    data = jax.device_put(data, everywhere)
    run = jax.jit(run_steps(step, config.steps_per_call), donate_argnums=0, out_shardings=everywhere)
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
                log.flush()
                saved = time.monotonic()
    manager.close()
    return state


def plain_step(loss: Callable, optimizer, draw: Callable) -> Callable:
    """A step that minimises `loss(params, batch, key)` over the batches `draw(data, key)`."""

    def step(state: TrainState, frozen: Params, data: Any, key: Array):
        draw_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
        value, grads = jax.value_and_grad(loss)(state.trainable, spread(draw(data, draw_key)), loss_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        return TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), opt_state, None), (value,)

    return step


def adam(part) -> optax.GradientTransformation:
    rate = learning_rate(part.lr_schedule, part.learning_rate, warmup=part.steps // 40, steps=part.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=1e-4))


def muon(part, params: Params) -> optax.GradientTransformation:
    """Muon at a constant learning rate, then with a linear decay to 0 over the last `part.decay_steps`."""
    stable = learning_rate("constant", part.learning_rate, warmup=part.steps // 40, steps=part.steps)
    decay = optax.linear_schedule(part.learning_rate, 0.0, part.decay_steps)
    rate = optax.join_schedules([stable, decay], [part.steps - part.decay_steps])
    return make_muon(params, rate, weight_decay=part.weight_decay)


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


def encode_all(vae: Functional, params: Params, images: Array, batch: int = 100) -> tuple[Array, Array]:
    """Unscaled posterior mean and standard deviation of all images, float16 on the host."""
    encode = jax.jit(lambda x: vae.apply(params, normalise(spread(x)), method="encode"))
    means, deviations = [], []
    for start in trange(0, len(images), batch, desc="encode", mininterval=5):
        part = images[start : start + batch]
        missing = batch - len(part)
        mean, logvar = encode(jnp.pad(part, ((0, missing), (0, 0), (0, 0), (0, 0))))
        means.append(np.asarray(mean[: len(part)], np.float16))
        deviations.append(np.exp(0.5 * np.asarray(logvar[: len(part)])).astype(np.float16))
    return np.concatenate(means), np.concatenate(deviations)


def digest(*arrays: Array) -> int:
    """A checksum of all values."""
    return functools.reduce(lambda crc, x: zlib.crc32(np.ascontiguousarray(x), crc), arrays, 0)


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
    images, captions, sprite, background = world.render(
        sprites, config.num_images, config.resolution, config.seed, subject_weight=config.subject_weight
    )
    dropped = np.random.default_rng(config.seed).random(len(captions)) < config.unconditional
    captions = ["" if drop else text for text, drop in zip(captions, dropped, strict=True)]
    distinct, caption = np.unique(captions, return_inverse=True)
    encoded = tokenizer(list(distinct), padding="max_length", max_length=config.max_length, truncation=True)
    labels = (jnp.asarray(x, jnp.int32) for x in (encoded.input_ids, caption, sprite, background))
    return Pictures(jnp.asarray(images), *labels)


def train_vae(config, pictures: Pictures, key: Array) -> tuple[Functional, Params]:
    """The autoencoder, on all pictures."""
    vae = functional(lambda rngs: AutoencoderKL(VAESpec.from_config(config.vae.model.to_dict()), rngs=rngs))
    optimizer = adam(config.vae)
    step = plain_step(vae_loss(vae, config.vae.kl_weight), optimizer, contrastive.draw_any(config.vae.batch_size))
    return vae, fit("vae", step, vae.init(key), optimizer, pictures, config, config.vae).trainable


def train_clip(config, pictures: Pictures, tokenizer, key: Array) -> tuple[Params, dict]:
    """Both towers of the CLIP, and its config.json."""
    text = {
        "vocab_size": len(tokenizer), "max_position_embeddings": config.max_length,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, **config.clip.text.to_dict(),
    }  # fmt: skip
    vision = config.clip.vision.to_dict()
    clip = functional(
        lambda rngs: CLIPModel(
            CLIPTextSpec.from_config(text), CLIPVisionSpec.from_config(vision), config.clip.projection_dim, rngs=rngs
        )
    )
    start = clip.init(key)
    optimizer = muon(config.clip, start)
    loss = contrastive.clip_loss(clip, tokenizer.eos_token_id)
    step = plain_step(loss, optimizer, contrastive.draw_alike(config.clip.batch_size))
    alike = contrastive.group(pictures, pictures.background)
    params = fit("clip", step, start, optimizer, alike, config, config.clip).trainable
    model_config = {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": config.clip.projection_dim,
        "text_config": text | {"model_type": "clip_text_model", "projection_dim": config.clip.projection_dim},
        "vision_config": vision | {"model_type": "clip_vision_model"},
    }  # fmt: skip
    return params, model_config


def train_vit(config, pictures: Pictures, key: Array) -> Params:
    """The image features of subject fidelity."""
    vit = functional(lambda rngs: ViTModel(ViTSpec.from_config(config.vit.model.to_dict()), rngs=rngs))
    start = vit.init(key)
    optimizer = muon(config.vit, start)
    loss = contrastive.vit_loss(vit, config.vit.temperature)
    step = plain_step(loss, optimizer, contrastive.draw_pairs(config.vit.batch_size))
    alike = contrastive.group(pictures, pictures.sprite)
    return fit("vit", step, start, optimizer, alike, config, config.vit).trainable


def train_unet(config, examples: EncodedExamples, text_config: dict, text: Params, key: Array) -> Params:
    """UNet and text tower, trained together by the library's own step.

    Args:
        examples: scaled latents; the conditions are token ids.
        text_config, text: the text tower that CLIP's training has left.

    Returns:
        Both, named "unet." and "text_encoder.".
    """
    unet = functional(lambda rngs: UNet2DConditionModel(UNetSpec.from_config(config.unet.model.to_dict()), rngs=rngs))
    tower = functional(lambda rngs: CLIPTextModel(CLIPTextSpec.from_config(text_config), rngs=rngs))

    def predict(params: Params, xt: Array, t: Array, ids: Array) -> Array:
        states = tower.apply(under_prefix("text_encoder.", params), ids)
        return unet.apply(under_prefix("unet.", params), xt, t, states)

    params = with_prefix("unet.", unet.init(key)) | with_prefix("text_encoder.", text)
    optimizer = muon(config.unet, params)
    process = process_from_scheduler(SCHEDULER)
    step = make_step(predict, optimizer, process, batch_size=config.unet.batch_size, constrain=spread)
    return fit("unet", step, params, optimizer, TrainingData(examples, None), config, config.unet).trainable


def main(_) -> None:
    logging.getLogger().setLevel(logging.INFO)
    config = flags.FLAGS.config
    jax.set_mesh(make_mesh())  # attention splits its batch over it
    output = Path(config.output)
    sprites = world.load_sprites(config.world or None)
    world.write_tokenizer(output / "tokenizer", world.words(sprites), config.max_length)
    tokenizer = load_tokenizer(output)
    if config.vocabulary == "core":
        sprites = [sprite for sprite in sprites if sprite.noun in world.CORE_NOUNS]
    pictures = render_pictures(config, tokenizer, sprites)
    vae_key, clip_key, vit_key, unet_key = jax.random.split(jax.random.key(config.seed), 4)

    vae, vae_params = train_vae(config, pictures, vae_key)
    clip_params, clip_config = train_clip(config, pictures, tokenizer, clip_key)
    vit_params = train_vit(config, pictures, vit_key)
    latents = Path(config.workdir) / f"latents_{digest(pictures.images, *vae_params.values()):08x}.npz"
    mean, std = cached(latents, lambda: encode_all(vae, vae_params, pictures.images))
    scale = float(1 / mean.astype(np.float32).std())
    examples = EncodedExamples(jnp.asarray(mean) * scale, jnp.asarray(std) * scale, pictures.ids, pictures.caption)
    text = {name: value for name, value in clip_params.items() if name.startswith("text_model.")}
    trained = train_unet(config, examples, clip_config["text_config"], text, unet_key)
    unet_params, text_params = (under_prefix(f"{part}.", trained) for part in ("unet", "text_encoder"))

    parts = {
        "UNet": unet_params, "text encoder": text_params, "autoencoder": vae_params, "CLIP": clip_params,
        "ViT": vit_params,
    }  # fmt: skip
    logging.info("parameters: %s", ", ".join(f"{part} {count(p) / 1e6:.1f} M" for part, p in parts.items()))
    vae_config = config.vae.model.to_dict() | {"scaling_factor": scale}
    vit_config = config.vit.model.to_dict() | {"architectures": ["ViTModel"], "model_type": "vit"}
    text_config = clip_config["text_config"] | {"architectures": ["CLIPTextModel"], "dtype": "float32"}
    diffusion, plain = WEIGHT_FILES
    for name, params, model_config, stem in (
        ("unet", unet_params, config.unet.model.to_dict(), diffusion),
        ("vae", vae_params, vae_config, diffusion),
        ("text_encoder", text_params, text_config, plain),
        ("clip", clip_params, clip_config, plain),
        ("vit", vit_params, vit_config, plain),
    ):
        save_model(output / name, params, model_config, dtype=np.float16, stem=stem)
    write_index(output)


def write_index(folder: Path) -> None:
    """Makes the models in `folder` a StableDiffusionPipeline; `clip/` and `vit/` lie beside it, and the licences of
    the pictures."""
    shutil.copyfile(Path(world.__file__).with_name("LICENSES.md"), folder / "LICENSES.md")
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_guidance_scale": 2.5,  # `sample` paints with it by default; diffusers passes over it
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
    config_flags.DEFINE_config_file("config", "configs/tiny_base.py", "what to train")
    app.run(main)
