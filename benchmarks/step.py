"""One training step of a reduced Stable Diffusion UNet on CPU: ours beside PyTorch diffusers', in one run.

    python benchmarks/step.py

Forward, backward and AdamW in float32; latents 32x32, channels 64-128-256-256, one layer per block, context 128, 8
heads, batch 4.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from alternate import alternate
from diffusers import UNet2DConditionModel as TorchUNet

from dreambooth_jax.models.unet import UNet2DConditionModel, UNetSpec
from dreambooth_jax.params import count, functional

CONFIG = {
    "sample_size": 32,
    "block_out_channels": [64, 128, 256, 256],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 1,
    "cross_attention_dim": 128,
    "attention_head_dim": 8,
}
BATCH, ROUNDS = 4, 9


def torch_step():
    model = TorchUNet(**CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    x, target = torch.randn(BATCH, 4, 32, 32), torch.randn(BATCH, 4, 32, 32)
    t, context = torch.randint(0, 1000, (BATCH,)), torch.randn(BATCH, 77, 128)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x, t, context).sample, target).backward()
        optimizer.step()

    return step


def jax_step():
    spec = UNetSpec.from_config(CONFIG)
    unet = functional(lambda rngs: UNet2DConditionModel(spec, rngs=rngs))
    params = unet.init(jax.random.key(0))
    optimizer = optax.adamw(1e-5)
    rng = np.random.default_rng(0)
    x, target = (jnp.asarray(rng.normal(size=(BATCH, 32, 32, 4)), jnp.float32) for _ in range(2))
    t, context = jnp.arange(BATCH) * 200, jnp.asarray(rng.normal(size=(BATCH, 77, 128)), jnp.float32)

    def update(params, state):
        grads = jax.grad(lambda p: jnp.square(unet.apply(p, x, t, context) - target).mean())(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    started = time.perf_counter()
    carried = [(params, optimizer.init(params))]
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(*carried[0]).compile()
    print(f"{count(params) / 1e6:.1f} M parameters; compiled in {time.perf_counter() - started:.1f} s")

    def step() -> None:
        carried[0] = jax.block_until_ready(compiled(*carried[0]))

    return step


def main() -> None:
    alternate({"PyTorch eager": torch_step(), "dreambooth_jax": jax_step()}, ROUNDS)


if __name__ == "__main__":
    main()
