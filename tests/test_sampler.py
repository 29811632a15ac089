"""The samplers against diffusers' schedulers: the same timesteps, and the same paths from the same noise."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers import scheduling_euler_ancestral_discrete as scheduling_euler_a

from dreambooth_jax.diffusion.process import Process
from dreambooth_jax.diffusion.sampler import SAMPLERS, make_sampler, noise_for_seeds, sampler_table
from dreambooth_jax.diffusion.schedulers import process_from_scheduler

THEIRS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SPACINGS = ("leading", "linspace", "trailing")


def predict(params, x, t, cond):
    """A made-up model, smooth and different at every timestep and for every condition."""
    wave = jnp.sin(t / 150)[:, None, None, None]
    return params * jnp.tanh(x + cond[:, None, None, None]) + 0.3 * wave * jnp.roll(x, 1, 1)


def torch_predict(x, t, cond):
    wave = torch.sin(torch.as_tensor(t, dtype=torch.float32) / 150)
    return 0.8 * torch.tanh(x + cond[:, None, None, None]) + 0.3 * wave * torch.roll(x, 1, 1)


def read(scheduler, folder) -> Process:
    """As it is read from a base's folder."""
    scheduler.save_pretrained(folder)
    return process_from_scheduler(json.loads((folder / "scheduler_config.json").read_text()))


def their_path(scheduler, noise, cond, steps):
    scheduler.set_timesteps(steps)
    x, cond = torch.from_numpy(np.array(noise)) * scheduler.init_noise_sigma, torch.from_numpy(cond)
    for t in scheduler.timesteps:
        x = scheduler.step(torch_predict(scheduler.scale_model_input(x, t), t, cond), t, x).prev_sample
    return x


def relative(out, reference) -> float:
    return float(np.linalg.norm(np.asarray(out) - reference.numpy()) / np.linalg.norm(reference.numpy()))


COND = np.float32([0.2, -1.0])


def our_path(process, sampler, noise, steps):
    return jax.jit(make_sampler(predict, process, sampler=sampler, steps=steps))(0.8, noise, COND, None, 1.0)


def clip(sampler) -> dict:
    """Stable Diffusion pipelines turn clipping off whatever the file says: latents are not images."""
    return {"clip_sample": False} if sampler == "ddim" else {}


@pytest.fixture(scope="module")
def noise():
    return noise_for_seeds(np.arange(2), (3, 4, 2))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", THEIRS)
def test_timesteps(sampler, spacing, offset, tmp_path):
    """At step counts that divide T, that do not, and whose ratio to T ends in a half."""
    theirs = THEIRS[sampler](**BETAS, **clip(sampler), timestep_spacing=spacing, steps_offset=offset)
    process = read(theirs, tmp_path)
    for steps in (1, 2, 7, 10, 16, 20, 25, 33, 48, 50, 80, 250, 333):
        theirs.set_timesteps(steps)
        np.testing.assert_allclose(
            sampler_table(process, sampler, steps).t, theirs.timesteps, rtol=1e-5, err_msg=str(steps)
        )


# Every spacing, offset and end with each sampler, and every step count.
SPACED = list(itertools.product(SPACINGS, [0, 1], [True, False]))
STEPS = [10, 7, 50, 2, 20, 1, 16, 7, 2, 10, 50, 20]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", THEIRS)
def test_paths(sampler, prediction, noise, tmp_path):
    for (spacing, offset, one), steps in zip(SPACED, STEPS, strict=True):
        kw = clip(sampler) | ({"set_alpha_to_one": one} if sampler == "ddim" else {})
        theirs = THEIRS[sampler](
            **BETAS, timestep_spacing=spacing, steps_offset=offset, prediction_type=prediction, **kw
        )
        if sampler != "ddim" and not one:
            continue
        out = our_path(read(theirs, tmp_path), sampler, noise, steps)
        assert relative(out, their_path(theirs, noise, COND, steps)) <= 1e-3, (spacing, offset, one, steps)


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 20, 50])
@pytest.mark.parametrize("sampler", THEIRS)
def test_paths_at_every_number_of_steps(sampler, steps, noise, tmp_path):
    """With the defaults of each scheduler, on the linear schedule of their own defaults."""
    theirs = THEIRS[sampler](**clip(sampler))
    out = our_path(read(theirs, tmp_path), sampler, noise, steps)
    assert relative(out, their_path(theirs, noise, COND, steps)) <= 1e-3


