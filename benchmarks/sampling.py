"""Painting on CPU with the embedded base: ours beside PyTorch diffusers', in one run.

    python benchmarks/sampling.py

Both read the same folder and paint four pictures in 50 steps of DDIM with guidance, float32. On TPUs: tpu_step.py.
"""

import jax
import torch
from alternate import alternate
from diffusers import DDIMScheduler, StableDiffusionPipeline

from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.files.hub import EMBEDDED_FOLDER
from dreambooth_jax.painting.painter import Request, make_painter

PROMPT, BATCH, STEPS, GUIDANCE, ROUNDS = "a dog", 4, 50, 2.5, 7


def ours():
    pipeline, mesh = load_pipeline("tiny"), make_mesh()
    params = read_params(pipeline, mesh)
    painter = make_painter(
        pipeline, mesh, resolution=64, batch_size=BATCH, sampler="ddim", steps=STEPS, guidance=GUIDANCE
    )
    requests = [Request(PROMPT, "", jax.random.key(i)) for i in range(BATCH)]
    return lambda: list(painter(params, requests))


def theirs():
    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED_FOLDER, torch_dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return lambda: (
        pipeline([PROMPT] * BATCH, height=64, width=64, num_inference_steps=STEPS, guidance_scale=GUIDANCE).images
    )


def main() -> None:
    runtime.start()
    alternate({"PyTorch diffusers": theirs(), "dreambooth_jax": ours()}, ROUNDS)


if __name__ == "__main__":
    main()
