"""The UNet on CPU: ours beside PyTorch diffusers', in one run, eager and at its best.

    pip install -e ".[test]" && python benchmarks/step.py     # a quarter of an hour; a C++ compiler for torch.compile

A training step of a reduced one (forward, backward and AdamW; latents 32x32, channels 64-128-256-256, one layer per
block, context 128, 8 heads, batch 4), then the forward pass of Stable Diffusion 1.5 beside the eager one (latents
64x64, batch 2). PyTorch's best is autocast to bfloat16, fused AdamW, channels last and torch.compile. Every way has a
process of its own, whose largest memory (RSS) counts its compiling too.
"""

import multiprocessing
import platform
import resource
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from alternate import alternate

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
Work = Callable[[], object]


def torch_step(best: bool) -> Work:
    import torch

    unet = _torch_unet(REDUCED, best)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=best)
    x, target = torch.randn(BATCH, 4, 32, 32), torch.randn(BATCH, 4, 32, 32)
    t, context = torch.randint(0, 1000, (BATCH,)), torch.randn(BATCH, 77, 128)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=best):
            predicted = unet(x, t, context).sample
        torch.nn.functional.mse_loss(predicted.float(), target).backward()
        optimizer.step()

    return step


def torch_forward() -> Work:
    import torch

    unet = _torch_unet(SD15, best=False)
    x, context = torch.randn(2, 4, 64, 64), torch.randn(2, 77, 768)

    def forward() -> None:
        with torch.inference_mode():
            unet(x, 500, context)

    return forward


def _torch_unet(config: dict, best: bool) -> Callable:
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**config)
    return torch.compile(unet.to(memory_format=torch.channels_last)) if best else unet


def jax_step(dtype: str) -> Work:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    unet, params = _jax_unet(REDUCED, dtype)
    optimizer = optax.adamw(1e-5)
    rng = np.random.default_rng(0)
    x, target = (jnp.asarray(rng.normal(size=(BATCH, 32, 32, 4)), jnp.float32) for _ in range(2))
    t, context = jnp.arange(BATCH) * 200, jnp.asarray(rng.normal(size=(BATCH, 77, 128)), jnp.float32)

    def update(params, state):
        grads = jax.grad(lambda p: jnp.square(unet.apply(p, x, t, context) - target).mean())(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    carried = [(params, optimizer.init(params))]
    jitted = jax.jit(update, donate_argnums=(0, 1))

    def step() -> None:
        carried[0] = jax.block_until_ready(jitted(*carried[0]))

    return step


def jax_forward() -> Work:
    import jax
    import jax.numpy as jnp
    import numpy as np

    unet, params = _jax_unet(SD15, "float32")
    rng = np.random.default_rng(0)
    x, context = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 64, 64, 4), (2, 77, 768)))
    predict = jax.jit(unet.apply)
    return lambda: jax.block_until_ready(predict(params, x, jnp.full(2, 500), context))


def _jax_unet(config: dict, dtype: str):
    import jax

    from dreambooth_jax.devices import runtime
    from dreambooth_jax.models.params import functional
    from dreambooth_jax.models.unet import UNet2DConditionModel, UNetSpec

    runtime.start()
    spec = UNetSpec.from_config(config)
    unet = functional(lambda rngs: UNet2DConditionModel(spec, dtype=dtype, rngs=rngs))
    return unet, jax.jit(unet.init)(jax.random.key(0))


EAGER, BEST, FLOAT32, BFLOAT16 = "PyTorch eager", "PyTorch's best", "ours, float32", "ours, bfloat16"
STEPS = {
    EAGER: (torch_step, False),
    BEST: (torch_step, True),
    FLOAT32: (jax_step, "float32"),
    BFLOAT16: (jax_step, "bfloat16"),
}
FORWARDS = {EAGER: (torch_forward,), FLOAT32: (jax_forward,)}

# Of a worker.
_work: Work


def _prepare(make: Callable[..., Work], *setting: bool | str) -> None:
    global _work
    _work = make(*setting)


def _run() -> None:
    _work()


def _peak() -> float:
    """GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def compare(ways: Mapping[str, tuple], pairs: list, rounds: int) -> None:
    """Times every way, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    workers = {name: ProcessPoolExecutor(1, context) for name in ways}
    for name, made in ways.items():
        workers[name].submit(_prepare, *made).result()
    alternate({name: lambda w=w: w.submit(_run).result() for name, w in workers.items()}, rounds, pairs)
    for name, worker in workers.items():
        print(f"{name:18} peak RSS {worker.submit(_peak).result():.2f} GiB")
        worker.shutdown()


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(line.replace("\t", "").split(": ", 1) for line in reversed(lines) if ": " in line)
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    has = [flag for flag in wanted if flag in facts.get("flags", "").split()]
    family = f"family {facts.get('cpu family')}, model {facts.get('model')}"
    return f"{facts.get('model name', platform.processor())}, {family}, {' '.join(has)}"


def main() -> None:
    print(processor())
    print("A training step of the reduced UNet")
    compare(STEPS, [(EAGER, FLOAT32), (BEST, BFLOAT16), (BEST, FLOAT32)], ROUNDS)
    print("\nThe forward pass of Stable Diffusion 1.5")
    compare(FORWARDS, [(EAGER, FLOAT32)], ROUNDS // 2)


if __name__ == "__main__":
    main()