@pytest.mark.parametrize("sampler", THEIRS)
@pytest.mark.parametrize("writer", [*THEIRS.values(), PNDMScheduler])
def test_a_file_written_by_any_scheduler_serves_every_sampler(writer, sampler, noise, tmp_path):
    """As diffusers hands a config from one class to another."""
    own = {"clip_sample": False, "set_alpha_to_one": False} if writer is DDIMScheduler else {}
    written = writer(**BETAS, prediction_type="v_prediction", steps_offset=1, **own)
    process = read(written, tmp_path)
    theirs = THEIRS[sampler].from_pretrained(tmp_path, **clip(sampler))
    assert relative(our_path(process, sampler, noise, 10), their_path(theirs, noise, COND, 10)) <= 1e-3


@pytest.mark.parametrize("sampler", THEIRS)
def test_a_file_that_leaves_the_spacing_out_gives_each_sampler_its_own(sampler, noise, tmp_path):
    """Files of Stable Diffusion's own years."""
    config = {"_class_name": "PNDMScheduler", "steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(BETAS | config | {"clip_sample": False}))
    theirs = THEIRS[sampler].from_config(PNDMScheduler.from_pretrained(tmp_path).config)
    process = process_from_scheduler(json.loads((tmp_path / "scheduler_config.json").read_text()))
    assert relative(our_path(process, sampler, noise, 10), their_path(theirs, noise, COND, 10)) <= 1e-3


ZERO = BETAS | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("sampler", THEIRS)
def test_zero_snr(sampler, noise, tmp_path):
    """A base that is trained from noise alone, as the embedded one is."""
    theirs = THEIRS[sampler](**ZERO, **clip(sampler))
    process = read(theirs, tmp_path)
    assert process.alpha(np.array([999])) == 0
    for steps in (2, 10, 25):
        ours = our_path(process, sampler, noise, steps)
        assert relative(ours, their_path(theirs, noise, COND, steps)) <= 1e-3


ANCESTRAL = {"ddpm": scheduling_ddpm.DDPMScheduler, "euler_a": scheduling_euler_a.EulerAncestralDiscreteScheduler}
KEYS = jax.vmap(jax.random.key)(jnp.arange(2))


@pytest.mark.parametrize("kind", ["epsilon", "zero"])
@pytest.mark.parametrize("sampler", ANCESTRAL)
def test_ancestral_paths(sampler, kind, noise, tmp_path, monkeypatch):
    """Given the same noise at every step, at every spacing."""
    for (spacing, offset), steps in zip(itertools.product(SPACINGS, [0, 1]), [10, 7, 50, 2, 20, 1], strict=True):
        kw = {"clip_sample": False} if sampler == "ddpm" else {}
        given = (ZERO if kind == "zero" else BETAS) | {"timestep_spacing": spacing, "steps_offset": offset}
        if kind == "zero" and ((sampler == "euler_a" and spacing != "trailing") or steps == 1):
            continue  # their levels are infinite there
        theirs = ANCESTRAL[sampler](**given, **kw)
        numbers = itertools.count()

        def fresh(*_, numbers=numbers, **__):
            step = next(numbers)
            draws = [jax.random.normal(jax.random.fold_in(key, step), noise.shape[1:]) for key in KEYS]
            return torch.from_numpy(np.array(jnp.stack(draws)))

        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", fresh)
        monkeypatch.setattr(scheduling_euler_a, "randn_tensor", fresh)
        sample = jax.jit(make_sampler(predict, read(theirs, tmp_path), sampler=sampler, steps=steps))
        ours = sample(0.8, noise, COND, None, 1.0, KEYS)
        assert relative(ours, their_path(theirs, noise, COND, steps)) <= 1e-3, (spacing, offset, steps)


@pytest.mark.parametrize("sampler", ANCESTRAL)
def test_ancestral_noise_is_the_pictures_own(sampler):
    process, keys = process_from_scheduler(BETAS), jax.vmap(jax.random.key)(jnp.array([3, 8, 7]))
    noise = jax.vmap(lambda key: jax.random.normal(key, (3, 4, 2)))(keys)
    sample = jax.jit(make_sampler(predict, process, sampler=sampler, steps=5))
    cond = np.float32([0.1, 0.2, 0.3])
    together = sample(0.8, noise, cond, None, 1.0, keys)
    np.testing.assert_allclose(sample(0.8, noise[2:], cond[2:], None, 1.0, keys[2:])[0], together[2], atol=1e-5)
    assert np.abs(sample(0.8, noise, cond, None, 1.0, keys[::-1]) - together)[0].max() > 0.1
    with pytest.raises(ValueError, match=f"sampler = '{sampler}' draws noise at every step: expected keys"):
        sample(0.8, noise, cond, None, 1.0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_paths(shift, noise, tmp_path):
    """Euler's and DDIM's step are one on a flow. A static shift is applied twice, as diffusers does."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    process = read(theirs, tmp_path)
    for steps in (2, 7, 28):
        theirs.set_timesteps(steps)
        np.testing.assert_allclose(sampler_table(process, "euler", steps).t, theirs.timesteps, rtol=1e-5)
        x, cond = torch.from_numpy(np.array(noise)), torch.from_numpy(COND)
        for t in theirs.timesteps:
            x = theirs.step(torch_predict(x, t, cond), t, x).prev_sample
        for sampler in ("euler", "ddim"):
            assert relative(our_path(process, sampler, noise, steps), x) <= 1e-3
    with pytest.raises(ValueError, match="0 sampling steps"):
        sampler_table(process, "euler", 0)


def test_flow_samplers_reach_the_data():
    """A model that knows the data, one point, reaches it by any sampler, from any noise."""
    process, point = process_from_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}), 0.7
    exact = lambda params, x, t, cond: (x - point) / (t[:, None, None, None] / 1000)  # noqa: E731
    start = jax.random.normal(jax.random.key(0), (2, 3, 4, 2))
    for sampler in SAMPLERS:
        sample = jax.jit(make_sampler(exact, process, sampler=sampler, steps=8))
        np.testing.assert_allclose(sample(None, start, jnp.zeros(2), None, 1.0, KEYS), point, atol=1e-4)


def test_estimates_are_clipped():
    limit, process = 0.1, process_from_scheduler(BETAS)
    start = jax.random.normal(jax.random.key(0), (2, 3, 4, 2))
    sample = make_sampler(predict, process, sampler="ddim", steps=5, clip=lambda x0: jnp.clip(x0, -limit, limit))
    assert np.abs(jax.jit(sample)(0.8, start, COND, None, 1.0)).max() <= limit + 1e-6  # the last step goes to x0


def test_guidance_runs_both_conditions_in_one_batch(noise):
    process, batches = process_from_scheduler(BETAS), []

    def counting(params, x, t, cond):
        batches.append(len(x))
        assert x.shape[0] == t.shape[0] == cond.shape[0]
        return predict(params, x, t, cond)

    sample = jax.jit(make_sampler(counting, process, steps=5))
    negative = np.float32([0.5, 0.4])
    plain = sample(0.8, noise, COND, None, 1.0)
    one, none, strong = (sample(0.8, noise, COND, negative, w) for w in (1.0, 0.0, 4.0))
    assert set(batches) == {2, 4}
    np.testing.assert_allclose(one, plain, atol=1e-5)
    np.testing.assert_allclose(none, sample(0.8, noise, negative, None, 1.0), atol=1e-5)
    # Beyond the prompt, on the side that the negative prompt is not.
    assert np.vdot(strong - one, one - none) > 0
    assert np.abs(strong - sample(0.8, noise, COND, -negative, 4.0)).max() > 0.1


def test_an_image_depends_on_its_seed_and_not_on_its_batch():
    seeds = np.uint32([3, 2**32 - 1, 7, 3])
    shape = (4, 4, 3)
    batch = noise_for_seeds(seeds, shape)
    np.testing.assert_array_equal(batch[2], noise_for_seeds([7], shape)[0])
    np.testing.assert_array_equal(batch[0], batch[3])
    assert np.abs(batch[0] - batch[1]).max() > 1
    many = np.asarray(noise_for_seeds(np.arange(500), shape))
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02
    assert abs(np.corrcoef(many[:-1].ravel(), many[1:].ravel())[0, 1]) < 0.03
    sample = jax.jit(make_sampler(predict, process_from_scheduler(BETAS), sampler="dpm++", steps=5))
    cond, uncond = np.float32([0.1, 0.2, 0.3, 0.1]), np.zeros(4, np.float32)
    together = sample(0.8, batch, cond, uncond, 3.0)
    alone = sample(0.8, batch[2:3], cond[2:3], uncond[2:3], 3.0)
    np.testing.assert_allclose(together[2], alone[0], atol=1e-5)
    np.testing.assert_allclose(together[0], together[3], atol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "steps", "match"),
    [
        ("heun", 10, "sampler = 'heun'; implemented: ddim, dpm.., euler, ddpm, euler_a"),
        ("ddim", 0, "0 sampling steps: expected at least 1 and fewer than the 1000 training timesteps"),
        ("euler", 1001, "1001 sampling steps: expected at least 1"),
        ("ddim", 1000, "1000 sampling steps.* at leading spacing"),
        ("dpm++", 1000, "1000 sampling steps.* at leading spacing"),
        ("euler", 1000, "1000 sampling steps.* at leading spacing"),
    ],
)
def test_what_cannot_be_sampled_is_refused(sampler, steps, match):
    """An offset takes the first of as many steps as timesteps beyond the last one."""
    process = process_from_scheduler(BETAS | {"timestep_spacing": "leading", "steps_offset": 1})
    with pytest.raises(ValueError, match=match):
        sampler_table(process, sampler, steps)
