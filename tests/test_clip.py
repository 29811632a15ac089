"""The CLIP beside the embedded base is the one that transformers opens."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dreambooth_jax.files.hub import EMBEDDED_FOLDER
from dreambooth_jax.files.safetensors import read_model
from dreambooth_jax.files.tokenizer import load_tokenizer
from dreambooth_jax.models.clip import CLIPModel, CLIPVisionSpec
from dreambooth_jax.models.clip_text import CLIPTextSpec
from dreambooth_jax.models.params import functional


@pytest.mark.slow
def test_features_are_those_of_transformers():
    folder = EMBEDDED_FOLDER / "clip"
    config = json.loads((folder / "config.json").read_text())
    text, vision = CLIPTextSpec.from_config(config["text_config"]), CLIPVisionSpec.from_config(config["vision_config"])
    clip = functional(lambda rngs: CLIPModel(text, vision, config["projection_dim"], rngs=rngs))
    params = read_model(folder, clip.shapes)
    theirs = transformers.CLIPModel.from_pretrained(folder, torch_dtype=torch.float32).eval()

    tokenizer = load_tokenizer(EMBEDDED_FOLDER)
    prompts = ["a dog", "a photo of a red car in the snow", ""]
    ids = np.asarray(tokenizer(prompts, padding="max_length", max_length=text.max_position_embeddings).input_ids)
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        out = theirs(input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)))
    ours_text = clip.apply(params, jnp.asarray(ids), tokenizer.eos_token_id, method="text_features")
    ours_image = clip.apply(params, jnp.asarray(pixels), method="image_features")
    np.testing.assert_allclose(ours_text, out.text_embeds, atol=1e-5)
    np.testing.assert_allclose(ours_image, out.image_embeds, atol=1e-5)
    logits = clip.apply(params, jnp.asarray(ids)[:2], jnp.asarray(pixels), tokenizer.eos_token_id, method="logits")
    np.testing.assert_allclose(logits, out.logits_per_image[:, :2], rtol=1e-4, atol=1e-4)
