"""Attention with one implementation per backend.

TPUs use the kernel of flash.py. XLA's CPU backend has no kernel: it writes all scores, probabilities and gradients to
memory. On CPU, attention is therefore computed for one head and one block of queries at a time, whose scores fit into
the cache. The backward pass is that of FlashAttention (arXiv 2205.14135, algorithm 4): it recomputes the scores from
the normaliser of each row, and no scores are stored.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreambooth_jax.devices.sharding import on_each_part
from dreambooth_jax.ops import flash

# On CPU: number of queries in a block, and smallest number of scores per head for which blocks are faster.
BLOCK, FEWEST_SCORES = 512, 2**13
# Scores of one head from which every backend computes blocks: 1 GiB in float32 for the 128 x 128 latents of the
# autoencoder, whose one head is too wide for the TPU's kernel.
LARGE_SCORES = 2**28


def attention(
    query: Float[Array, "b q n d"],
    key: Float[Array, "b k n d"],
    value: Float[Array, "b k n d"],
    *,
    causal: bool = False,
) -> Float[Array, "b q n d"]:
    """softmax(QK^T / sqrt(d)) V. Scores and softmax are float32, as with diffusers' `upcast_attention`."""
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=causal)
    kinds: dict[str, Callable[..., Array]] = {}
    if not causal and query.shape[1] * key.shape[1] >= LARGE_SCORES:
        plain = blockwise_attention
    if not causal and flash.worthwhile(query, key):
        kinds["tpu"] = flash.flash_attention
    without_sum = query.dtype != jnp.float32 and 1 in (query.shape[1], key.shape[1], key.shape[3])  # see workarounds
    if not causal and (without_sum or query.shape[1] * key.shape[1] >= FEWEST_SCORES):
        kinds["cpu"] = blockwise_attention
    return jax.lax.platform_dependent(query, key, value, **kinds, default=plain) if kinds else plain(query, key, value)


def blockwise_attention(
    query: Float[Array, "b q n d"], key: Float[Array, "b k n d"], value: Float[Array, "b k n d"]
) -> Float[Array, "b q n d"]:
    """softmax(QK^T / sqrt(d)) V, one block of one head's scores at a time. Under `jax.set_mesh` every device computes
    its own part of the batch."""
    return on_each_part(_head_by_head, query, key, value)


def _head_by_head(
    query: Float[Array, "b q n d"], key: Float[Array, "b k n d"], value: Float[Array, "b k n d"]
) -> Float[Array, "b q n d"]:
    def heads(x: Float[Array, "b l n d"]) -> Float[Array, "bn l d"]:
        return x.astype(jnp.float32).swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])

    out = jax.lax.map(lambda qkv: _one_head(*qkv), (heads(query * query.shape[-1] ** -0.5), heads(key), heads(value)))
    batch, length, count, width = query.shape
    return out.reshape(batch, count, length, width).swapaxes(1, 2).astype(query.dtype)


@jax.custom_vjp
def _one_head(query: Float[Array, "q d"], key: Float[Array, "k d"], value: Float[Array, "k d"]) -> Float[Array, "q d"]:
    return _forward(query, key, value)[0]


def _forward(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, ...]]:
    def block(query: Array) -> tuple[Array, Array]:
        scores = query @ key.T
        highest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(-1, keepdims=True)
        return weights @ value / total, highest + jnp.log(total)

    size = max(size for size in range(1, min(BLOCK, len(query)) + 1) if len(query) % size == 0)
    queries = query.reshape(-1, size, query.shape[1])
    out, normaliser = jax.lax.map(block, queries)
    return out.reshape(query.shape), (queries, key, value, out, normaliser)


def _backward(saved: tuple[Array, ...], d_out: Float[Array, "q d"]) -> tuple[Array, Array, Array]:
    queries, key, value, out, normaliser = saved

    def block(sums: tuple[Array, Array], inputs: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        query, out, normaliser, d_out = inputs
        weights = jnp.exp(query @ key.T - normaliser)
        d_scores = weights * (d_out @ value.T - (d_out * out).sum(-1, keepdims=True))
        # d_scores.T @ query would transpose the larger operand.
        return (sums[0] + query.T @ d_scores, sums[1] + d_out.T @ weights), d_scores @ key

    sums = jnp.zeros_like(key.T), jnp.zeros_like(value.T)
    (d_key, d_value), d_query = jax.lax.scan(block, sums, (queries, out, normaliser, d_out.reshape(out.shape)))
    return d_query.reshape(d_out.shape), d_key.T, d_value.T


_one_head.defvjp(_forward, _backward)
