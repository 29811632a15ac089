"""The compiled programs of a training run, from shapes alone: `train` runs them, `plan` compiles them for a slice
without its hardware."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key
from ml_collections import ConfigDict

from dreambooth_jax.adapters.factors import FORMS
from dreambooth_jax.adapters.inversion import CUSTOM, both, inversion, is_row, stop_after
from dreambooth_jax.adapters.lora import lora
from dreambooth_jax.adapters.many import Lanes, rescaled
from dreambooth_jax.adapters.method import Method, full
from dreambooth_jax.adapters.quantised import quantised, quantised_shapes
from dreambooth_jax.data.buckets import Size, bucket_sizes
from dreambooth_jax.devices import compiler_options
from dreambooth_jax.devices.sharding import (
    batch_sharding,
    placed_shapes,
    replicated,
    replicated_shapes,
    state_shardings,
    unshard,
)
from dreambooth_jax.diffusion.buckets import in_turns
from dreambooth_jax.diffusion.examples import EncodedExamples, Numbers, TrainingData, room, with_room
from dreambooth_jax.diffusion.low_resolution import make_augment
from dreambooth_jax.diffusion.optimizer import learning_rate, make_optimizer
from dreambooth_jax.diffusion.step import Metrics, TrainState, init_state, kept, make_step, recomputed, run_steps
from dreambooth_jax.families.family import DENOISER, TEXT, Cond
from dreambooth_jax.families.pipeline import Pipeline, load_pipeline
from dreambooth_jax.models.params import Params, Shapes
from dreambooth_jax.painting.painter import (
    Inputs,
    Painter,
    batch_for,
    check_divided,
    input_shapes,
    make_paint_batch,
    make_painter,
    picture_shapes,
)
from dreambooth_jax.runs.config import WITH_TOKEN, ConfigError


class Job(NamedTuple):
    """Everything that the programs depend on. In `config`, `resolution` is in pixels, never 0, and `class_batch_size`
    is the number of pictures painted at once, no longer the most (see `pictures_at_once`)."""

    config: ConfigDict
    pipeline: Pipeline
    mesh: Mesh
    optimizer: optax.GradientTransformationExtraArgs
    method: Method


def make_job(config: ConfigDict, pipeline: Pipeline, mesh: Mesh) -> Job:
    """Resolves resolution, method and optimizer of a config.

    Raises:
        ValueError: the optimizer or its schedule is not implemented, or features of the base cannot be reused.
    """
    check_divided(pipeline, config.reuse_features)
    resolved = {
        "resolution": config.resolution or pipeline.resolution,
        "class_batch_size": pictures_at_once(config, mesh),
    }
    config = ConfigDict(dict(config) | resolved)
    method = make_method(config, pipeline)
    return Job(config, pipeline, mesh, _optimizer(config, pipeline, mesh, method, numbers_of(config)), method)


def numbers_of(config: ConfigDict) -> Numbers:
    """The settings of a run that its training program takes as arguments."""
    return Numbers(*(float(config[name]) for name in Numbers._fields))


def _optimizer(
    config: ConfigDict, pipeline: Pipeline, mesh: Mesh, method: Method, numbers: Numbers
) -> optax.GradientTransformationExtraArgs:
    """The config's optimizer with these numbers, which may be arguments of a program."""
    rate = learning_rate(config.lr_schedule, numbers.learning_rate, warmup=config.lr_warmup_steps, steps=config.steps)
    of_text = numbers.text_encoder_multiplier
    optimizer = make_optimizer(
        config.optimizer,
        rate,
        weight_decay=numbers.weight_decay,
        clip_norm=numbers.clip_norm if config.clip_norm else None,
        moment_dtype=config.moment_dtype,
        second_moment_dtype=config.second_moment_dtype,
        multiplier=lambda name: method.multiplier(name) * (of_text if pipeline.family.role_of(name) == TEXT else 1.0),
        decays=method.decays,
        mesh=mesh,
    )
    if config.method == "pivotal":
        optimizer = optax.chain(optimizer, stop_after(tokens_held_from(config), is_row))
    return optimizer


