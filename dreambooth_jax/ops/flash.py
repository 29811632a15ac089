"""Attention without stored scores, for TPUs: the splash kernel that ships with JAX (FlashAttention, arXiv 2205.14135).

At 64x64 latents the scores of one self-attention are 4096 x 4096 for every head: 1 GiB in float32 for two images. The
kernel keeps one tile of them in the chip's vector memory. Heads narrower than 128 are padded with zeros at no cost: a
TPU always computes on 128 lanes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Float

from dreambooth_jax.devices.sharding import on_each_part

LANES = 128
# Size of a tile of queries or keys, and of the part of a tile of keys that is computed at once.
BLOCK, BLOCK_COMPUTE = 1024, 512
# Size of a tile of keys in the backward pass, which writes and adds gradients of all queries once per tile. Twice this
# size does not fit beside larger batches, nor on v4 and v5p.
BLOCK_BACKWARD = 2048
# Name by which jax.checkpoint_policies find the residuals of the forward kernel.
RESIDUALS = "flash_attention"


def worthwhile(
    query: Float[Array | jax.ShapeDtypeStruct, "b q n d"], key: Float[Array | jax.ShapeDtypeStruct, "b k n d"]
) -> bool:
    """Whether the scores are large enough for the kernel to be faster, and of a size that it supports. The one wide
    head of the autoencoder has few scores, and its tiles would not fit into the chip's vector memory."""
    lengths = query.shape[1], key.shape[1]
    return query.shape[-1] <= LANES and min(lengths) >= BLOCK and all(length % BLOCK == 0 for length in lengths)


def flash_attention(
    query: Float[Array, "b q n d"],
    key: Float[Array, "b k n d"],
    value: Float[Array, "b k n d"],
    interpret: bool = False,
) -> Float[Array, "b q n d"]:
    """softmax(QK^T / sqrt(d)) V. Under `jax.set_mesh` every device computes its own part of the batch.

    Args:
        interpret: compute what the kernel would, anywhere and slowly: for tests.
    """
    return on_each_part(functools.partial(_kernel, interpret=interpret), query, key, value)


def _kernel(query: Array, key: Array, value: Array, interpret: bool) -> Array:
    width, heads, lengths = query.shape[-1], query.shape[2], (query.shape[1], key.shape[1])
    backward = BLOCK_BACKWARD if lengths[1] % BLOCK_BACKWARD == 0 else BLOCK
    sizes = splash_attention_kernel.BlockSizes(
        block_q=BLOCK,
        block_kv=BLOCK,
        block_kv_compute=BLOCK_COMPUTE,
        block_q_dkv=BLOCK,
        block_kv_dkv=backward,
        block_kv_dkv_compute=BLOCK_COMPUTE,
        use_fused_bwd_kernel=True,
    )
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask(lengths)] * heads)
    splash = splash_attention_kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name=RESIDUALS, interpret=interpret
    )

    def by_head(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -width % LANES))).swapaxes(1, 2)

    out = jax.vmap(splash)(by_head(query * width**-0.5), by_head(key), by_head(value))
    return out.swapaxes(1, 2)[..., :width]
