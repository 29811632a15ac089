"""Pictures of one prompt and the same noise, painted by `sample` and by diffusers."""

import jax
import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from dreambooth_jax import sample

PROMPT, SEEDS = "a sks dog in the snow", (3, 4)


def painted_by_sample(folder, *source, prompt: str = PROMPT) -> np.ndarray:
    options = ["--sampler=ddim", "--steps=5", "--guidance=4", "--seed=3", "--count=2", "--output", str(folder)]
    sample.main([*source, f"--prompt={prompt}", *options])
    found = [next(path for path in folder.glob(f"*_{seed}.png")) for seed in SEEDS]
    return np.stack([np.asarray(Image.open(path)) for path in found]) / 255


def painted_by_diffusers(theirs, prompt: str = PROMPT) -> np.ndarray:
    """By a pipeline, or by the one in a folder."""
    if not isinstance(theirs, StableDiffusionPipeline):
        theirs = StableDiffusionPipeline.from_pretrained(theirs, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    assert isinstance(theirs.scheduler, DDIMScheduler)
    noise = np.stack([jax.random.normal(jax.random.key(seed), (8, 8, 4)) for seed in SEEDS])
    latents = torch.from_numpy(np.moveaxis(noise, -1, 1).copy())
    kw = {"num_inference_steps": 5, "guidance_scale": 4.0, "height": 16, "width": 16, "output_type": "np"}
    return theirs([prompt] * 2, latents=latents, **kw).images
