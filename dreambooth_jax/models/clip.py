"""CLIPModel: a text and an image tower trained to agree (arXiv 2103.00020), for pretraining and for CLIP scores."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dreambooth_jax.models.clip_text import ACTIVATIONS, CLIPTextSpec, Encoder, TextTransformer
from dreambooth_jax.models.layers import LayerNorm, Setting
from dreambooth_jax.models.spec import UnsupportedConfig, read_spec


@dataclasses.dataclass(frozen=True)
class CLIPVisionSpec:
    """The implemented fields of `vision_config`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "CLIPVisionSpec":
        """Raises UnsupportedConfig, naming the fields, for anything not implemented."""
        known = {field.name for field in dataclasses.fields(cls)}
        spec = read_spec(cls, {name: value for name, value in config.items() if name in known}, {})
        if spec.hidden_act not in ACTIVATIONS:
            raise UnsupportedConfig(f"hidden_act = {spec.hidden_act!r}; implemented: {sorted(ACTIVATIONS)}")
        return spec


class VisionEmbeddings(nnx.Module):
    def __init__(self, spec: CLIPVisionSpec, **kw: Unpack[Setting]):
        size, patch = spec.hidden_size, (spec.patch_size,) * 2
        self.class_embedding = nnx.Param(0.02 * kw["rngs"].params.normal((size,)))
        self.patch_embedding = nnx.Conv(
            spec.num_channels, size, patch, strides=patch, padding="VALID", use_bias=False, **kw
        )
        self.position_embedding = nnx.Embed((spec.image_size // spec.patch_size) ** 2 + 1, size, **kw)

    def __call__(self, pixels: Float[Array, "b h w colours"]) -> Float[Array, "b l c"]:
        patches = self.patch_embedding(pixels)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        first = jnp.broadcast_to(self.class_embedding.get_value(), (len(patches), 1, patches.shape[-1]))
        tokens = jnp.concatenate([first.astype(patches.dtype), patches], 1)
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))


class VisionTransformer(nnx.Module):
    def __init__(self, spec: CLIPVisionSpec, **kw: Unpack[Setting]):
        self.embeddings = VisionEmbeddings(spec, **kw)
        self.pre_layrnorm = LayerNorm(spec.hidden_size, spec.layer_norm_eps, **kw)  # spelt so in the files
        self.encoder = Encoder(spec, causal=False, **kw)
        self.post_layernorm = LayerNorm(spec.hidden_size, spec.layer_norm_eps, **kw)

    def __call__(self, pixels: Float[Array, "b h w colours"]) -> Float[Array, "b c"]:
        return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(pixels)))[:, 0])


class CLIPModel(nnx.Module):
    """Both towers with their projections into the common space.

    Args:
        text, vision: specs of the towers.
        projection_dim: width of the common space.
        dtype: of the computation; parameters are float32.
    """

    def __init__(
        self,
        text: CLIPTextSpec,
        vision: CLIPVisionSpec,
        projection_dim: int,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: Setting = {"dtype": dtype, "rngs": rngs}
        self.text_model = TextTransformer(text, **kw)
        self.vision_model = VisionTransformer(vision, **kw)
        self.text_projection = nnx.Linear(text.hidden_size, projection_dim, use_bias=False, **kw)
        self.visual_projection = nnx.Linear(vision.hidden_size, projection_dim, use_bias=False, **kw)
        self.logit_scale = nnx.Param(jnp.asarray(np.log(1 / 0.07), jnp.float32))

    def text_features(self, ids: Int[Array | np.ndarray, "b l"], end: int) -> Float[Array, "b p"]:
        """Unit vectors of texts; `end` is the id of the end token, at whose first place a text's state is read."""
        states = self.text_model(ids)
        first = jnp.argmax(ids == end, axis=1)
        return _unit(self.text_projection(states[jnp.arange(len(ids)), first]))

    def image_features(self, pixels: Float[Array, "b h w colours"]) -> Float[Array, "b p"]:
        """Unit vectors of normalised images."""
        return _unit(self.visual_projection(self.vision_model(pixels)))

    def logits(
        self, ids: Int[Array | np.ndarray, "b l"], pixels: Float[Array, "b h w colours"], end: int
    ) -> Float[Array, "b b"]:
        """Scaled cosines, images down, texts across."""
        cosines = self.image_features(pixels) @ self.text_features(ids, end).T
        return jnp.exp(self.logit_scale.get_value()) * cosines


def _unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
