"""Held-out photos of a run, and the loss on them: with fixed noise and times, a function of (config, step)."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from dreambooth_jax.data.buckets import Size
from dreambooth_jax.data.encode import make_encoder
from dreambooth_jax.data.held_out import last_names, once, shared_files, without
from dreambooth_jax.data.images import Examples, read_buckets
from dreambooth_jax.data.low_resolution import cut
from dreambooth_jax.devices.sharding import batch_sharding, replicated, unshard
from dreambooth_jax.diffusion.examples import EncodedExamples, TrainingData, draw
from dreambooth_jax.diffusion.loss import Losses, dreambooth_loss
from dreambooth_jax.diffusion.low_resolution import make_augment
from dreambooth_jax.models.params import Params
from dreambooth_jax.runs.config import ConfigError, fill
from dreambooth_jax.runs.job import Job, pairs_prior, reads_tokens

DRAWS = 32  # noised pictures of each half per value: 8 left 3 % of noise between the means of two sets of draws
_STREAM = 2**31 - 1  # no step has this number


def divide(
    buckets: Sequence[Examples], config: ConfigDict, sizes: Sequence[Size]
) -> tuple[tuple[Examples, ...], tuple[Examples, ...]]:
    """(examples to train on, held-out photos), both by shape: held out are centre crops, each photo once.

    Args:
        buckets: examples of `instance_images`, by shape.
        sizes: heights and widths in pixels that photos may be cropped to.

    Raises:
        ConfigError: nothing is left to train on, or a held-out photo trains.
        ValueError, OSError: see `read_buckets`.
    """
    held = config.held_out_images
    if not held:
        return tuple(buckets), ()
    count = int(held) if held.isdecimal() else 0
    try:
        aside = last_names([name for part in buckets for name in part.names], count) if count else ()
    except ValueError as error:
        raise ConfigError(f"{config.instance_images}: {error}") from error
    if not count and (shared := shared_files(config.instance_images, held)):
        raise ConfigError(
            f"held_out_images = {held!r}: {', '.join(shared)} lie in {config.instance_images} too, and train; their "
            "loss would say nothing. Take them out of one of the folders."
        )
    found = read_buckets(
        config.instance_images if count else held,
        sizes,
        template=config.instance_prompt,
        identifier=config.identifier,
        class_noun=config.class_noun,
        captions=config.captions,
        masked=config.masked_loss,
    )
    kept = [part for part in (without(part, aside) for part in buckets) if part.names]
    kept[0] = kept[0]._replace(notes=sum((part.notes for part in buckets), ()))
    kept[1:] = [part._replace(notes=()) for part in kept[1:]]
    own = [(part, [name for name in dict.fromkeys(part.names) if not aside or name in aside]) for part in found]
    return tuple(kept), tuple(once(part, names) for part, names in own if names)


def held_out_data(job: Job, params: Params, examples: Examples, prior: EncodedExamples | None) -> TrainingData:
    """Held-out photos of one shape encoded, beside class examples.

    Args:
        params: of the base.
        prior: class examples of this shape, or None.
    """
    config = job.config
    encode = make_encoder(job.pipeline, job.mesh, text_states=not reads_tokens(config))
    crops = cut(examples, config.sr_crop, config.seed) if config.sr_crop else examples
    if pairs_prior(config):
        prior = encode(params, crops._replace(captions=(fill(config.class_prompt, config),) * len(crops.captions)))
    return TrainingData(encode(params, crops), prior)


def mean_loss(
    job: Job, data: Sequence[tuple[Size, TrainingData]]
) -> Callable[[Params, Params, Key[Array, ""]], Losses]:
    """Builds (trainable, frozen, key) -> losses on photos of several shapes: every photo counts alike.

    Args:
        data: of each shape, with height and width in pixels.
    """
    counts = [len(part.instance.mean) for _, part in data]
    shares = [count / sum(counts) for count in counts]
    losses = [
        make_loss(job, size, draws=math.ceil(DRAWS * share)) for (size, _), share in zip(data, shares, strict=True)
    ]

    def loss(trainable: Params, frozen: Params, key: Key[Array, ""]) -> Losses:
        found = [one(trainable, frozen, part, key) for one, (_, part) in zip(losses, data, strict=True)]
        return jax.tree.map(lambda *values: sum(x * share for x, share in zip(values, shares, strict=True)), *found)

    return loss


def make_loss(
    job: Job, size: Size, *, draws: int = DRAWS
) -> Callable[[Params, Params, TrainingData, Key[Array, ""]], Losses]:
    """Builds (trainable, frozen, data, key) -> losses: the training loss of at least `draws` noised pictures of each
    half, the same ones at every call; without caption dropout.

    Args:
        job: of the run, whose loss, process and conditions these are.
        size: height and width of the pictures in pixels.
    """
    config, pipeline, mesh = job.config, job.pipeline, job.mesh
    batch_size, dtype = config.batch_size // config.accumulate, jnp.dtype(config.dtype)
    spread = batch_sharding(mesh, (1 + config.prior_preservation) * batch_size)
    low = pipeline.low_resolution
    of_base = config.prior_preservation and config.prior_target == "base"

    def loss(trainable: Params, frozen: Params, data: TrainingData, key: Key[Array, ""]) -> Losses:
        params = unshard(mesh, job.method.combine(frozen, trainable), dtype)

        def one(number: Array) -> Losses:
            batch = draw(
                data,
                pipeline.process,
                batch_size,
                jax.random.fold_in(key, _STREAM),
                number,
                pipeline.example_shape(*size),
                make_augment(low, size[0], config.sr_noise) if low else None,
                pairs_prior(config),
            )
            return dreambooth_loss(
                pipeline.denoise_tokens if reads_tokens(config) else pipeline.denoise,
                params,
                jax.lax.with_sharding_constraint(batch, spread),
                pipeline.process,
                num_instance=batch_size,
                prior_weight=config.prior_weight,
                snr_gamma=config.snr_gamma or None,
                base=unshard(mesh, frozen, dtype) if of_base else None,
            )

        count = max(draws, len(data.instance.mean))
        return jax.tree.map(jnp.mean, jax.lax.map(one, jnp.arange(-(-count // batch_size))))

    compiled = jax.jit(loss, out_shardings=replicated(mesh))

    def on_mesh(trainable: Params, frozen: Params, data: TrainingData, key: Key[Array, ""]) -> Losses:
        with jax.set_mesh(mesh):  # kernels split their batch over it
            return compiled(trainable, frozen, data, key)

    return on_mesh
