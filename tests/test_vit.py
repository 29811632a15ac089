"""Image features for subject fidelity are those of transformers' ViTModel, the class that DINO ships in."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dreambooth_jax.files.safetensors import read_model
from dreambooth_jax.models.params import functional
from dreambooth_jax.models.spec import UnsupportedConfig
from dreambooth_jax.models.vit import ViTModel, ViTSpec


@pytest.mark.parametrize("pooler", [False, True])
def test_features_are_those_of_transformers(tmp_path, pooler):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
    )
    theirs = transformers.ViTModel(config, add_pooling_layer=pooler).eval()
    for parameter in theirs.parameters():  # the class token and the positions start at zero
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)

    spec = ViTSpec.from_config(json.loads((tmp_path / "config.json").read_text()))
    vit = functional(lambda rngs: ViTModel(spec, rngs=rngs))
    params = read_model(tmp_path, vit.shapes)
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        out = theirs(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    np.testing.assert_allclose(vit.apply(params, jnp.asarray(pixels)), out.last_hidden_state, atol=2e-5)
    hidden = vit.apply(params, jnp.asarray(pixels), method="hidden_states")
    assert len(hidden) == 4
    for ours, reference in zip(hidden, out.hidden_states, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=2e-5)
    first = out.last_hidden_state[:, 0]
    features = vit.apply(params, jnp.asarray(pixels), method="features")
    np.testing.assert_allclose(features, first / first.norm(dim=-1, keepdim=True), atol=2e-5)
    np.testing.assert_allclose(jnp.linalg.norm(features, axis=-1), 1, rtol=1e-5)


def test_refuses_an_activation_it_does_not_have():
    with pytest.raises(UnsupportedConfig, match="hidden_act = 'swish'"):
        ViTSpec.from_config({"hidden_act": "swish"})
