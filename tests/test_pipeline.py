"""Whole folders: read, written, opened by PyTorch diffusers, which paints the same pictures from them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from dreambooth_jax.diffusion.sampler import make_sampler, noise_for_seeds
from dreambooth_jax.families.pipeline import describe_base, load_pipeline, read_params, save_pipeline
from dreambooth_jax.files.hub import resolve_base
from dreambooth_jax.models.spec import UnsupportedConfig


def paint(pipeline, params, noise, prompts, negatives, guidance):
    """Ten DDIM steps and the decoder: pixels in [0, 1]."""
    sample = make_sampler(pipeline.denoise, pipeline.process, sampler="ddim", steps=10)

    @jax.jit
    def run(params, noise, *ids):
        states = [pipeline.encode_text(params, i) for i in ids]
        return pipeline.decode(params, sample(params, noise, *states, guidance))

    return run(params, noise, pipeline.tokenize(prompts), pipeline.tokenize(negatives))


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_diffusers_opens_an_export_and_paints_the_same_images(name, request, tmp_path):
    base = request.getfixturevalue(name)
    # Not what was read, so that an export that merely copied files would be seen.
    params = {n: np.float32(1.1) * np.asarray(v) if "attn" in n else v for n, v in base.params.items()}
    save_pipeline(base.pipeline, params, tmp_path)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    assert isinstance(theirs.scheduler, DDIMScheduler)
    noise, prompts, negatives = noise_for_seeds(np.arange(2), (16, 16, 4)), ["a sks dog", "a cat of dogs"], ["", "dog"]
    kw = {"num_inference_steps": 10, "guidance_scale": 5.0, "output_type": "np", "height": 32, "width": 32}
    latents = torch.from_numpy(np.moveaxis(np.array(noise), -1, 1).copy())
    expected = theirs(prompts, negative_prompt=negatives, latents=latents, **kw).images
    out = np.asarray(paint(base.pipeline, params, noise, prompts, negatives, 5.0))
    assert out.shape == expected.shape == (2, 32, 32, 3)
    assert out.std() > 0.02 and ((out > 0) & (out < 1)).mean() > 0.9
    assert np.abs(out - expected).max() <= 2e-3


def test_load_save_load_is_the_identity(sd21, tmp_path):
    save_pipeline(sd21.pipeline, sd21.params, tmp_path)
    again = load_pipeline(str(tmp_path))
    params = read_params(again)
    assert params.keys() == sd21.params.keys() == sd21.pipeline.shapes.keys()
    assert all(np.array_equal(params[name], sd21.params[name]) for name in params)
    assert again.models.configs == sd21.pipeline.models.configs
    assert again.tokenizer.get_vocab() == sd21.pipeline.tokenizer.get_vocab()


def test_a_half_precision_folder_exports_in_either_precision(sd15, tmp_path):
    half = StableDiffusionPipeline.from_pretrained(sd15.folder, torch_dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    pipeline = load_pipeline(str(tmp_path / "half"))
    params = read_params(pipeline)
    for dtype in ("float32", "float16"):
        save_pipeline(pipeline, params, tmp_path / dtype, dtype=dtype)
        theirs = StableDiffusionPipeline.from_pretrained(tmp_path / dtype)
        theirs.set_progress_bar_config(disable=True)
        assert {part.dtype for part in (theirs.unet, theirs.vae, theirs.text_encoder)} == {torch.float32}
        theirs("a dog", num_inference_steps=1, output_type="np")
        for name, value in half.text_encoder.state_dict().items():
            assert torch.equal(theirs.text_encoder.state_dict()[name].half(), value), name


def test_sizes(sd15):
    assert sd15.pipeline.resolution == 32
    assert sd15.pipeline.example_shape(24) == (12, 12, 4)
    with pytest.raises(ValueError, match=r"resolution = 26.*multiple of 4; nearest: 24, 28"):
        sd15.pipeline.example_shape(26)


def test_token_ids_are_those_of_transformers_and_cuts_are_told(sd15, caplog):
    prompts = ["a sks dog", "a cat of a dog " * 8, ""]
    reference = sd15.torch.tokenizer(prompts, padding="max_length", truncation=True, max_length=16)
    np.testing.assert_array_equal(sd15.pipeline.tokenize(prompts)["ids"], reference.input_ids)
    messages = [record.message for record in caplog.records if "cut" in record.message]
    assert len(messages) == 1 and "16 tokens" in messages[0] and prompts[1] in messages[0]


def test_images_are_encoded_as_diffusers_does(sd15):
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    mean, std = jax.jit(sd15.pipeline.encode_images)(sd15.params, images)
    pixels = sd15.torch.image_processor.preprocess(images.astype(np.float32) / 255)
    with torch.no_grad():
        posterior = sd15.torch.vae.encode(pixels).latent_dist
    scale = sd15.torch.vae.config.scaling_factor
    np.testing.assert_allclose(mean, scale * posterior.mean.movedim(1, -1), atol=1e-4)
    np.testing.assert_allclose(std, scale * posterior.std.movedim(1, -1), atol=1e-4)


def broken(sd15, tmp_path, file: str, change) -> str:
    folder = shutil.copytree(sd15.folder, tmp_path / "broken")
    config = json.loads((folder / file).read_text())
    change(config)
    (folder / file).write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("model_index.json", "_class_name", "StableDiffusionXLImg2ImgPipeline"),
        ("unet/config.json", "addition_embed_type", "text_time"),
        ("vae/config.json", "shift_factor", 0.5),
        ("text_encoder/config.json", "hidden_act", "relu"),
        ("text_encoder/config.json", "hidden_size", 64),
        ("scheduler/scheduler_config.json", "beta_schedule", "sigmoid"),
    ],
)
def test_a_folder_of_another_kind_is_refused(sd15, tmp_path, file, field, value):
    base = broken(sd15, tmp_path, file, lambda config: config.update({field: value}))
    with pytest.raises(UnsupportedConfig, match=str(value)):
        load_pipeline(base)


def test_absent_files_and_bases_are_named(sd15, tmp_path):
    folder = shutil.copytree(sd15.folder, tmp_path / "incomplete")
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"vae/config\.json is not there"):
        load_pipeline(str(folder))
    with pytest.raises(FileNotFoundError, match=r"no-such-folder.*hub name"):
        resolve_base("./no-such-folder")


USE = """
import sys
from dreambooth_jax.families.pipeline import load_pipeline, read_params
pipeline = load_pipeline(sys.argv[1])
states = pipeline.encode_text(read_params(pipeline), pipeline.tokenize(["a sks dog"]))["states"]
print(states.shape, "torch" in sys.modules)
"""
ABSENT = """
import importlib.machinery, pkgutil, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.split(".")[0] in ("torch", "diffusers", "tensorflow")
        return None if absent else super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
