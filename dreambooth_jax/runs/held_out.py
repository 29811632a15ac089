"""Held-out photos of a run, and the loss on them: with fixed noise and times, a function of (config, step)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from dreambooth_jax.data.encode import make_encoder
from dreambooth_jax.data.held_out import last_names, once, without
from dreambooth_jax.data.images import Examples, read_examples
from dreambooth_jax.data.low_resolution import cut
from dreambooth_jax.devices.sharding import batch_sharding, replicated, unshard
from dreambooth_jax.diffusion.examples import TrainingData, draw
from dreambooth_jax.diffusion.loss import Losses, dreambooth_loss
from dreambooth_jax.diffusion.low_resolution import make_augment
from dreambooth_jax.models.params import Params
from dreambooth_jax.runs.config import ConfigError, fill
from dreambooth_jax.runs.job import Job, pairs_prior, reads_tokens, training_size

DRAWS = 32  # noised pictures of each half per value: 8 left 3 % of noise between the means of two sets of draws
_STREAM = 2**31 - 1  # no step has this number


def divide(examples: Examples, config: ConfigDict) -> tuple[Examples, Examples | None]:
    """(examples to train on, held-out photos or None): centre crops without augmentation, each photo once.

    Args:
        examples: of `instance_images`.

    Raises:
        ConfigError: nothing is left to train on.
        ValueError, OSError: see `read_examples`.
    """
    held = config.held_out_images
    if not held:
        return examples, None
    count = int(held) if held.isdecimal() else 0
    try:
        aside = last_names(examples.names, count) if count else ()
    except ValueError as error:
        raise ConfigError(f"{config.instance_images}: {error}") from error
    found = read_examples(
        config.instance_images if count else held,
        config.resolution,
        template=config.instance_prompt,
        identifier=config.identifier,
        class_noun=config.class_noun,
        captions=config.captions,
        masked=config.masked_loss,
    )
    return without(examples, aside), once(found, aside or tuple(dict.fromkeys(found.names)))


def held_out_data(job: Job, params: Params, examples: Examples, data: TrainingData) -> TrainingData:
    """The held-out photos encoded, beside the class examples of the training data (or none).

    Args:
        params: of the base.
        data: for training.
    """
    config = job.config
    encode = make_encoder(job.pipeline, job.mesh, text_states=not reads_tokens(config))
    crops = cut(examples, config.sr_crop, config.seed) if config.sr_crop else examples
    prior = data.prior
    if pairs_prior(config):
        prior = encode(params, crops._replace(captions=(fill(config.class_prompt, config),) * len(crops.captions)))
    return TrainingData(encode(params, crops), prior)


def make_loss(job: Job) -> Callable[[Params, Params, TrainingData, Key[Array, ""]], Losses]:
    """Builds (trainable, frozen, data, key) -> losses: the training loss of at least `DRAWS` noised pictures of each
    half, the same ones at every call; without caption dropout.

    Args:
        job: of the run, whose loss, process and conditions these are.
    """
    config, pipeline, mesh = job.config, job.pipeline, job.mesh
    size, dtype, side = config.batch_size // config.accumulate, jnp.dtype(config.dtype), training_size(config)[0]
    spread = batch_sharding(mesh, (1 + config.prior_preservation) * size)
    low = pipeline.low_resolution
    of_base = config.prior_preservation and config.prior_target == "base"

    def loss(trainable: Params, frozen: Params, data: TrainingData, key: Key[Array, ""]) -> Losses:
        params = unshard(mesh, job.method.combine(frozen, trainable), dtype)

        def one(number: Array) -> Losses:
            batch = draw(
                data,
                pipeline.process,
                size,
                jax.random.fold_in(key, _STREAM),
                number,
                pipeline.example_shape(side),
                make_augment(low, side, config.sr_noise) if low else None,
                pairs_prior(config),
            )
            return dreambooth_loss(
                pipeline.denoise_tokens if reads_tokens(config) else pipeline.denoise,
                params,
                jax.lax.with_sharding_constraint(batch, spread),
                pipeline.process,
                num_instance=size,
                prior_weight=config.prior_weight,
                snr_gamma=config.snr_gamma or None,
                base=unshard(mesh, frozen, dtype) if of_base else None,
            )

        count = max(DRAWS, len(data.instance.mean))
        return jax.tree.map(jnp.mean, jax.lax.map(one, jnp.arange(-(-count // size))))

    compiled = jax.jit(loss, out_shardings=replicated(mesh))

    def on_mesh(trainable: Params, frozen: Params, data: TrainingData, key: Key[Array, ""]) -> Losses:
        with jax.set_mesh(mesh):  # kernels split their batch over it
            return compiled(trainable, frozen, data, key)

    return on_mesh
