"""Noise levels, corruption and targets against diffusers' schedulers, and the algebra that all predictions share."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from dreambooth_jax.diffusion.loss import Batch, dreambooth_loss
from dreambooth_jax.diffusion.process import corrupt, snr_weight, target
from dreambooth_jax.diffusion.sampler import make_sampler
from dreambooth_jax.diffusion.schedulers import process_from_scheduler
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
STABLE = CONFIGS[1] | {"clip_sample": False}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
# One process for each row of the table in process.py's docstring.
PROCESSES = {name: process_from_scheduler(STABLE | {"prediction_type": name}) for name in PREDICTIONS} | {
    "flow": process_from_scheduler(FLOW)
}


def both(config):
    return DDPMScheduler(clip_sample=False, **config), process_from_scheduler({"clip_sample": False} | config)


@pytest.mark.parametrize("config", CONFIGS)
def test_noise_levels(config):
    theirs, ours = both(config)
    alpha_bar = theirs.alphas_cumprod.double().numpy()
    t, half = np.arange(len(alpha_bar)), len(alpha_bar) // 2
    alpha, sigma = ours.alpha(t), ours.sigma(t)
    # Theirs are float32 products of a thousand factors, and of differences from 1.
    np.testing.assert_allclose(alpha, np.sqrt(alpha_bar), rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(sigma, np.sqrt(1 - alpha_bar), rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(alpha[:half], np.sqrt(alpha_bar)[:half], rtol=1e-5)
    assert (alpha[-1] == 0) == config.get("rescale_betas_zero_snr", False)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("config", CONFIGS[1:4])
def test_corruption_and_target(config, prediction):
    theirs, ours = both(config | {"prediction_type": prediction})
    t = np.arange(theirs.config.num_train_timesteps)
    x0, eps = np.random.default_rng(0).standard_normal((2, len(t), 2, 3, 1), np.float32)
    tx0, teps, tt = map(torch.from_numpy, (x0, eps, t))
    wanted = {"epsilon": teps, "v_prediction": theirs.get_velocity(tx0, teps, tt), "sample": tx0}[prediction]
    np.testing.assert_allclose(corrupt(ours, x0, eps, t), theirs.add_noise(tx0, teps, tt), atol=2e-4)
    np.testing.assert_allclose(target(ours, x0, eps, t), wanted, atol=2e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_against_diffusers(shift):
    """The times that training may draw are those of the scheduler's table, shifted once."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    ours = process_from_scheduler(FLOW | {"shift": shift})
    t = theirs.timesteps[::100].numpy()
    x0, eps = np.random.default_rng(0).standard_normal((2, len(t), 2, 3, 1), np.float32)
    expected = theirs.scale_noise(torch.from_numpy(x0), torch.from_numpy(t), torch.from_numpy(eps))
    np.testing.assert_allclose(corrupt(ours, x0, eps, t), expected, atol=1e-5)
    np.testing.assert_allclose(target(ours, x0, eps, t), eps - x0)


def of_clean(process, x0, xt, t):
    """The prediction of a model that takes `x0` for the clean example behind `xt`."""
    alpha, sigma = (f(t).reshape(-1, *(1,) * (xt.ndim - 1)) for f in (process.alpha, process.sigma))
    return target(process, x0, (xt - alpha * x0) / sigma, t)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_model_that_knows_the_clean_example_leads_to_it(name):
    process = PROCESSES[name]
    x0, noise = jnp.asarray(np.random.default_rng(0).normal(0, 2, (2, 64, 1)), jnp.float32)

    def predict(params, xt, t, cond):
        return of_clean(process, x0, xt, t if name == "flow" else t.astype(int))

    np.testing.assert_allclose(make_sampler(predict, process, steps=4)(None, noise, (), None, 1.0), x0, atol=1e-3)


@pytest.mark.parametrize("name", PROCESSES)
@settings(max_examples=30, deadline=None)
@given(t=st.integers(1, 980), error=st.floats(0.1, 1.0), gamma=st.sampled_from([1.0, 5.0, 20.0]))
def test_the_weighted_loss_is_one_function_of_the_error_of_x0(name, t, error, gamma):
    """Whatever is predicted: min(snr, gamma) times the squared error of x0 (arXiv 2303.09556, section 3.4)."""
    process, t, x0, eps = PROCESSES[name], np.array([t]), np.float32([[0.3]]), np.float32([[-0.8]])

    def predict(params, xt, t, cond):
        return target(process, x0, eps, t) + error

    # The prediction is linear in the clean example that it means: two points give the line.
    xt = corrupt(process, x0, eps, t)
    at_0, at_1 = (np.float64(of_clean(process, np.full_like(x0, value), xt, t)) for value in (0, 1))
    off = (np.float64(predict(None, None, t, None)) - at_0) / (at_1 - at_0) - x0
    snr = np.square(np.float64(process.alpha(t)) / np.float64(process.sigma(t)))
    loss = dreambooth_loss(predict, None, Batch(x0, eps, t, ()), process, num_instance=1, snr_gamma=gamma).loss
    np.testing.assert_allclose(loss, np.minimum(snr, gamma) * np.square(off[0]), rtol=2e-3)


def test_the_snr_is_that_of_diffusers():
    """With a gamma above every ratio, the weight of the clean example's error is the ratio itself."""
    t = torch.arange(1000)
    expected = compute_snr(DDPMScheduler(**STABLE), t)
    np.testing.assert_allclose(snr_weight(PROCESSES["sample"], t.numpy(), 1e9), expected, rtol=2e-3)


