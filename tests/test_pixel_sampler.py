"""Ancestral sampling of pixels against diffusers' DDPM scheduler, with the same noise at every step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import scheduling_ddpm

from dreambooth_jax.diffusion.sampler import make_sampler
from dreambooth_jax.diffusion.schedulers import clip_from_scheduler, process_from_scheduler

STAGE_I = {
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
}
CONFIGS = {
    "stage I": STAGE_I,
    "stage II": STAGE_I | {"sample_max_value": 1.0},
    "after training": STAGE_I | {"variance_type": "fixed_small"},
    "clipped, linear times": STAGE_I | {"thresholding": False, "timestep_spacing": "linspace"},
    "neither": STAGE_I | {"thresholding": False, "clip_sample": False},
}
SHAPE, STEPS = (4, 4, 3), 12


def predict(params, x, t, cond):
    """A made-up model of six channels: noise and interpolation of its variance, far from zero mean."""
    wave = jnp.sin(t / 150)[:, None, None, None]
    noise = params * jnp.tanh(x + cond[:, None, None, None]) + 0.3 * wave * jnp.roll(x, 1, 1)
    return jnp.concatenate([noise, jnp.cos(x + cond[:, None, None, None])], -1)


def torch_predict(x, t, cond):
    wave = torch.sin(torch.as_tensor(t, dtype=torch.float32) / 150)
    noise = 0.8 * torch.tanh(x + cond[:, None, None, None]) + 0.3 * wave * torch.roll(x, 1, 1)
    return torch.cat([noise, torch.cos(x + cond[:, None, None, None])], -1)


def split(output):
    return output[..., :3], (output[..., 3:] + 1) / 2


@pytest.mark.parametrize("name", CONFIGS)
def test_the_path_is_that_of_the_reference(name, tmp_path, monkeypatch):
    scheduler = DDPMScheduler(**CONFIGS[name])
    scheduler.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    keys = jax.random.split(jax.random.key(5), 2)
    start = np.asarray(jax.random.normal(jax.random.key(1), (2, *SHAPE)))
    cond, uncond = np.float32([0.2, -1.0]), np.float32([0.7, 0.1])

    learned = config["variance_type"] == "learned_range"
    sample = make_sampler(
        predict,
        process_from_scheduler(config),
        sampler="ddpm",
        steps=STEPS,
        clip=clip_from_scheduler(config),
        split=split if learned else lambda output: (output[..., :3], None),
    )
    ours = jax.jit(sample)(0.8, start, cond, uncond, 3.0, keys)

    def fresh(step):
        noise = [jax.random.normal(jax.random.fold_in(key, step), SHAPE) for key in keys]
        return torch.from_numpy(np.moveaxis(np.stack(noise), -1, 1).copy())

    scheduler.set_timesteps(STEPS)
    x = torch.from_numpy(start.copy())
    for step, t in enumerate(scheduler.timesteps):
        without, with_ = (torch_predict(x, t, torch.from_numpy(c)) for c in (uncond, cond))
        noise = without[..., :3] + 3.0 * (with_ - without)[..., :3]
        output = torch.cat([noise, with_[..., 3:]], -1) if learned else noise
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, step=step, **__: fresh(step))
        x = scheduler.step(output.movedim(-1, 1), t, x.movedim(-1, 1)).prev_sample.movedim(1, -1)
    assert np.linalg.norm(ours - x.numpy()) <= 2e-4 * np.linalg.norm(x)
    assert np.abs(x.numpy()).max() > 0.5


def test_estimates_are_clipped_as_the_scheduler_says():
    """With diffusers' defaults for what a config leaves out: clipped at 1, not thresholded."""
    x0 = jnp.asarray([[[[-3.0, 0.5, 1.5]]]])
    np.testing.assert_array_equal(clip_from_scheduler({})(x0), [[[[-1, 0.5, 1]]]])
    np.testing.assert_array_equal(clip_from_scheduler({"clip_sample_range": 2.0})(x0), [[[[-2, 0.5, 1.5]]]])
    assert clip_from_scheduler({"clip_sample": False}) is None
