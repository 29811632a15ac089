"""ViTModel: the image features of DINO (arXiv 2104.14294), in transformers' layout, for subject fidelity."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Unpack

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dreambooth_jax.models.clip_text import ACTIVATIONS
from dreambooth_jax.models.layers import LayerNorm, Linear, Setting
from dreambooth_jax.models.spec import not_among, read_spec
from dreambooth_jax.ops.attention import attention

Tokens = Float[Array, "b l c"]


@dataclasses.dataclass(frozen=True)
class ViTSpec:
    """The implemented fields of a ViTModel's config.json, with the defaults of transformers."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ViTSpec":
        """Raises UnsupportedConfig, naming the fields, for anything not implemented."""
        known = {field.name for field in dataclasses.fields(cls)}
        config = {name: value for name, value in config.items() if name in known}
        return read_spec(cls, config, {}, lambda spec: not_among(spec, {"hidden_act": sorted(ACTIVATIONS)}))


class PatchEmbeddings(nnx.Module):
    def __init__(self, cin: int, cout: int, size: int, **kw: Unpack[Setting]):
        patch = (size, size)
        self.projection = nnx.Conv(cin, cout, patch, strides=patch, padding="VALID", **kw)


class Embeddings(nnx.Module):
    """A class token before the projected patches, and a learnt position for each."""

    def __init__(self, spec: ViTSpec, **kw: Unpack[Setting]):
        self.dtype = kw["dtype"]
        normal, length = kw["rngs"].params.normal, (spec.image_size // spec.patch_size) ** 2 + 1
        self.cls_token = nnx.Param(0.02 * normal((1, 1, spec.hidden_size)))
        self.position_embeddings = nnx.Param(0.02 * normal((1, length, spec.hidden_size)))
        self.patch_embeddings = PatchEmbeddings(spec.num_channels, spec.hidden_size, spec.patch_size, **kw)

    def __call__(self, pixels: Float[Array, "b h w p"]) -> Tokens:
        patches = self.patch_embeddings.projection(pixels)
        patches = patches.reshape(len(patches), -1, patches.shape[-1])
        first = jnp.broadcast_to(self.cls_token.astype(self.dtype), (len(patches), 1, patches.shape[-1]))
        return jnp.concatenate([first, patches], 1) + self.position_embeddings.astype(self.dtype)


class SelfAttention(nnx.Module):
    def __init__(self, channels: int, heads: int, *, use_bias: bool, **kw: Unpack[Setting]):
        self.heads = heads
        self.query, self.key, self.value = (Linear(channels, channels, use_bias=use_bias, **kw) for _ in range(3))

    def __call__(self, x: Tokens) -> Tokens:
        heads = (*x.shape[:2], self.heads, -1)
        query, key, value = (project(x).reshape(heads) for project in (self.query, self.key, self.value))
        return attention(query, key, value).reshape(x.shape)


class Projected(nnx.Module):
    """`dense`, alone in a module as the format has it."""

    def __init__(self, cin: int, cout: int, **kw: Unpack[Setting]):
        self.dense = Linear(cin, cout, **kw)


class AttentionBlock(nnx.Module):
    def __init__(self, channels: int, heads: int, *, use_bias: bool, **kw: Unpack[Setting]):
        self.attention = SelfAttention(channels, heads, use_bias=use_bias, **kw)
        self.output = Projected(channels, channels, **kw)

    def __call__(self, x: Tokens) -> Tokens:
        return self.output.dense(self.attention(x))


class Layer(nnx.Module):
    def __init__(self, spec: ViTSpec, **kw: Unpack[Setting]):
        self.activation = ACTIVATIONS[spec.hidden_act]
        self.layernorm_before = LayerNorm(spec.hidden_size, spec.layer_norm_eps, **kw)
        self.attention = AttentionBlock(spec.hidden_size, spec.num_attention_heads, use_bias=spec.qkv_bias, **kw)
        self.layernorm_after = LayerNorm(spec.hidden_size, spec.layer_norm_eps, **kw)
        self.intermediate = Projected(spec.hidden_size, spec.intermediate_size, **kw)
        self.output = Projected(spec.intermediate_size, spec.hidden_size, **kw)

    def __call__(self, x: Tokens) -> Tokens:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output.dense(self.activation(self.intermediate.dense(self.layernorm_after(x))))


class Encoder(nnx.Module):
    def __init__(self, spec: ViTSpec, **kw: Unpack[Setting]):
        self.layer = nnx.List([Layer(spec, **kw) for _ in range(spec.num_hidden_layers)])


class ViTModel(nnx.Module):
    """Normalised images -> features. `spec` has the sizes; `dtype` is that of the computation."""

    def __init__(self, spec: ViTSpec, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        kw: Setting = {"dtype": dtype, "rngs": rngs}
        self.embeddings = Embeddings(spec, **kw)
        self.encoder = Encoder(spec, **kw)
        self.layernorm = LayerNorm(spec.hidden_size, spec.layer_norm_eps, **kw)

    def __call__(self, pixels: Float[Array, "b h w p"]) -> Tokens:
        """The last hidden states, normed; the class token's come first."""
        return self.layernorm(self.hidden_states(pixels)[-1])

    def hidden_states(self, pixels: Float[Array, "b h w p"]) -> list[Tokens]:
        """The embeddings and what each layer makes of them, before the last norm."""
        states = [self.embeddings(pixels)]
        for layer in self.encoder.layer:
            states.append(layer(states[-1]))
        return states

    def features(self, pixels: Float[Array, "b h w p"]) -> Float[Array, "b c"]:
        """Unit vectors of the class token: what DINO scores compare."""
        first = self(pixels)[:, 0]
        return first / jnp.linalg.norm(first, axis=-1, keepdims=True)