import dreambooth_jax
from absl import flags
for module in pkgutil.walk_packages(dreambooth_jax.__path__, "dreambooth_jax."):
    try:
        __import__(module.name)
    except flags.DuplicateFlagError:  # commands share names of flags; their imports stand above those
        pass
"""


@pytest.mark.parametrize("program", [USE, ABSENT + USE], ids=["not imported", "not needed"])
@pytest.mark.slow
def test_torch(sd15, program):
    """A base is read without importing PyTorch, and every module works where there is none."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    run = subprocess.run(
        [sys.executable, "-c", program, str(sd15.folder)], env=environment, capture_output=True, text=True
    )
    assert run.stdout.split("\n")[-2:] == ["(1, 16, 32) False", ""], run.stderr


def test_the_decoder_alone_of_the_autoencoder_computes_in_the_dtype():
    """In bfloat16 photos are encoded to the bit as in float32, and decoded with more than 45 dB. SDXL decodes in
    float32."""
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    means, pixels = [], []
    for dtype in (jnp.float32, jnp.bfloat16):
        pipeline = load_pipeline("tiny", dtype=dtype)
        params = read_params(pipeline, shapes=pipeline.frozen_shapes)
        low = {name for name, x in params.items() if name.startswith("vae.") and x.dtype == jnp.bfloat16}
        assert all(name.startswith(("vae.decoder.", "vae.post_quant_conv.")) for name in low)
        assert ("vae.decoder.conv_in.kernel" in low) == (dtype == jnp.bfloat16)
        means.append(jax.jit(pipeline.encode_images)(params, images)[0])
        pixels.append(np.asarray(jax.jit(pipeline.decode)(params, means[0])))
        assert pixels[-1].dtype == np.float32
    np.testing.assert_array_equal(*means)
    error = np.square(pixels[0] - pixels[1]).mean()
    assert 0 < error < 10**-4.5
    held = describe_base("stabilityai/stable-diffusion-xl-base-1.0", dtype=jnp.bfloat16).frozen_shapes
    assert {x.dtype for name, x in held.items() if name.startswith("vae.")} == {jnp.dtype("float32")}