def tokens_held_from(config: ConfigDict) -> int:
    """The first step at which the vectors of new tokens are frozen."""
    return round(config.pivotal_fraction * config.steps) if config.method == "pivotal" else config.steps


def open_base(config: ConfigDict, **settings: Any) -> Pipeline:
    """The config's base, with its new tokens if the method has some; `settings` and errors are `load_pipeline`'s.

    Raises:
        ValueError: the identifier is a token already.
    """
    pipeline = load_pipeline(config.base, **settings)
    return pipeline.with_token(config.identifier, config.token_vectors) if config.method in WITH_TOKEN else pipeline


def reads_tokens(config: ConfigDict) -> bool:
    """Whether the training data hold tokens, and the text encoders are differentiated; else the data hold text
    states."""
    return config.train_text_encoder or config.method in WITH_TOKEN


def make_method(config: ConfigDict, pipeline: Pipeline) -> Method:
    """The method that the config names, on the denoiser and, if it says so, the text encoders.

    Raises:
        ValueError: the config trains a text encoder of a family that never trains it.
    """
    if reads_tokens(config) and not pipeline.family.trains_text:
        raise ValueError(
            f"train_text_encoder = {config.train_text_encoder}, method = {config.method!r}: {pipeline.family.name} "
            "reads a frozen T5 (arXiv 2208.12242, section 4); give --config.train_text_encoder=False and a method "
            "without new tokens"
        )
    if config.method not in WITH_TOKEN:
        return _method_on_weights(config.method, config, pipeline)
    rows = inversion(
        pipeline.trainable(TEXT), config.token_vectors, lambda: pipeline.ids_of(config.token_start or config.class_noun)
    )
    if config.method == "inversion":
        return rows
    if config.method == "pivotal":
        return both(rows, _method_on_weights("lora", config, pipeline))
    parts = pipeline.trainable(DENOISER)
    return both(rows, full(f"{parts}.*{CUSTOM}", "the keys and values of cross-attention"))


def _method_on_weights(kind: str, config: ConfigDict, pipeline: Pipeline) -> Method:
    roles = (DENOISER, TEXT) if config.train_text_encoder else (DENOISER,)
    parts, names = pipeline.trainable(*roles), " and ".join(pipeline.family.names(*roles))
    if kind in FORMS:
        return lora(
            parts,
            config.lora_targets,
            config.lora_rank,
            config.lora_alpha,
            names,
            form=kind,
            ranks=config.lora_ranks,
            stabilized=config.lora_scaling == "stabilized",
            ratio=config.lora_plus_ratio,
        )
    return full(parts, names)


def pairs_prior(config: ConfigDict) -> bool:
    """Whether the prior half repeats the noised photos with the class prompt, and the base's predictions are its
    targets."""
    return config.prior_preservation and config.prior_target == "base" and not config.class_images


def initial(job: Job) -> Callable[[Params], TrainState]:
    """trainable -> the state before the first step."""
    return functools.partial(init_state, optimizer=job.optimizer, ema=job.config.ema_decay > 0)


def read_shapes(job: Job) -> Shapes:
    """Shapes and dtypes in which the base's parameters are read: trained ones in float32, frozen ones as
    `Pipeline.frozen_shapes`."""
    _, frozen = job.method.shapes(job.pipeline.shapes)
    kept = job.pipeline.frozen_shapes
    return {name: kept[name] if name in frozen else shape for name, shape in job.pipeline.shapes.items()}


def held(job: Job, params: Params) -> Params:
    """The base's parameters as a run holds them, from those of `read_shapes`, which are given up."""
    return quantised(params, _in_eight_bits(job), job.mesh)


def _in_eight_bits(job: Job) -> list[str]:
    """The modules whose kernels are held in eight bits: with `frozen_dtype` all frozen ones of denoiser and text
    encoders."""
    if not job.config.frozen_dtype:
        return []
    _, frozen = job.method.shapes(job.pipeline.shapes)
    family = job.pipeline.family
    kernels = [name for name, x in frozen.items() if name.endswith(".kernel") and len(x.shape) > 1]
    return [name.removesuffix(".kernel") for name in kernels if family.role_of(name) in (DENOISER, TEXT)]


