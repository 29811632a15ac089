"""Prompts and seeds to pictures: the text encoder, the sampler and the decoder in one jitted function."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, UInt32

from dreambooth_jax.devices.sharding import batch_sharding, gather, replicated
from dreambooth_jax.diffusion.sampler import make_sampler
from dreambooth_jax.families.family import Pictures
from dreambooth_jax.families.pipeline import Pipeline
from dreambooth_jax.models.params import Params


class Request(NamedTuple):
    """One picture: its prompt and negative prompt, and the key that its noise comes from."""

    prompt: str
    negative: str
    key: jax.Array


Painter = Callable[..., Iterator[tuple[int, np.ndarray]]]


class Inputs(NamedTuple):
    """A batch to paint: leading axis b everywhere.

    Attributes:
        tokens, negative: of the prompts and the negative prompts.
        empty: whether the negative prompt is empty.
        pictures: sizes to condition on.
        keys: key data of the noise.
    """

    tokens: Any
    negative: Any
    empty: Bool[Array | np.ndarray, "b"]
    pictures: Pictures
    keys: UInt32[Array | np.ndarray, "b k"]


def make_paint_batch(
    pipeline: Pipeline, mesh: Mesh, *, resolution: int, batch_size: int, sampler: str, steps: int, guidance: float
) -> Callable[[Params, Inputs], Array]:
    """Builds the jitted `paint_batch(params, inputs) -> uint8 images [b, h, w, 3]`, split over the mesh: text encoders,
    sampler and decoder in one program.

    Raises:
        ValueError: unknown sampler or a number of steps it does not take.
    """
    sample = make_sampler(pipeline.denoise, pipeline.process, sampler=sampler, steps=steps)
    shape = pipeline.example_shape(resolution)
    spread = batch_sharding(mesh, batch_size)

    def paint_batch(params: Params, inputs: Inputs) -> Array:
        inputs = jax.lax.with_sharding_constraint(inputs, spread)
        params = gather(mesh, params)
        own = jax.random.wrap_key_data(inputs.keys)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(own)
        tokens = jax.tree.map(lambda *pair: jnp.concatenate(pair), inputs.negative, inputs.tokens)
        both = pipeline.encode_text(params, tokens)
        uncond, cond = (jax.tree.map(lambda x: jnp.split(x, 2)[half], both) for half in (0, 1))  # noqa: B023
        of_picture = pipeline.of_example(inputs.pictures)
        if pipeline.family.augment is not None:
            of_picture = jax.vmap(pipeline.family.augment)(
                of_picture, jax.vmap(lambda key: jax.random.fold_in(key, 3))(own)
            )
        uncond = pipeline.negative(uncond, inputs.empty) | of_picture if guidance != 1.0 else None
        encoded = sample(params, noise, cond | of_picture, uncond, guidance, own)
        return jnp.round(pipeline.decode(params, encoded) * 255).astype(jnp.uint8)

    return jax.jit(paint_batch, out_shardings=spread)


def input_shapes(pipeline: Pipeline, batch_size: int) -> Inputs:
    """Shapes of what `paint_batch` takes."""
    shape, tokens = jax.ShapeDtypeStruct, pipeline.family.token_shapes(pipeline.models, batch_size)
    pair = shape((batch_size, 2), jnp.int32)
    empty, keys = shape((batch_size,), jnp.bool_), shape((batch_size, 2), jnp.uint32)
    return Inputs(tokens, tokens, empty, Pictures(None, pair, pair, pair), keys)


def sizes_to_paint(resolution: int, count: int) -> Pictures:
    """The sizes that `count` pictures are painted for: whole pictures of that side, as samplers usually ask for."""
    side = np.full((count, 2), resolution, np.int32)
    return Pictures(None, side, np.zeros_like(side), side)


def make_painter(pipeline: Pipeline, mesh: Mesh, *, resolution: int, batch_size: int, **kw: Any) -> Painter:
    """Builds `paint(params, requests, everywhere=True)`, which yields (number of the request, uint8 image [h, w, 3]) as
    they are done.

    The pictures are computed `batch_size` at a time, split over the mesh, by one compiled program; each depends on its
    request alone. With several processes, all of them paint the same requests; each is yielded every picture, or with
    `everywhere=False` only its own, so that every picture is one process's. Arguments and errors are those of
    `make_paint_batch`.
    """
    compiled = make_paint_batch(pipeline, mesh, resolution=resolution, batch_size=batch_size, **kw)
    whole = jax.jit(lambda images: images, out_shardings=replicated(mesh))

    def paint(params: Params, requests: Sequence[Request], everywhere: bool = True) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(requests), batch_size):
            part = list(requests[start : start + batch_size])
            padded = part + part[-1:] * (batch_size - len(part))
            inputs = Inputs(
                tokens=pipeline.tokenize([r.prompt for r in padded]),
                negative=pipeline.tokenize([r.negative for r in padded]),
                empty=np.array([not r.negative for r in padded]),
                pictures=sizes_to_paint(resolution, batch_size),
                keys=np.stack([jax.random.key_data(r.key) for r in padded]),
            )
            with jax.set_mesh(mesh):  # kernels split their batch over it
                images = compiled(params, inputs)
            rows = enumerate(np.asarray(whole(images))) if everywhere else _local_rows(images)
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
