"""Deep features reused across sampling steps (DeepCache): what is computed when, and what is kept apart."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image
from support.cascade_folders import write_stage_i, write_upscaler
from support.runs import config_of
from support.sdxl_folders import write_sdxl

from dreambooth_jax import sample, train
from dreambooth_jax.adapters.lora import lora
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.diffusion.sampler import SAMPLERS, make_sampler, noise_for_seeds
from dreambooth_jax.diffusion.schedulers import process_from_scheduler
from dreambooth_jax.families.family import DENOISER
from dreambooth_jax.families.pipeline import describe_base, load_pipeline, read_params
from dreambooth_jax.painting.painter import Request, make_painter
from dreambooth_jax.runs.cascade import _name
from dreambooth_jax.runs.config import ConfigError, check_resumable
from dreambooth_jax.runs.scoring import questions_of
from dreambooth_jax.runs.setup import set_up

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
THEIRS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}
COND, NEGATIVE = np.float32([0.2, -1.0]), np.float32([0.5, 0.4])
KEYS = jax.vmap(jax.random.key)(jnp.arange(2))


def model(xp, x, t, cond, deep):
    """A made-up model whose deep features are known: (output, features)."""
    deep = xp.sin(t / 150) + cond if deep is None else deep
    return 0.8 * xp.tanh(x + cond[:, None, None, None]) + 0.3 * deep[:, None, None, None] * x, deep


def with_deep(params, x, t, cond, deep):
    return model(jnp, x, t, cond, deep)


def predict(params, x, t, cond):
    return with_deep(params, x, t, cond, None)[0]


def path(process, noise, sampler, steps, reuse, uncond=None, guidance=1.0, function=with_deep):
    sample = make_sampler(predict, process, sampler=sampler, steps=steps, reuse_features=reuse, with_deep=function)
    return np.asarray(jax.jit(sample)(None, noise, COND, uncond, guidance, KEYS))


@pytest.fixture(scope="module")
def process():
    return process_from_scheduler(BETAS)


@pytest.fixture(scope="module")
def noise():
    return noise_for_seeds(np.arange(2), (3, 4, 2))


@pytest.mark.parametrize(("steps", "reuse"), [(6, 3), (7, 3), (5, 5), (9, 2)])
@pytest.mark.parametrize("sampler", THEIRS)
def test_paths_of_diffusers_schedulers_with_features_of_every_nth_step(sampler, steps, reuse, noise, tmp_path):
    """Also where the last steps are fewer, and where one whole step serves all."""
    theirs = THEIRS[sampler](**BETAS, **({"clip_sample": False} if sampler == "ddim" else {}))
    theirs.set_timesteps(steps)
    x, cond, deep = torch.from_numpy(np.array(noise)) * theirs.init_noise_sigma, torch.from_numpy(COND), None
    for number, t in enumerate(theirs.timesteps):
        kept = None if number % reuse == 0 else deep
        output, deep = model(torch, theirs.scale_model_input(x, t), t.to(torch.float32), cond, kept)
        x = theirs.step(output, t, x).prev_sample
    theirs.save_pretrained(tmp_path)
    process = process_from_scheduler(json.loads((tmp_path / "scheduler_config.json").read_text()))
    ours = path(process, noise, sampler, steps, reuse)
    assert np.abs(ours - x.numpy()).max() <= 1e-3 * np.abs(x.numpy()).max()
    assert np.abs(ours - path(process, noise, sampler, steps, 1)).max() > 1e-2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_features_that_never_change_give_the_whole_model_s_pictures(sampler, process, noise):
    def constant(params, x, t, cond, deep):
        return model(jnp, x, t, cond, cond if deep is None else deep)[0], cond

    sample = make_sampler(lambda *a: constant(*a, None)[0], process, sampler=sampler, steps=7)
    exact = jax.jit(sample)(None, noise, COND, NEGATIVE, 3.0, KEYS)
    for reuse in (2, 3, 7):
        reused = path(process, noise, sampler, 7, reuse, NEGATIVE, 3.0, constant)
        np.testing.assert_allclose(reused, exact, rtol=1e-5, atol=1e-5)


def test_each_half_of_guidance_keeps_its_own_features(process, noise):
    """At scale 0 and 1 the pictures are those of one condition alone; features of the other would change them."""
    for guidance, cond in ((0.0, NEGATIVE), (1.0, COND)):
        guided = path(process, noise, "ddim", 6, 3, NEGATIVE, guidance)
        sample = make_sampler(predict, process, steps=6, reuse_features=3, with_deep=with_deep)
        np.testing.assert_allclose(guided, jax.jit(sample)(None, noise, cond, None, 1.0), rtol=1e-5, atol=1e-5)


def test_the_whole_model_runs_once_in_so_many_steps(process, noise):
    given = []

    def counting(params, x, t, cond, deep):
        given.append(deep is not None)
        return with_deep(params, x, t, cond, deep)

    path(process, noise, "ddim", 9, 4, function=counting)
    assert given == [False, True, True, True]  # the loop's body, traced once


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_is_every_step_to_the_last_bit(sampler, process, noise):
    sample = jax.jit(make_sampler(predict, process, sampler=sampler, steps=5))
    plain = sample(None, noise, COND, NEGATIVE, 3.0, KEYS)
    np.testing.assert_array_equal(path(process, noise, sampler, 5, 1, NEGATIVE, 3.0), plain)


def test_numbers_that_are_none_of_the_steps_are_refused(process):
    for reuse in (0, -1, 6):
        with pytest.raises(ValueError, match=f"reuse_features = {reuse}: expected 1, or .* up to the 5 steps"):
            make_sampler(predict, process, steps=5, reuse_features=reuse, with_deep=with_deep)
    with pytest.raises(ValueError, match="reuse_features = 2: expected 1, or with `with_deep`"):
        make_sampler(predict, process, steps=5, reuse_features=2)


@pytest.fixture(scope="module")
def bases(sd15, tmp_path_factory):
    """name -> (pipeline, params, picture's further conditions)."""
    found = {"SD": (sd15.pipeline, sd15.params, {})}
    sizes = {"sizes": jnp.float32([[32, 32, 0, 0, 32, 32]] * 2)}
    low = {"low": jax.random.normal(jax.random.key(0), (2, 16, 16, 3)), "level": jnp.int32([20, 300])}
    for name, write, more in (("SDXL", write_sdxl, sizes), ("x4", write_upscaler, low)):
        folder = tmp_path_factory.mktemp(name)
        write(folder)
        pipeline = load_pipeline(str(folder))
        found[name] = pipeline, read_params(pipeline), more
    return found


def arguments(pipeline, params, more):
    x = jax.random.normal(jax.random.key(1), (2, 16, 16, 4))
    return x, jnp.float32([600, 20]), pipeline.encode_text(params, pipeline.tokenize(["a dog", "a sks cat"])) | more


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("name", ["SD", "SDXL", "x4"])
def test_a_light_step_with_its_own_features_is_the_whole_one(name, factors, bases):
    """To the last bit, operation by operation; adapters' factors stay in the layers that are computed."""
    pipeline, params, more = bases[name]
    if factors:
        method = lora(pipeline.trainable(DENOISER), r"to_[qkv]|conv1", 2, 4.0)
        trainable, frozen = method.start(params, jax.random.key(0))
        moved = {n: 0.1 * jax.random.normal(jax.random.key(i), v.shape) for i, (n, v) in enumerate(trainable.items())}
        params = method.combine(frozen, moved)
    x, t, cond = arguments(pipeline, params, more)
    whole, deep = pipeline.with_deep(params, x, t, cond, None)
    light, again = pipeline.with_deep(params, x, t, cond, deep)
    np.testing.assert_array_equal(light, whole)
    np.testing.assert_array_equal(again, deep)
    np.testing.assert_array_equal(pipeline.output(params, x, t, cond), whole)
    other, _ = pipeline.with_deep(params, x, t, cond, deep + 1)
    assert np.abs(other - whole).max() > 1e-3 * np.abs(whole).max()


@pytest.mark.parametrize("name", ["SD", "SDXL", "x4"])
def test_a_light_step_has_no_deep_layers(name, bases):
    """Weights of the outermost layers alone have an effect on it, those of time and input among them."""
    pipeline, params, more = bases[name]
    x, t, cond = arguments(pipeline, params, more)
    _, deep = pipeline.with_deep(params, x, t, cond, None)
    light = jax.jit(lambda params: jnp.square(pipeline.with_deep(params, x, t, cond, deep)[0]).sum())
    moves = {n for n, slope in jax.grad(light)(params).items() if np.abs(slope).max() > 0}
    assert moves and not {n for n in moves if "mid_block" in n or ".down_blocks.1" in n or ".up_blocks.0" in n}
    assert {n.split(".")[1] for n in moves} >= {"conv_in", "time_embedding", "up_blocks", "conv_norm_out", "conv_out"}


def test_a_light_step_of_stable_diffusion_is_a_small_part_of_the_work():
    pipeline = describe_base("stable-diffusion-v1-5/stable-diffusion-v1-5", dtype=jnp.bfloat16)
    x, states = (jax.ShapeDtypeStruct((8, *shape), jnp.float32) for shape in ((64, 64, 4), (77, 768)))
    t, deep = (
        jax.ShapeDtypeStruct((8,), jnp.float32),
        jax.eval_shape(
            lambda p, x, t, c: pipeline.with_deep(p, x, t, {"states": c}, None)[1],
            pipeline.shapes,
            x,
            jnp.zeros(8),
            states,
        ),
    )

    def flops(deep):
        step = jax.jit(lambda p, x, t, c, deep: pipeline.with_deep(p, x, t, {"states": c}, deep)[0])
        return step.lower(pipeline.shapes, x, t, states, deep).cost_analysis()["flops"]

    assert deep.shape == (8, 64, 64, 320)
    assert 0.02 < flops(deep) / flops(None) < 0.2


@pytest.mark.slow
def test_every_second_step_whole_paints_nearly_the_same_pictures():
    """The embedded base, 50 steps of DDIM with guidance."""
    pipeline = load_pipeline("tiny")
    params = read_params(pipeline)
    prompts = ("a dog in the snow", "a teapot on a red background")
    requests = [Request(prompt, "", jax.random.key(seed)) for seed, prompt in enumerate(prompts)]

    def pictures(reuse):
        settings = {"resolution": 64, "batch_size": 2, "sampler": "ddim", "steps": 50, "guidance": 2.5}
        paint = make_painter(pipeline, make_mesh(1, 1, jax.devices()[:1]), reuse_features=reuse, **settings)
        return np.stack([image for _, image in sorted(paint(params, requests))]).astype(float)

    error = np.square(pictures(2) - pictures(1)).mean((1, 2, 3))
    assert (error > 0).all()
    assert (10 * np.log10(255**2 / error)).mean() >= 25


def test_pictures_of_a_base_that_is_not_divided_are_refused_before_anything_slow(micro, tmp_path, monkeypatch):
    write_stage_i(tmp_path / "if")
    for module in ("families.pipeline", "runs.workdir"):
        monkeypatch.setattr(f"dreambooth_jax.{module}.read_params", lambda *args, **kw: 1 / 0)
    command = ["--prompt=a dog", "--output", str(tmp_path / "pictures")]
    with pytest.raises(SystemExit, match="reuse_features = 2: the denoiser of IFPipeline has no deep part"):
        sample.main(["--base", str(tmp_path / "if"), "--reuse_features=2", "--sampler=ddpm", *command])
    stage_ii = {"stages": (str(tmp_path / "if"),), "stage_fields": ((("reuse_features", 2),),)}
    for fields in ({"base": str(tmp_path / "if"), "reuse_features": 2}, {"base": micro} | stage_ii):
        with pytest.raises(ValueError, match="the denoiser of IFPipeline has no deep part"):
            train.run(config_of(tmp_path / "run", **fields))
    assert not list((tmp_path / "run").glob("**/*.png"))


def test_pictures_say_how_often_the_whole_model_ran(micro, tmp_path):
    for reuse in (1, 3):
        command = ["--prompt=a dog", "--count=1", "--steps=6", "--output", str(tmp_path / str(reuse))]
        sample.main(["--base", micro, f"--reuse_features={reuse}", *command])
    images = [Image.open(tmp_path / name / "a_dog_0.png") for name in ("1", "3")]
    assert [image.text["reuse_features"] for image in images] == ["1", "3"]
    assert np.abs(np.asarray(images[0]).astype(int) - np.asarray(images[1])).max() > 0


def test_class_images_are_the_whole_model_s(micro, tmp_path):
    """They are training data: a setting of the sheets must not change what is learnt."""
    plain, reusing = (set_up(config_of(tmp_path / str(n), base=micro, reuse_features=n)) for n in (1, 2))
    assert plain.paint is plain.paint_class
    params, request = read_params(plain.pipeline, plain.mesh), [Request("a dog", "", jax.random.key(3))]
    whole, of_class, of_sheet = (
        dict(paint(params, request))[0] for paint in (plain.paint, reusing.paint_class, reusing.paint)
    )
    np.testing.assert_array_equal(of_class, whole)
    assert np.abs(of_sheet.astype(int) - whole).max() > 0


def test_pictures_and_scores_painted_otherwise_are_kept_apart(tmp_path):
    """Protocols, names of pictures of the stage before, and the run that is resumed."""
    plain, reusing = (config_of(tmp_path, reuse_features=n) for n in (1, 2))
    says = [questions_of(config, "run", 2, 2).says for config in (plain, reusing)]
    assert says[1] == f"{says[0]}; deep features of every 2 steps"
    request = Request("a dog", "", jax.random.key(0))
    assert _name(request, (plain,)) != _name(request, (reusing,))
    with pytest.raises(ConfigError, match="reuse_features: 1 in the checkpoint, 2 now"):
        check_resumable(reusing, plain.to_dict())
