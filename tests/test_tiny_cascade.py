"""Stage I of the cascade that ships inside the package: an ordinary folder of DeepFloyd IF's kind."""

import jax
import numpy as np
import pytest
import torch
from diffusers import IFPipeline
from support.runs import get_config

from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.files.hub import EMBEDDED
from dreambooth_jax.painting.painter import Request, make_painter
from dreambooth_jax.runs.config import check_config
from dreambooth_jax.runs.effects import check_effects
from dreambooth_jax.tiny import world

FOLDER = EMBEDDED["tiny_stage1"]


@pytest.fixture(scope="module")
def base():
    pipeline = load_pipeline("tiny_stage1")
    return pipeline, read_params(pipeline)


def test_fits_in_the_package():
    assert 1e6 < sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 7.5e6


def test_diffusers_opens_it_and_reads_prompts_alike(base):
    pipeline, params = base
    theirs = IFPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    ours = pipeline.encode_text(params, pipeline.tokenize(["a sks dog on the beach"]))["states"]
    states, _ = theirs.encode_prompt("a sks dog on the beach", do_classifier_free_guidance=False, device="cpu")
    np.testing.assert_allclose(ours, states.detach(), atol=1e-4)


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


@pytest.mark.parametrize("preset", ["tiny_stage1", "tiny_stage1,lora"])
def test_its_preset_passes(preset):
    config = get_config(preset)
    check_config(config)
    check_effects(config, get_config())  # what it changes has an effect
    assert config.base == "tiny_stage1"
