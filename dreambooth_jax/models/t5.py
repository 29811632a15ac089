"""T5EncoderModel of version 1.1: the text encoder of Imagen and DeepFloyd IF (arXiv 1910.10683, 2205.11487).

Against the transformer of arXiv 1706.03762: scores are not divided by sqrt(d), positions are a bias of the scores that
all blocks share, norms have neither mean nor bias, and no product has a bias.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dreambooth_jax.models.layers import Linear, Setting
from dreambooth_jax.models.spec import not_among, read_spec
from dreambooth_jax.ops.channels import spread

Tokens = Float[Array, "b l c"]
Bias = Float[Array, "1 n l l"]
Mask = Bool[Array, "b 1 1 l"]


@dataclasses.dataclass(frozen=True)
class T5Spec:
    """The implemented fields of text_encoder/config.json. `d_kv` is the width of a head."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    pad_token_id: int = 0
    max_length = 77  # tokens with padding, of which the UNets of Imagen and IF read all

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "T5Spec":
        """Raises UnsupportedConfig, naming the fields, for anything not implemented."""
        ignored = {name: (config.get(name),) for name in _WITHOUT_EFFECT}
        return read_spec(cls, config, _NEUTRAL | ignored, _problems)


def _problems(spec: T5Spec) -> list[str]:
    return not_among(spec, {"feed_forward_proj": ("gated-gelu",)})


_NEUTRAL = {
    "model_type": ("t5",),
    "is_gated_act": (True,),
    "dense_act_fn": ("gelu_new",),
    "is_decoder": (False,),
    "chunk_size_feed_forward": (0,),
}
# Of the decoder, of training, or bookkeeping of the file's writer.
_WITHOUT_EFFECT = [
    "architectures",
    "bos_token_id",
    "classifier_dropout",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "dropout_rate",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_factor",
    "is_encoder_decoder",
    "label2id",
    "n_positions",
    "num_decoder_layers",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "problem_type",
    "return_dict",
    "scale_decoder_outputs",
    "task_specific_params",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
]


def relative_buckets(length: int, buckets: int, max_distance: int) -> Int[np.ndarray, "q k"]:
    """The bucket of each distance from query to key: half of the buckets per sign, half of those one distance each and
    the rest of logarithmic width up to `max_distance` (arXiv 1910.10683, section 2.1)."""
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    far = np.log(np.maximum(np.abs(distance), 1) / exact, dtype=np.float32) / np.float32(np.log(max_distance / exact))
    far = np.minimum(exact + (far * (half - exact)).astype(int), half - 1)
    return np.where(distance > 0, half, 0) + np.where(np.abs(distance) < exact, np.abs(distance), far)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale (arXiv 1910.07467), the mean in float32."""

    def __init__(self, channels: int, eps: float, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.eps, self.dtype = eps, dtype
        self.scale = nnx.Param(jnp.ones(channels))

    def __call__(self, x: Tokens) -> Tokens:
        x = x.astype(jnp.float32)
        normed = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return (normed * spread(self.scale.get_value(), x.shape)).astype(self.dtype)


class SelfAttention(nnx.Module):
    """Multi-head attention without scale; block 0 holds the position bias of all blocks."""

    def __init__(self, spec: T5Spec, *, first: bool, **kw: Unpack[Setting]):
        width = spec.num_heads * spec.d_kv
        self.heads = spec.num_heads
        self.q = Linear(spec.d_model, width, use_bias=False, **kw)
        self.k = Linear(spec.d_model, width, use_bias=False, **kw)
        self.v = Linear(spec.d_model, width, use_bias=False, **kw)
        self.o = Linear(width, spec.d_model, use_bias=False, **kw)
        self.relative_attention_bias = (
            nnx.Embed(spec.relative_attention_num_buckets, spec.num_heads, **kw) if first else None
        )

    def __call__(self, x: Tokens, bias: Bias, mask: Mask) -> Tokens:
        heads = (*x.shape[:2], self.heads, -1)
        q, k, v = (project(x).reshape(heads) for project in (self.q, self.k, self.v))
        out = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=1.0)
        return self.o(out.reshape(*x.shape[:2], -1))


class DenseReluDense(nnx.Module):
    """wo(gelu(wi_0 x) * wi_1 x) (arXiv 2002.05202), gelu by its tanh approximation."""

    def __init__(self, spec: T5Spec, **kw: Unpack[Setting]):
        self.wi_0 = Linear(spec.d_model, spec.d_ff, use_bias=False, **kw)
        self.wi_1 = Linear(spec.d_model, spec.d_ff, use_bias=False, **kw)
        self.wo = Linear(spec.d_ff, spec.d_model, use_bias=False, **kw)

    def __call__(self, x: Tokens) -> Tokens:
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class AttentionLayer(nnx.Module):
    def __init__(self, spec: T5Spec, *, first: bool, **kw: Unpack[Setting]):
        self.SelfAttention = SelfAttention(spec, first=first, **kw)
        self.layer_norm = RMSNorm(spec.d_model, spec.layer_norm_epsilon, **kw)

    def __call__(self, x: Tokens, bias: Bias, mask: Mask) -> Tokens:
        return x + self.SelfAttention(self.layer_norm(x), bias, mask)


class FeedForwardLayer(nnx.Module):
    def __init__(self, spec: T5Spec, **kw: Unpack[Setting]):
        self.DenseReluDense = DenseReluDense(spec, **kw)
        self.layer_norm = RMSNorm(spec.d_model, spec.layer_norm_epsilon, **kw)

    def __call__(self, x: Tokens) -> Tokens:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nnx.Module):
    def __init__(self, spec: T5Spec, *, first: bool, **kw: Unpack[Setting]):
        self.layer: nnx.List = nnx.List([AttentionLayer(spec, first=first, **kw), FeedForwardLayer(spec, **kw)])

    def __call__(self, x: Tokens, bias: Bias, mask: Mask) -> Tokens:
        return self.layer[1](self.layer[0](x, bias, mask))


class Stack(nnx.Module):
    def __init__(self, spec: T5Spec, **kw: Unpack[Setting]):
        self.block = nnx.List([Block(spec, first=index == 0, **kw) for index in range(spec.num_layers)])
        self.final_layer_norm = RMSNorm(spec.d_model, spec.layer_norm_epsilon, **kw)

    def __call__(self, x: Tokens, bias: Bias, mask: Mask) -> Tokens:
        for block in self.block:
            x = block(x, bias, mask)
        return self.final_layer_norm(x)


class T5EncoderModel(nnx.Module):
    """Token ids [b, l] -> normed last hidden states [b, l, d_model]. No token attends to padding.

    Args:
        spec: sizes, from `T5Spec.from_config`.
        dtype: precision of the computation, float32 or bfloat16 (float16 overflows); parameters are float32.
    """

    def __init__(self, spec: T5Spec, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.spec = spec
        self.shared = nnx.Embed(spec.vocab_size, spec.d_model, dtype=dtype, rngs=rngs)
        self.encoder = Stack(spec, dtype=dtype, rngs=rngs)

    def __call__(self, ids: Int[Array | np.ndarray, "b l"]) -> Tokens:
        spec = self.spec
        buckets = relative_buckets(
            ids.shape[1], spec.relative_attention_num_buckets, spec.relative_attention_max_distance
        )
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        bias = table(jnp.asarray(buckets)).transpose(2, 0, 1)[None]
        mask = (jnp.asarray(ids) != spec.pad_token_id)[:, None, None]
        return self.encoder(self.shared(ids), bias, mask)