def split_shapes(job: Job) -> tuple[Shapes, Shapes]:
    """(trainable, frozen) shapes, as the mesh holds them."""
    trainable, frozen = job.method.shapes(quantised_shapes(read_shapes(job), _in_eight_bits(job)))
    return placed_shapes(job.mesh, trainable), placed_shapes(job.mesh, frozen)


def state_shapes(job: Job, trainable: Params | Shapes) -> TrainState:
    """Shapes of the whole train state, as the mesh holds it; `trainable` may be arrays or shapes."""
    shapes = jax.eval_shape(initial(job), trainable)
    shardings = state_shardings(job.mesh, trainable, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def fresh_state(job: Job, trainable: Params) -> TrainState:
    """The state before the first step, placed on the mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, state_shapes(job, trainable))
    return jax.jit(initial(job), out_shardings=shardings)(trainable)


def argument_shapes(
    job: Job, num_instance: int, size: Size | None = None
) -> tuple[TrainState, Shapes, TrainingData, jax.ShapeDtypeStruct]:
    """The arguments of `lower_steps` as shapes, (state, frozen, data, key), for a subject of `num_instance` images."""
    trainable, frozen = split_shapes(job)
    data = data_shapes(job, num_instance, job.config.num_class_images, size)
    return state_shapes(job, trainable), frozen, data, key_shape(job)


def resident_data(job: Job, data: Sequence[TrainingData]) -> tuple[tuple[TrainingData, ...], Int[np.ndarray, "steps"]]:
    """The data as arguments of the training programs, with the order of the run, its numbers and room for other counts
    (`data_shapes`); and the bucket of every step."""
    config, place = job.config, replicated(job.mesh)
    key = jax.random.key(config.seed)
    turned, bucket = in_turns(data, config.batch_size, key, room(config.steps), pairs_prior(config))
    numbers = jax.device_put(jax.tree.map(np.float32, numbers_of(config)), place)
    enlarge = jax.jit(lambda half: half and with_room(half), out_shardings=place)
    whole = [TrainingData(enlarge(part.instance), enlarge(part.prior), part.order, numbers) for part in turned]
    return tuple(whole), bucket[: config.steps]


def data_shapes(
    job: Job, num_instance: int, num_class: int, size: Size | None = None, captions: int = 1
) -> TrainingData:
    """Shapes of `resident_data`; every device has all of them.

    Args:
        size: height and width of the examples in pixels; default: `training_size`.
        captions: number of the subject's captions, the empty one of caption dropout included. The class has one.
    """
    config, pipeline = job.config, job.pipeline
    size, shape = size or training_size(config), jax.ShapeDtypeStruct

    def resident(count: int, captions: int) -> EncodedExamples:
        tokens = pipeline.family.token_shapes(pipeline.models, room(captions))
        cond = tokens if reads_tokens(config) else jax.eval_shape(pipeline.encode_text, pipeline.shapes, tokens)
        latents = shape((count, math.prod(pipeline.example_shape(*size))), jnp.float32)
        own = jax.eval_shape(pipeline.of_example, picture_shapes(pipeline, count, size[0])) or None
        index = shape((count, config.shuffle_tags) if config.shuffle_tags else (count,), jnp.int32)
        pixels = math.prod(pipeline.example_shape(*size)[:-1])
        weight = shape((count, pixels), jnp.float32) if config.masked_loss else None
        return EncodedExamples(latents, latents, cond, index, own, weight)

    count = num_instance if pairs_prior(config) else num_class
    prior = resident(room(count), 1) if config.prior_preservation else None
    columns = config.batch_size * (1 if prior is None or pairs_prior(config) else 2)
    data = TrainingData(
        resident(room(num_instance), captions),
        prior,
        shape((room(config.steps), columns), jnp.int32),
        jax.tree.map(lambda _: shape((), jnp.float32), numbers_of(config)),
    )
    return replicated_shapes(job.mesh, data)


def training_size(config: ConfigDict) -> Size:
    """Height and width in pixels of square training examples: a super-resolution stage's crops, or whole pictures."""
    return (config.sr_crop or config.resolution,) * 2


def possible_sizes(job: Job) -> tuple[Size, ...]:
    """Heights and widths in pixels that the photos may be cropped to: the square, or with `buckets` others too.

    Raises:
        ConfigError: `buckets` with a stage of a cascade, whose pictures are square.
    """
    config, pipeline = job.config, job.pipeline
    if not config.buckets:
        return ((config.resolution, config.resolution),)
    if config.stages or pipeline.low_resolution is not None:
        raise ConfigError(
            f"buckets = True: the stages of a cascade ({pipeline.family.name}) enlarge square pictures; give "
            "--config.buckets=False"
        )
    return bucket_sizes(config.resolution, pipeline.multiple)


def key_shape(job: Job) -> jax.ShapeDtypeStruct:
    """Shape of the run's key."""
    return replicated_shapes(job.mesh, jax.eval_shape(lambda: jax.random.key(0)))


def lower_steps(
    job: Job,
    state: TrainState,
    frozen: Params | Shapes,
    data: TrainingData,
    key: jax.Array | jax.ShapeDtypeStruct,
    size: Size | None = None,
) -> jax.stages.Lowered:
    """The call of up to `steps_per_call` training steps: (state, frozen, data, key, count) -> (state, metrics).

    Arguments may be arrays or ShapeDtypeStructs with shardings. The state is donated.

    Args:
        size: height and width of the examples in pixels; default: `training_size`.
    """
    run = run_steps(training_step(job, size), job.config.steps_per_call)
    return lower_calls(job, run, state, frozen, data, key)


def training_step(
    job: Job, size: Size | None = None, *, mapped: bool = False
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step (state, frozen, data, key) -> (state, metrics).

    Args:
        size: see `lower_steps`.
        mapped: whether the step is for `adapters.many.over_subjects`: it takes (frozen, scale), and the subjects are
            divided over the mesh in place of the batch.
    """
    config, pipeline, mesh, dtype = job.config, job.pipeline, job.mesh, jnp.dtype(job.config.dtype)
    batch = (1 + config.prior_preservation) * config.batch_size // config.accumulate
    placement = batch_sharding(mesh, batch)
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    of_base = config.prior_preservation and config.prior_target == "base"
    # Sums over parts are no products; among several devices, recomputed products would be exchanged a second time too.
    recomputes = on_tpu and mesh.size == 1 and not mapped and config.accumulate == 1
    low, size = pipeline.low_resolution, size or training_size(config)

    def combine(frozen: Any, trainable: Params) -> Params:
        if mapped:
            frozen, trainable = frozen[0], rescaled(trainable, frozen[1])
        return unshard(mesh, job.method.combine(frozen, trainable), dtype, later=pipeline.later)

    def of_frozen(frozen: Any) -> Params:
        return unshard(mesh, frozen[0] if mapped else frozen, dtype, later=pipeline.later)

    def step(state: TrainState, frozen: Any, data: TrainingData, key: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        numbers = data.numbers or numbers_of(config)
        advance = make_step(
            pipeline.denoise_tokens if reads_tokens(config) else pipeline.denoise,
            _optimizer(config, pipeline, mesh, job.method, numbers),
            pipeline.process,
            batch_size=config.batch_size,
            combine=combine,
            prior_weight=numbers.prior_weight,
            snr_gamma=numbers.snr_gamma if config.snr_gamma else None,
            accumulate=config.accumulate,
            hold=recomputed if recomputes else kept,
            ema_decay=numbers.ema_decay if config.ema_decay else None,
            example_shape=pipeline.example_shape(*size),
            base=of_frozen if of_base else None,
            paired=pairs_prior(config),
            dropout=numbers.caption_dropout if config.caption_dropout else None,
            augment=make_augment(low, size[0], config.sr_noise) if low else None,
            constrain=lambda batch: batch if mapped else jax.lax.with_sharding_constraint(batch, placement),
        )
        return advance(state, frozen, data, key)

    return step


def lower_calls(
    job: Job,
    run: Callable[..., tuple[TrainState, Metrics]],
    state: TrainState,
    frozen: Params | Shapes,
    data: TrainingData | Lanes,
    key: jax.Array | jax.ShapeDtypeStruct,
) -> jax.stages.Lowered:
    """The call of any `run` of `run_steps`; see `lower_steps`."""
    mesh = job.mesh
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    shardings = jax.tree.map(lambda x: x.sharding, state)
    steps = jax.jit(
        run,
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
        keep_unused=True,  # frozen parameters stay on the devices, to paint samples: their memory counts
        compiler_options=compiler_options.TRAINING if on_tpu else None,
    )
    with jax.set_mesh(mesh):  # kernels split their batch over it
        return steps.lower(state, frozen, data, key, jax.ShapeDtypeStruct((), jnp.int32))


def pictures_at_once(config: ConfigDict, mesh: Mesh) -> int:
    """How many pictures a run paints at once: at most `class_batch_size`, and so that its sheets and class images fill
    whole batches (`batch_for`)."""
    without_identifier = [prompt for prompt in config.sample_prompts if "{identifier}" not in prompt]
    counts = [config.sample_count * len(prompts) for prompts in (config.sample_prompts, without_identifier)]
    if config.prior_preservation and not pairs_prior(config):
        counts.append(config.num_class_images)
    return batch_for([count for count in counts if count], config.class_batch_size, mesh.size)


def painting_settings(config: ConfigDict, pipeline: Pipeline) -> dict[str, Any]:
    """The arguments of `make_paint_batch` with which a run paints samples and, but for `reuse_features`, class images:
    these are training data, and the whole model's own."""
    return {
        "resolution": config.resolution or pipeline.resolution,
        "batch_size": config.class_batch_size,
        "sampler": config.sampler,
        "steps": config.sampling_steps,
        "guidance": config.guidance_scale,
        "reuse_features": config.reuse_features,
        "trained": True,
        "sr_noise": config.sr_noise,
    }


def painter_of(config: ConfigDict, pipeline: Pipeline, mesh: Mesh, **own: Any) -> Painter:
    """The painter of a run's pictures; `own` replaces some of `painting_settings`."""
    return make_painter(pipeline, mesh, **painting_settings(config, pipeline) | own)


def lower_painting(job: Job) -> jax.stages.Lowered:
    """Painting one batch of samples: (params, inputs) -> images."""
    config, pipeline = job.config, job.pipeline
    paint = make_paint_batch(pipeline, job.mesh, **painting_settings(config, pipeline))
    return _lower_on_mesh(job, paint, input_shapes(pipeline, config.class_batch_size, config.resolution))


def lower_ends(job: Job, batch_size: int) -> jax.stages.Lowered:
    """What painting does besides sampling: encode the prompts of a batch, and decode its pictures."""
    pipeline, resolution = job.pipeline, job.config.resolution
    encoded = jax.ShapeDtypeStruct((batch_size, *pipeline.example_shape(resolution)), jnp.float32)
    dtypes = {name: x.dtype for name, x in pipeline.frozen_shapes.items()}

    def ends(params: Params, arguments: tuple[Inputs, Array]) -> tuple[list[Cond], Array]:
        inputs, encoded = jax.lax.with_sharding_constraint(arguments, batch_sharding(job.mesh, batch_size))
        params = unshard(job.mesh, params, dtypes)
        texts = [pipeline.encode_text(params, tokens) for tokens in (inputs.negative, inputs.tokens)]
        return texts, pipeline.decode(params, encoded)

    return _lower_on_mesh(job, jax.jit(ends), (input_shapes(pipeline, batch_size, resolution), encoded))


def _lower_on_mesh(job: Job, function: jax.stages.Wrapped, arguments: Any) -> jax.stages.Lowered:
    """Lowers (params, arguments) -> results, for parameters as the run holds them and replicated arguments."""
    placed = replicated_shapes(job.mesh, arguments)
    trainable, frozen = split_shapes(job)
    with jax.set_mesh(job.mesh):
        return function.lower(trainable | frozen, placed)