def test_min_snr_weight_is_finite_where_there_is_no_signal():
    _, ours = both(CONFIGS[4])
    weight = np.asarray(snr_weight(ours, np.arange(1000), 5.0))
    assert np.isfinite(weight).all() and weight[-1] == 0 and weight.max() > 0.5


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm++"])
def test_predictions_of_one_exact_denoiser_give_one_picture(sampler):
    """A denoiser of x0, told as each kind of prediction."""
    noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))

    def picture(name):
        process = PROCESSES[name]

        def predict(params, xt, t, cond):
            return of_clean(process, jnp.tanh(xt) + cond[:, None, None, None], xt, t.astype(int))

        sample = jax.jit(make_sampler(predict, process, sampler=sampler, steps=10))
        return sample(None, noise, jnp.float32([0.1, -0.4]), None, 1.0)

    epsilon, v, x0 = map(picture, PREDICTIONS)
    # Euler's times are fractions, at which this test's denoiser, but not the sampler, rounds the levels.
    limit = 2e-2 if sampler == "euler" else 1e-4
    np.testing.assert_allclose(v, epsilon, atol=limit)
    np.testing.assert_allclose(x0, epsilon, atol=limit)


def test_times_of_a_flow_are_logit_normal_and_shifted_once():
    keys = jax.random.split(jax.random.key(0), 4000)
    plain = jax.vmap(PROCESSES["flow"].draw_t)(keys) / 1000
    logit = np.log(plain / (1 - plain))
    assert abs(logit.mean()) < 0.05 and abs(logit.std() - 1) < 0.05
    draws = jax.vmap(process_from_scheduler(FLOW | {"shift": 3.0}).draw_t)(keys) / 1000
    # Shifting by k adds log k to the logit.
    np.testing.assert_allclose(np.log(draws / (1 - draws)), logit + np.log(3), atol=1e-3)
    uniform = jax.vmap(process_from_scheduler(FLOW | {"shift": 3.0, "use_dynamic_shifting": True}).draw_t)(keys)
    assert abs(uniform.mean() - 500) < 20 and abs(uniform.std() - 1000 / 12**0.5) < 10


@pytest.mark.parametrize(
    "writer", [DDIMScheduler, DDPMScheduler, PNDMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler]
)
def test_every_scheduler_writes_a_file_that_is_read(writer, tmp_path):
    kw = {"beta_schedule": "scaled_linear", "beta_start": 0.001, "prediction_type": "v_prediction", "steps_offset": 1}
    theirs = writer(**kw, num_train_timesteps=500)
    theirs.save_pretrained(tmp_path)
    ours = process_from_scheduler(json.loads((tmp_path / "scheduler_config.json").read_text()))
    alpha = ours.alpha(np.arange(500))
    np.testing.assert_allclose(np.square(alpha), theirs.alphas_cumprod, rtol=1e-4)
    np.testing.assert_allclose(ours.b(np.arange(500)), ours.sigma(np.arange(500)))
    spaced = type(theirs).from_pretrained(tmp_path)
    spaced.set_timesteps(10)
    if writer is not PNDMScheduler:  # whose first steps are of another method
        grid = {DPMSolverMultistepScheduler: "dpm++", EulerDiscreteScheduler: "euler"}.get(writer, "ddim")
        np.testing.assert_allclose(ours.nodes(grid, 10).t, spaced.timesteps, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (
            {"beta_schedule": "sigmoid", "prediction_type": "score", "trained_betas": [0.1]},
            ["beta_schedule = 'sigmoid'", "prediction_type = 'score'", "trained_betas"],
        ),
        ({"rescale_betas_zero_snr": True}, ["rescale_betas_zero_snr"]),
        (FLOW | {"invert_sigmas": True}, ["invert_sigmas"]),
        (
            {"beta_start": "0.00085", "beta_end": None},
            ["beta_start = '0.00085' (expected a number)", "beta_end = None"],
        ),
        ({"num_train_timesteps": 1e3, "steps_offset": True}, ["1000.0 (expected a whole number)", "steps_offset"]),
        (FLOW | {"shift": None, "num_train_timesteps": []}, ["shift = None", "num_train_timesteps = []"]),
    ],
)
def test_what_would_change_training_and_is_not_implemented_is_named(config, names):
    with pytest.raises(UnsupportedConfig) as error:
        process_from_scheduler(config)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_karras_sigmas": True, "sigma_min": 0.1, "interpolation_type": "log_linear"},
        {"timestep_type": "continuous", "thresholding": True, "timestep_spacing": "log"},
        {"clip_sample": True, "final_sigmas_type": "sigma_min", "use_dynamic_shifting": True},
        {},
    ],
)
def test_what_only_samplers_read_is_ignored_with_one_line(fields, caplog):
    with caplog.at_level(logging.WARNING):
        ours, plain = process_from_scheduler(STABLE | fields), process_from_scheduler(STABLE)
    assert len(caplog.records) == bool(fields)
    assert all(f"{name} = {value!r}" in caplog.text for name, value in fields.items())
    np.testing.assert_array_equal(ours.alpha(np.arange(1000)), plain.alpha(np.arange(1000)))
    np.testing.assert_array_equal(ours.nodes("euler", 10).t, plain.nodes("euler", 10).t)


def test_every_time_of_a_table_is_drawn_equally_often():
    process = process_from_scheduler({"num_train_timesteps": 5})
    times = jax.vmap(process.draw_t)(jax.random.split(jax.random.key(0), 5000))
    np.testing.assert_allclose(np.bincount(times, minlength=5) / 1000, 1, atol=0.15)
