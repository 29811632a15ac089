"""The cascade that ships inside the package: ordinary folders of DeepFloyd IF's kind."""

import jax
import numpy as np
import pytest
import torch
from diffusers import IFPipeline, IFSuperResolutionPipeline
from PIL import Image
from support.runs import get_config

from dreambooth_jax.data.low_resolution import shrink
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.evaluation import metrics
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.files.hub import EMBEDDED
from dreambooth_jax.painting.painter import Request, make_painter
from dreambooth_jax.runs.config import check_config
from dreambooth_jax.runs.effects import check_effects
from dreambooth_jax.runs.stages import stage_configs
from dreambooth_jax.tiny import world

STAGES = {"tiny_stage1": IFPipeline, "tiny_stage2": IFSuperResolutionPipeline}


@pytest.fixture(scope="module")
def base():
    pipeline = load_pipeline("tiny_stage1")
    return pipeline, read_params(pipeline)


def test_fits_in_the_package():
    first, second = (
        sum(path.stat().st_size for path in EMBEDDED[stage].rglob("*") if path.is_file()) for stage in STAGES
    )
    assert 1e6 < first < 7.5e6 and second > 1e6 and first + second < 15e6


@pytest.mark.parametrize("stage", STAGES)
def test_diffusers_opens_it_and_reads_prompts_alike(stage):
    pipeline = load_pipeline(stage)
    params = read_params(pipeline)
    theirs = STAGES[stage].from_pretrained(EMBEDDED[stage], torch_dtype=torch.float32)
    ours = pipeline.encode_text(params, pipeline.tokenize(["a sks dog on the beach"]))["states"]
    states, _ = theirs.encode_prompt("a sks dog on the beach", do_classifier_free_guidance=False, device="cpu")
    np.testing.assert_allclose(ours, states.detach(), atol=1e-4)


def test_an_identifier_leaves_a_mark_and_changes_nothing_else(base):
    """A T5 that drops a word it does not know leaves nothing for a subject to be bound to."""
    pipeline, params = base

    def states(prompt):
        return np.asarray(pipeline.encode_text(params, pipeline.tokenize([prompt]))["states"][0])

    one, other, without = (states(f"a photo of{word} dog") for word in (" sks", " unicorn", ""))
    assert np.abs(one[3] - other[3]).mean() > 0.5 * np.abs(one[3]).mean()
    rest = np.delete(one, 3, axis=0), without[:-1]
    assert np.linalg.norm(rest[0] - rest[1]) < 0.1 * np.linalg.norm(rest[1])


@pytest.mark.slow
def test_prompts_are_understood(base):
    """A text encoder beside another tokenizer than its own, or a wrong scale, paints nonsense without an error."""
    pipeline, params = base
    mesh = make_mesh(1, 1, jax.devices()[:1])
    settings = {"sampler": "ddpm", "steps": 25, "guidance": 2.5, "batch_size": 4}
    paint = make_painter(pipeline, mesh, resolution=pipeline.resolution, **settings)
    colours = ["red", "blue", "green", "yellow"]
    asked = [Request(f"a dog on a {colour} background", "", jax.random.key(0)) for colour in colours]
    painted = dict(paint(params, asked))
    images = np.stack([painted[number] for number in range(4)])
    assert images.shape == (4, 32, 32, 3)
    corners = images[:, :4, :4].mean((1, 2))
    named = np.array([world.COLOURS[colour] for colour in colours])
    nearest = np.argmin(np.square(corners[:, None] - named).sum(-1), axis=1)
    assert nearest.tolist() == [0, 1, 2, 3]


@pytest.mark.slow
def test_stage_ii_draws_what_enlarging_blurs():
    """Photos of subjects that it has not seen, made small, and enlarged again: their colours, and sharper edges than
    bicubic interpolation gives them."""
    pipeline = load_pipeline("tiny_stage2")
    subjects = ("dog", "backpack", "teapot", "robot")
    photos = [
        Image.open(f"examples/subjects/{name}/00.jpg").resize((64, 64), Image.Resampling.LANCZOS) for name in subjects
    ]
    truth = np.stack([np.asarray(photo) for photo in photos])
    small = shrink(truth, 2)
    settings = {
        "sampler": "ddpm",
        "steps": 25,
        "guidance": 1.5,
        "batch_size": 4,
        "sr_noise": "uniform",
        "noise_level": 0,
    }
    paint = make_painter(pipeline, make_mesh(1, 1, jax.devices()[:1]), resolution=64, **settings)
    asked = [Request(f"a {name}", "", jax.random.key(0), low) for name, low in zip(subjects, small, strict=True)]
    painted = dict(paint(read_params(pipeline), asked))
    images = np.stack([painted[number] for number in range(4)])
    bicubic = np.stack([np.asarray(Image.fromarray(x).resize((64, 64), Image.Resampling.BICUBIC)) for x in small])
    assert np.abs(shrink(images, 2).astype(float) - small).mean() < 6
    assert metrics.sharpness(images).mean() > 2 * metrics.sharpness(bicubic).mean()


@pytest.mark.parametrize("preset", ["tiny_stage1", "tiny_stage1,lora", "tiny_cascade", "tiny_cascade,lora"])
def test_its_preset_passes(preset):
    config = get_config(preset)
    check_config(config)
    check_effects(config, get_config())  # what it changes has an effect
    assert [own.base for own in stage_configs(config)] == ["tiny_stage1", *config.stages]
    assert config.base == "tiny_stage1"
