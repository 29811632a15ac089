"""The UNet on CPU: ours beside PyTorch diffusers', in one run, float32.

    python benchmarks/step.py

A training step of a reduced one (forward, backward and AdamW; latents 32x32, channels 64-128-256-256, one layer per
block, context 128, 8 heads, batch 4), then the forward pass of Stable Diffusion 1.5's (latents 64x64, batch 2).
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from alternate import alternate
from diffusers import UNet2DConditionModel as TorchUNet

from dreambooth_jax.devices import runtime
from dreambooth_jax.models.params import count, functional
from dreambooth_jax.models.unet import UNet2DConditionModel, UNetSpec

REDUCED = {
    "sample_size": 32,
    "block_out_channels": [64, 128, 256, 256],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 1,
    "cross_attention_dim": 128,
    "attention_head_dim": 8,
}
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
BATCH, ROUNDS = 4, 9


def torch_step():
    model = TorchUNet(**REDUCED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    x, target = torch.randn(BATCH, 4, 32, 32), torch.randn(BATCH, 4, 32, 32)
    t, context = torch.randint(0, 1000, (BATCH,)), torch.randn(BATCH, 77, 128)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x, t, context).sample, target).backward()
        optimizer.step()

    return step


def jax_step():
    spec = UNetSpec.from_config(REDUCED)
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


def torch_forward():
    model = TorchUNet(**SD15)
    x, context = torch.randn(2, 4, 64, 64), torch.randn(2, 77, 768)

    def forward() -> None:
        with torch.inference_mode():
            model(x, 500, context)

    return forward


def jax_forward():
    spec = UNetSpec.from_config(SD15)
    unet = functional(lambda rngs: UNet2DConditionModel(spec, rngs=rngs))
    shapes = jax.eval_shape(unet.init, jax.random.key(0))
    params = {name: jnp.full(x.shape, 0.01, x.dtype) for name, x in shapes.items()}
    rng = np.random.default_rng(0)
    x, context = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 64, 64, 4), (2, 77, 768)))
    predict = jax.jit(unet.apply)
    return lambda: jax.block_until_ready(predict(params, x, jnp.full(2, 500), context))


def main() -> None:
    runtime.start()
    print("A training step of the reduced UNet")
    alternate({"PyTorch eager": torch_step(), "dreambooth_jax": jax_step()}, ROUNDS)
    print("\nThe forward pass of Stable Diffusion 1.5")
    alternate({"PyTorch eager": torch_forward(), "dreambooth_jax": jax_forward()}, ROUNDS // 2)


if __name__ == "__main__":
    main()
