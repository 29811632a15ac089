"""Prompts and seeds to pictures: the text encoder, the sampler and the decoder in one jitted function."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from dreambooth_jax.devices.sharding import batch_sharding, gather, replicated
from dreambooth_jax.diffusion.sampler import make_sampler
from dreambooth_jax.families.pipeline import Pipeline
from dreambooth_jax.models.params import Params


class Request(NamedTuple):
    """One picture: its prompt and negative prompt, and the key that its noise comes from."""

    prompt: str
    negative: str
    key: jax.Array


Painter = Callable[..., Iterator[tuple[int, np.ndarray]]]


def make_paint_batch(
    pipeline: Pipeline, mesh: Mesh, *, resolution: int, batch_size: int, sampler: str, steps: int, guidance: float
):
    """Builds the jitted `paint_batch(params, ids, negative_ids, keys) -> uint8 images [b, h, w, 3]`, split over the
    mesh: text encoder, sampler and decoder in one program.

    Raises:
        ValueError: unknown sampler or a number of steps it does not take.
    """
    sample = make_sampler(pipeline.denoise, pipeline.process, sampler=sampler, steps=steps)
    shape = pipeline.latent_shape(resolution)
    spread = batch_sharding(mesh, batch_size)

    def paint_batch(params: Params, ids: Array, negative_ids: Array, keys: Array) -> Array:
        keys, ids, negative_ids = jax.lax.with_sharding_constraint((keys, ids, negative_ids), spread)
        params = gather(mesh, params)
        own = jax.random.wrap_key_data(keys)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(own)
        states = pipeline.encode_text(params, jnp.concatenate([negative_ids, ids]))
        uncond, cond = jnp.split(states, 2)
        latents = sample(params, noise, cond, uncond if guidance != 1.0 else None, guidance, own)
        return jnp.round(pipeline.decode_latents(params, latents) * 255).astype(jnp.uint8)

    return jax.jit(paint_batch, out_shardings=spread)


def make_painter(pipeline: Pipeline, mesh: Mesh, *, batch_size: int, **kw) -> Painter:
    """Builds `paint(params, requests, everywhere=True)`, which yields (number of the request, uint8 image [h, w, 3]) as
    they are done.

    The pictures are computed `batch_size` at a time, split over the mesh, by one compiled program; each depends on its
    request alone. With several processes, all of them paint the same requests; each is yielded every picture, or with
    `everywhere=False` only its own, so that every picture is one process's. Arguments and errors are those of
    `make_paint_batch`.
    """
    compiled = make_paint_batch(pipeline, mesh, batch_size=batch_size, **kw)
    whole = jax.jit(lambda images: images, out_shardings=replicated(mesh))

    def paint(params: Params, requests: Sequence[Request], everywhere: bool = True) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(requests), batch_size):
            part = list(requests[start : start + batch_size])
            padded = part + part[-1:] * (batch_size - len(part))
            ids = pipeline.tokenize([r.prompt for r in padded])
            negative = pipeline.tokenize([r.negative for r in padded])
            keys = np.stack([jax.random.key_data(r.key) for r in padded])
            with jax.set_mesh(mesh):  # kernels split their batch over it
                images = compiled(params, ids, negative, keys)
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
