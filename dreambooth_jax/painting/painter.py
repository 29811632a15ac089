"""Prompts and seeds to pictures: the text encoder, the sampler and the decoder in one jitted function."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, PyTree, UInt32

from dreambooth_jax.devices.sharding import batch_sharding, replicated, unshard
from dreambooth_jax.diffusion.low_resolution import UNIFORM, make_augment
from dreambooth_jax.diffusion.sampler import make_sampler, noise_for_keys
from dreambooth_jax.families.family import CODEC, DENOISER, TEXT, Cond, Pictures
from dreambooth_jax.families.pipeline import Pipeline
from dreambooth_jax.models.params import Params


class Request(NamedTuple):
    """One picture: its prompt and negative prompt, the key that its noise comes from and, for a super-resolution stage,
    the picture of the stage before, uint8[h w 3]."""

    prompt: str
    negative: str
    key: jax.Array
    low: np.ndarray | None = None


Painter = Callable[..., Iterator[tuple[int, np.ndarray]]]


class Inputs(NamedTuple):
    """A batch to paint: leading axis b everywhere.

    Attributes:
        tokens, negative: of the prompts and the negative prompts.
        empty: whether the negative prompt is empty.
        pictures: sizes to condition on, and the pictures of the stage before.
        keys: key data of the noise.
    """

    tokens: Cond
    negative: Cond
    empty: Bool[Array | np.ndarray, "b"]
    pictures: Pictures
    keys: UInt32[Array | np.ndarray, "b k"]


def make_paint_batch(
    pipeline: Pipeline,
    mesh: Mesh,
    *,
    resolution: int,
    batch_size: int,
    sampler: str,
    steps: int,
    guidance: float,
    reuse_features: int = 1,
    trained: bool = False,
    sr_noise: str = UNIFORM,
    noise_level: int | None = None,
) -> jax.stages.Wrapped:
    """Builds the jitted `paint_batch(params, inputs) -> (uint8 images [b, h, w, 3], finite)`, split over the mesh: text
    encoders, sampler and decoder in one program. `finite` says of text, denoiser and decoder whether their numbers are.

    Args:
        reuse_features: the denoiser runs whole at every so many-th step, see `make_sampler`.
        trained: whether the model was trained here: a learnt variance of the sampler, which training leaves as it was,
            is then not used.
        sr_noise: noise that a super-resolution stage was trained with, see `make_augment`.
        noise_level: level of the noise on its low-resolution pictures; default: see `LowResolution.sampling_level`.

    Raises:
        ValueError: unknown sampler, a number of steps that it does not take, a denoiser without deep features to keep,
            or a noise level of no training.
    """
    check_divided(pipeline, reuse_features)
    sample = make_sampler(
        pipeline.output,
        pipeline.process,
        sampler=sampler,
        steps=steps,
        clip=pipeline.family.clip(pipeline.models),
        split=(lambda output: (pipeline.split(output)[0], None)) if trained else pipeline.split,
        reuse_features=reuse_features,
        with_deep=pipeline.with_deep,
        shares_input=pipeline.family.shares_input,
    )
    condition = picture_conditions(pipeline, resolution, sr_noise, noise_level)
    shape = pipeline.example_shape(resolution)
    placement = batch_sharding(mesh, batch_size)
    dtypes = {name: x.dtype for name, x in pipeline.frozen_shapes.items()}

    def paint_batch(params: Params, inputs: Inputs) -> tuple[Array, Bool[Array, "3"]]:
        inputs = jax.lax.with_sharding_constraint(inputs, placement)
        params = unshard(mesh, params, dtypes)
        own = jax.random.wrap_key_data(inputs.keys)
        noise = noise_for_keys(own, shape)
        tokens = jax.tree.map(lambda *pair: jnp.concatenate(pair), inputs.negative, inputs.tokens)
        both = pipeline.encode_text(params, tokens)
        uncond, cond = (jax.tree.map(lambda x: jnp.split(x, 2)[half], both) for half in (0, 1))  # noqa: B023
        of_picture = condition(inputs.pictures, own)
        uncond = pipeline.negative(uncond, inputs.empty) | of_picture if guidance != 1.0 else None
        encoded = sample(params, noise, cond | of_picture, uncond, guidance, own)
        pixels = pipeline.decode(params, encoded)
        finite = jnp.stack([_all_finite(values) for values in (both, encoded, pixels)])
        return jnp.round(pixels * 255).astype(jnp.uint8), finite

    return jax.jit(paint_batch, out_shardings=(placement, replicated(mesh)))


def check_divided(pipeline: Pipeline, reuse_features: int) -> None:
    """Raises ValueError if features shall be reused and the denoiser has no deep part of its own."""
    if reuse_features > 1 and pipeline.with_deep is None:
        raise ValueError(
            f"reuse_features = {reuse_features}: the denoiser of {pipeline.family.name} has no deep part of its own, "
            "whose features could be kept; leave it at 1"
        )


class NonFinitePicture(FloatingPointError):
    """A part of the model gave NaN or infinity: there is no picture to show."""


def _all_finite(values: PyTree[Array]) -> Bool[Array, ""]:
    numbers = [x for x in jax.tree.leaves(values) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in numbers]).all()


def check_painted(finite: Bool[Array | np.ndarray, "3"], parts: Sequence[str]) -> None:
    """Raises NonFinitePicture, naming the first of `parts` whose numbers are not finite."""
    for part, is_finite in zip(parts, np.asarray(finite), strict=True):
        if not is_finite:
            raise NonFinitePicture(
                f"no picture: {part} gave numbers that are not finite (NaN or infinity). Its weights are damaged, or "
                "the numbers too large for the dtype: check the base's files, or compute in float32."
            )


def picture_conditions(
    pipeline: Pipeline, resolution: int, sr_noise: str = UNIFORM, noise_level: int | None = None
) -> Callable[[Pictures, Array], Cond]:
    """Builds (pictures, their keys) -> conditions; arguments and errors are those of `make_paint_batch`."""
    low = pipeline.low_resolution
    if low is None:
        return lambda pictures, keys: pipeline.of_example(pictures)
    augment = make_augment(low, resolution, sr_noise, low.sampling_level(sr_noise, noise_level))

    def noisy(pictures: Pictures, keys: Array) -> Cond:
        return jax.vmap(augment)(pipeline.of_example(pictures), jax.vmap(lambda k: jax.random.fold_in(k, _LOW))(keys))

    return noisy


# Of the key of a picture's noise on the low-resolution picture: no sampler has so many steps.
_LOW = 2**31 - 1


def input_shapes(pipeline: Pipeline, batch_size: int, resolution: int) -> Inputs:
    """Shapes of what `paint_batch` takes."""
    shape, tokens = jax.ShapeDtypeStruct, pipeline.family.token_shapes(pipeline.models, batch_size)
    empty, keys = shape((batch_size,), jnp.bool_), shape((batch_size, 2), jnp.uint32)
    return Inputs(tokens, tokens, empty, picture_shapes(pipeline, batch_size, resolution), keys)


def picture_shapes(pipeline: Pipeline, count: int, resolution: int) -> Pictures:
    """Shapes of what `count` pictures of that side are conditioned on."""
    pair, low, small = jax.ShapeDtypeStruct((count, 2), jnp.int32), pipeline.low_resolution, None
    if low is not None:
        small = jax.ShapeDtypeStruct((count, resolution // low.factor, resolution // low.factor, 3), jnp.uint8)
    return Pictures(small, pair, pair, pair)


def to_paint(pipeline: Pipeline, resolution: int, requests: Sequence[Request]) -> Pictures:
    """What the pictures are conditioned on: the sizes of whole pictures of that side, as samplers usually ask for, and
    the requests' low-resolution pictures.

    Raises:
        ValueError: a low-resolution picture is absent or of another size.
    """
    side = np.full((len(requests), 2), resolution, np.int32)
    images = None
    if low := pipeline.low_resolution:
        small = resolution // low.factor
        wrong = {None if r.low is None else r.low.shape[:2] for r in requests} - {(small, small)}
        if wrong:
            raise ValueError(
                f"{pipeline.family.name} enlarges pictures {low.factor} times: for {resolution} pixels it needs "
                f"pictures of {small} x {small}, got {wrong.pop() or 'none'}"
            )
        images = np.stack([r.low for r in requests])
    return Pictures(images, side, np.zeros_like(side), side)


def batch_for(counts: Sequence[int], most: int, devices: int = 1) -> int:
    """The number of pictures to paint at once, for requests of `counts` pictures: requests are filled up to whole
    batches with pictures that nobody sees, none by more than a quarter. Of the sizes left, the one of least work; a
    call counts as a quarter of a picture, for reading the weights. Where there are more devices than pictures, the
    devices without one stay idle in any case.

    Args:
        counts: numbers above 0.
        most: largest batch, all devices together.
        devices: number of devices; the batch is a multiple of it where `most` is no smaller.
    """
    together = min(most, devices)
    needed = [-(-count // together) for count in counts]

    def filled(size: int) -> list[int]:
        return [-(-count // size) * size for count in needed]

    def work(size: int) -> float:
        return sum(rows + rows / size / 4 for rows in filled(size))

    sizes = range(max(1, most // together), 0, -1)
    fitting = [size for size in sizes if all(4 * r <= 5 * n for r, n in zip(filled(size), needed, strict=True))]
    return together * min(fitting, key=work)


def make_painter(pipeline: Pipeline, mesh: Mesh, *, resolution: int, batch_size: int, **kw: Any) -> Painter:
    """Builds `paint(params, requests, all_processes=True)`, which yields (number of the request, uint8 image [h, w, 3])
    as they are done.

    The pictures are computed `batch_size` at a time, split over the mesh, by one compiled program; each depends on its
    request alone. All processes must pass the same requests. Each yields every picture, or with `all_processes=False`
    only its own share. Arguments and errors are those of `make_paint_batch`.
    """
    compiled = make_paint_batch(pipeline, mesh, resolution=resolution, batch_size=batch_size, **kw)
    whole = jax.jit(lambda images: images, out_shardings=replicated(mesh))
    roles = (("the text encoder", TEXT), ("the denoiser", DENOISER), ("the decoder", CODEC))
    parts = [f"{name} ({', '.join(pipeline.family.names(role))})" for name, role in roles]

    def paint(
        params: Params, requests: Sequence[Request], all_processes: bool = True
    ) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(requests), batch_size):
            part = list(requests[start : start + batch_size])
            padded = part + part[-1:] * (batch_size - len(part))
            inputs = Inputs(
                tokens=pipeline.tokenize([r.prompt for r in padded]),
                negative=pipeline.tokenize([r.negative for r in padded]),
                empty=np.array([not r.negative for r in padded]),
                pictures=to_paint(pipeline, resolution, padded),
                keys=np.stack([jax.random.key_data(r.key) for r in padded]),
            )
            with jax.set_mesh(mesh):  # kernels split their batch over it
                images, finite = compiled(params, inputs)
            check_painted(finite, parts)
            rows = enumerate(np.asarray(whole(images))) if all_processes else _local_rows(images)
            for number, image in rows:
                if number < len(part):
                    yield start + number, image

    return paint


def _local_rows(images: Array) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of a batch that this process is the one to hand out."""
    for shard in images.addressable_shards:
        if shard.replica_id == 0:
            first = shard.index[0].indices(images.shape[0])[0]
            yield from enumerate(np.asarray(shard.data), first)
