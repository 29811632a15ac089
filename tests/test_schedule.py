"""Noise levels, corruption and targets against diffusers' schedulers, at every timestep."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.training_utils import compute_snr

from dreambooth_jax.diffusion.process import Schedule, corrupt, predicted_x0, snr_weight, target
from dreambooth_jax.models.spec import UnsupportedConfig

CONFIGS = [
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 400},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {},
]


def both(config):
    return DDPMScheduler(clip_sample=False, **config), Schedule.from_config({"clip_sample": False} | config)


@pytest.mark.parametrize("config", CONFIGS)
def test_noise_levels(config):
    theirs, ours = both(config)
    alpha_bar = theirs.alphas_cumprod.double().numpy()
    assert len(alpha_bar) == ours.T
    # Theirs are float32 products of a thousand factors, and of differences from 1.
    np.testing.assert_allclose(ours.alpha, np.sqrt(alpha_bar), rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(ours.sigma, np.sqrt(1 - alpha_bar), rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(ours.alpha[: ours.T // 2], np.sqrt(alpha_bar)[: ours.T // 2], rtol=1e-5)
    assert (ours.alpha[-1] == 0) == config.get("rescale_betas_zero_snr", False)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("config", CONFIGS[1:4])
def test_corruption_and_target(config, prediction):
    theirs, ours = both(config | {"prediction_type": prediction})
    t = np.arange(ours.T)
    x0, eps = np.random.default_rng(0).standard_normal((2, ours.T, 2, 3, 1), np.float32)
    xt, wanted = corrupt(ours, x0, eps, t), target(ours, x0, eps, t)
    tx0, teps, tt = map(torch.from_numpy, (x0, eps, t))
    np.testing.assert_allclose(xt, theirs.add_noise(tx0, teps, tt), atol=2e-4)
    np.testing.assert_allclose(
        wanted, theirs.get_velocity(tx0, teps, tt) if prediction == "v_prediction" else eps, atol=2e-4
    )
    # What the model should predict leads back to x0.
    levels = (values[:, None, None, None] for values in (ours.alpha, ours.sigma))
    back = predicted_x0(prediction, np.float64(wanted), np.float64(xt), *levels)
    np.testing.assert_allclose(back[ours.alpha > 0.01], x0[ours.alpha > 0.01], atol=1e-3)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_as_trainers_compute_them(prediction, gamma):
    theirs, ours = both(CONFIGS[1] | {"prediction_type": prediction})
    t = torch.arange(1000)
    snr = compute_snr(theirs, t)
    capped = torch.stack([snr, gamma * torch.ones_like(t)], dim=1).min(dim=1)[0]
    expected = capped / snr if prediction == "epsilon" else capped / (snr + 1)
    np.testing.assert_allclose(snr_weight(ours, t.numpy(), gamma), expected, rtol=1e-3)


def test_min_snr_weight_is_finite_where_there_is_no_signal():
    _, ours = both(CONFIGS[4])
    weight = np.asarray(snr_weight(ours, np.arange(1000), 5.0))
    assert np.isfinite(weight).all() and weight[-1] == 0 and weight.max() > 0.5


@pytest.mark.parametrize(
    "writer", [DDIMScheduler, DDPMScheduler, PNDMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler]
)
def test_every_scheduler_writes_a_file_that_is_read(writer, tmp_path):
    clip = {"clip_sample": False} if writer in (DDIMScheduler, DDPMScheduler) else {}
    kw = {"beta_schedule": "scaled_linear", "beta_start": 0.001, "prediction_type": "v_prediction", "steps_offset": 1}
    theirs = writer(**kw, **clip, num_train_timesteps=500)
    theirs.save_pretrained(tmp_path)
    ours = Schedule.from_config(json.loads((tmp_path / "scheduler_config.json").read_text()))
    np.testing.assert_allclose(np.square(ours.alpha), theirs.alphas_cumprod, rtol=1e-4)
    assert (ours.prediction, ours.steps_offset) == ("v_prediction", 1)
    assert ours.spacing == theirs.config.timestep_spacing


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (
            {
                "beta_schedule": "sigmoid",
                "prediction_type": "sample",
                "timestep_spacing": "log",
                "trained_betas": [0.1],
            },
            ["beta_schedule = 'sigmoid'", "prediction_type = 'sample'", "timestep_spacing = 'log'", "trained_betas"],
        ),
        ({"clip_sample": True, "thresholding": True}, ["clip_sample", "thresholding"]),
        ({"_class_name": "DDIMScheduler"}, ["clip_sample"]),
        ({"use_karras_sigmas": True, "timestep_type": "continuous"}, ["use_karras_sigmas", "timestep_type"]),
        ({"rescale_betas_zero_snr": True}, ["rescale_betas_zero_snr"]),
    ],
)
def test_what_is_not_implemented_is_named(config, names):
    with pytest.raises(UnsupportedConfig) as error:
        Schedule.from_config(config)
    assert all(name in str(error.value) for name in names)
