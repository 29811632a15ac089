"""A UNet that compiles in seconds, and random arrays."""

import jax

from dreambooth_jax.models.unet import UNetSpec

UNET = UNetSpec.from_config(
    {
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)
