"""Dinov2Model: the image features of DINOv2 (arXiv 2304.07193), in transformers' layout: a ViT with layer scale whose
positions are interpolated to the size of the image."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dreambooth_jax.models.clip_text import ACTIVATIONS
from dreambooth_jax.models.layers import LayerNorm, Setting
from dreambooth_jax.models.spec import not_among, read_spec
from dreambooth_jax.models.vit import AttentionBlock, PatchEmbeddings, Tokens


@dataclasses.dataclass(frozen=True)
class Dinov2Spec:
    """The implemented fields of a Dinov2Model's config.json, with the defaults of transformers."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = True
    layerscale_value: float = 1.0
    use_swiglu_ffn: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Dinov2Spec":
        """Raises UnsupportedConfig, naming the fields, for anything not implemented."""
        known = {field.name for field in dataclasses.fields(cls)}
        config = {name: value for name, value in config.items() if name in known}
        return read_spec(cls, config, {}, _problems)


def _problems(spec: Dinov2Spec) -> list[str]:
    swiglu = ["use_swiglu_ffn = True (implemented: False)"] if spec.use_swiglu_ffn else []
    return swiglu + not_among(spec, {"hidden_act": sorted(ACTIVATIONS)})


class Embeddings(nnx.Module):
    """A class token before the projected patches, and a learnt position for each, interpolated to their number."""

    def __init__(self, spec: Dinov2Spec, **kw: Unpack[Setting]):
        self.dtype = kw["dtype"]
        self.side = spec.image_size // spec.patch_size
        self.cls_token = nnx.Param(jnp.zeros((1, 1, spec.hidden_size)))
        self.mask_token = nnx.Param(jnp.zeros((1, spec.hidden_size)))  # of pretraining; part of the file
        self.position_embeddings = nnx.Param(jnp.zeros((1, self.side**2 + 1, spec.hidden_size)))
        self.patch_embeddings = PatchEmbeddings(spec.num_channels, spec.hidden_size, spec.patch_size, **kw)

    def __call__(self, pixels: Float[Array, "b h w p"]) -> Tokens:
        patches = self.patch_embeddings.projection(pixels)
        b, h, w, c = patches.shape
        positions = self.position_embeddings.astype(jnp.float32)
        grid = positions[0, 1:].reshape(self.side, self.side, c)
        grid = jnp.einsum("hi,wj,ijc->hwc", bicubic(self.side, h), bicubic(self.side, w), grid)
        positions = jnp.concatenate([positions[0, :1], grid.reshape(h * w, c)])
        first = jnp.broadcast_to(self.cls_token.astype(self.dtype), (b, 1, c))
        return jnp.concatenate([first, patches.reshape(b, h * w, c)], 1) + positions.astype(self.dtype)


class LayerScale(nnx.Module):
    def __init__(self, spec: Dinov2Spec):
        self.lambda1 = nnx.Param(jnp.full(spec.hidden_size, spec.layerscale_value))

    def __call__(self, x: Tokens) -> Tokens:
        return x * self.lambda1.astype(x.dtype)


class MLP(nnx.Module):
    def __init__(self, spec: Dinov2Spec, **kw: Unpack[Setting]):
        wide = spec.hidden_size * spec.mlp_ratio
        self.activation = ACTIVATIONS[spec.hidden_act]
        self.fc1 = nnx.Linear(spec.hidden_size, wide, **kw)
        self.fc2 = nnx.Linear(wide, spec.hidden_size, **kw)

    def __call__(self, x: Tokens) -> Tokens:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nnx.Module):
    def __init__(self, spec: Dinov2Spec, **kw: Unpack[Setting]):
        self.norm1 = LayerNorm(spec.hidden_size, spec.layer_norm_eps, **kw)
        self.attention = AttentionBlock(spec.hidden_size, spec.num_attention_heads, use_bias=spec.qkv_bias, **kw)
        self.layer_scale1 = LayerScale(spec)
        self.norm2 = LayerNorm(spec.hidden_size, spec.layer_norm_eps, **kw)
        self.mlp = MLP(spec, **kw)
        self.layer_scale2 = LayerScale(spec)

    def __call__(self, x: Tokens) -> Tokens:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Encoder(nnx.Module):
    def __init__(self, spec: Dinov2Spec, **kw: Unpack[Setting]):
        self.layer = nnx.List([Layer(spec, **kw) for _ in range(spec.num_hidden_layers)])


class Dinov2Model(nnx.Module):
    """Normalised images, sides multiples of the patch -> features. `dtype` is that of the computation."""

    def __init__(self, spec: Dinov2Spec, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        kw: Setting = {"dtype": dtype, "rngs": rngs}
        self.embeddings = Embeddings(spec, **kw)
        self.encoder = Encoder(spec, **kw)
        self.layernorm = LayerNorm(spec.hidden_size, spec.layer_norm_eps, **kw)

    def __call__(self, pixels: Float[Array, "b h w p"]) -> Tokens:
        """The last hidden states, normed; the class token's come first."""
        states = self.embeddings(pixels)
        for layer in self.encoder.layer:
            states = layer(states)
        return self.layernorm(states)

    def features(self, pixels: Float[Array, "b h w p"]) -> Float[Array, "b c"]:
        """Unit vectors of the class token."""
        first = self(pixels)[:, 0]
        return first / jnp.linalg.norm(first, axis=-1, keepdims=True)


def bicubic(size: int, wanted: int) -> np.ndarray:
    """The matrix [wanted, size] of PyTorch's bicubic interpolation along one axis: Keys' kernel with a = -0.75, pixel
    centres aligned, borders repeated, no antialiasing."""
    a, matrix = -0.75, np.zeros((wanted, size), np.float32)
    for row in range(wanted):
        centre = (row + 0.5) * size / wanted - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            d = abs(centre - tap)
            near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
            matrix[row, min(max(tap, 0), size - 1)] += near if d <= 1 else far
    return matrix
