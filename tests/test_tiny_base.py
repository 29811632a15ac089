"""The base that ships inside the package is an ordinary Stable Diffusion folder."""

import jax
import numpy as np
import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline

from dreambooth_jax.data.identifiers import check_identifier
from dreambooth_jax.diffusion.sampler import make_sampler, noise_for_seeds
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.files.hub import EMBEDDED, EMBEDDED_FOLDER
from dreambooth_jax.files.tokenizer import load_tokenizer
from dreambooth_jax.tiny import world


@pytest.fixture(scope="module")
def base():
    pipeline = load_pipeline("tiny")
    return pipeline, read_params(pipeline)


def test_fits_in_the_package():
    size = sum(path.stat().st_size for path in EMBEDDED_FOLDER.rglob("*") if path.is_file())
    assert size < 40e6


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_licences_of_its_pictures_lie_beside_it(name):
    assert "Fluent" in (EMBEDDED[name] / "LICENSES.md").read_text()


@pytest.mark.parametrize("name", EMBEDDED)
def test_identifiers_are_rare_single_tokens(name):
    tokenizer = load_tokenizer(EMBEDDED[name])
    assert check_identifier(tokenizer, "sks") == []
    assert check_identifier(tokenizer, "dog")  # a common word is warned of


@pytest.mark.slow
def test_pytorch_paints_the_same_picture(base):
    pipeline, params = base
    reference = StableDiffusionPipeline.from_pretrained(EMBEDDED_FOLDER, torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    noise = noise_for_seeds([0], pipeline.example_shape(pipeline.resolution))
    prompt = "a dog on the beach"
    cond, uncond = (pipeline.encode_text(params, pipeline.tokenize([text])) for text in (prompt, ""))
    sample = jax.jit(make_sampler(pipeline.denoise, pipeline.process, sampler="ddim", steps=10))
    ours = pipeline.decode(params, sample(params, noise, cond, uncond, 4.0))
    theirs = reference(
        prompt,
        latents=torch.tensor(np.asarray(noise).transpose(0, 3, 1, 2)),
        num_inference_steps=10,
        guidance_scale=4.0,
        output_type="np",
    ).images
    assert np.abs(np.asarray(ours) - theirs).max() < 2e-3
    assert theirs.std() > 0.05  # a picture, not a grey square


@pytest.mark.parametrize(("model", "part"), [(transformers.CLIPModel, "clip"), (transformers.ViTModel, "vit")])
def test_the_models_of_the_metrics_lie_beside_it(model, part):
    _, about = model.from_pretrained(EMBEDDED_FOLDER / part, output_loading_info=True)
    assert not about["unexpected_keys"] and not about["mismatched_keys"]
    assert all(name.startswith("pooler.") for name in about["missing_keys"])  # features are the class token's


@pytest.mark.slow
def test_prompts_are_understood(base):
    """A text tower beside another tokenizer than its own, or a wrong scale, paints nonsense without an error."""
    pipeline, params = base
    colours = ["red", "blue", "green", "yellow"]
    prompts = [f"a dog on a {c} background" for c in colours]
    cond, uncond = (pipeline.encode_text(params, pipeline.tokenize(texts)) for texts in (prompts, [""] * 4))
    noise = noise_for_seeds(range(4), pipeline.example_shape(pipeline.resolution))
    sample = jax.jit(make_sampler(pipeline.denoise, pipeline.process, sampler="dpm++", steps=10))
    latents = sample(params, noise, cond, uncond, 4.0)
    images = 255 * np.asarray(pipeline.decode(params, latents))
    corners = images[:, :8, :8].mean((1, 2))
    named = np.array([world.COLOURS[colour] for colour in colours])
    nearest = np.argmin(np.square(corners[:, None] - named).sum(-1), axis=1)
    assert nearest.tolist() == [0, 1, 2, 3]


@pytest.mark.slow
def test_the_clip_names_what_the_base_paints(base):
    """Both would fail a text tower that tells backgrounds and colours apart but not things."""
    pipeline, params = base
    names = ["banana", "car", "clock", "candle", "robot", "duck", "backpack", "tomato"]
    prompts = [f"a photo of a {name}" for name in names]
    cond, uncond = (pipeline.encode_text(params, pipeline.tokenize(texts)) for texts in (prompts, [""] * 8))
    noise = noise_for_seeds(range(8), pipeline.example_shape(pipeline.resolution))
    sample = jax.jit(make_sampler(pipeline.denoise, pipeline.process, sampler="dpm++", steps=15))
    latents = sample(params, noise, cond, uncond, 4.0)
    images = np.asarray(pipeline.decode(params, latents))
    clip = transformers.CLIPModel.from_pretrained(EMBEDDED_FOLDER / "clip").eval()
    with torch.no_grad():
        cosines = clip(
            input_ids=torch.tensor(pipeline.tokenize([f"a {name}" for name in names])["ids"]),
            pixel_values=torch.tensor(images.transpose(0, 3, 1, 2) * 2 - 1),
        ).logits_per_image
    assert np.mean(np.argmax(cosines.numpy(), axis=1) == np.arange(8)) >= 0.75
