"""CLIPTextModel: the text encoder of Stable Diffusion (arXiv 2103.00020, section 2.4)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, Unpack, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dreambooth_jax.models.layers import LayerNorm, Linear, Setting
from dreambooth_jax.models.spec import not_among, read_spec
from dreambooth_jax.ops.attention import attention

Tokens = Float[Array, "b l c"]


@dataclasses.dataclass(frozen=True)
class CLIPTextSpec:
    """The implemented fields of text_encoder/config.json."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512  # width of the pooled embedding, where a model has one

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "CLIPTextSpec":
        """Raises UnsupportedConfig, naming the fields, for anything not implemented."""
        ignored = {name: (config.get(name),) for name in _WITHOUT_EFFECT}
        return read_spec(cls, config, _NEUTRAL | ignored, _problems, _OF_GENERATION)

    @property
    def max_length(self) -> int:
        """Tokens that the model reads."""
        return self.max_position_embeddings


def _problems(spec: CLIPTextSpec) -> list[str]:
    return not_among(spec, {"hidden_act": sorted(ACTIVATIONS)})


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, 0.0),
    "dropout": (0, 0.0),
    "use_attention_mask": (False,),
    "model_type": ("clip_text_model",),
    "add_cross_attention": (False,),
    "is_decoder": (False,),
    "pruned_heads": ({},),
}
# Special token ids concern pooling, which Stable Diffusion does not use; the rest is bookkeeping of the file's writer.
_WITHOUT_EFFECT = [
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "initializer_factor",
    "initializer_range",
    "transformers_version",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "id2label",
    "label2id",
    "problem_type",
    "tie_word_embeddings",
]


# Defaults of text generation, which older transformers wrote into every config.
_OF_GENERATION = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "prefix",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torchscript",
    "typical_p",
    "use_bfloat16",
)


def quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}


@runtime_checkable
class TowerSpec(Protocol):
    """Sizes of a residual tower: those of CLIPTextSpec and CLIPVisionSpec."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float


class Embeddings(nnx.Module):
    def __init__(self, spec: CLIPTextSpec, **kw: Unpack[Setting]):
        self.token_embedding = nnx.Embed(spec.vocab_size, spec.hidden_size, **kw)
        self.position_embedding = nnx.Embed(spec.max_position_embeddings, spec.hidden_size, **kw)

    def __call__(self, ids: Int[Array | np.ndarray, "b l"]) -> Tokens:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class SelfAttention(nnx.Module):
    def __init__(self, channels: int, heads: int, causal: bool, **kw: Unpack[Setting]):
        self.heads, self.causal = heads, causal
        self.q_proj = Linear(channels, channels, **kw)
        self.k_proj = Linear(channels, channels, **kw)
        self.v_proj = Linear(channels, channels, **kw)
        self.out_proj = Linear(channels, channels, **kw)

    def __call__(self, x: Tokens) -> Tokens:
        heads = (*x.shape[:2], self.heads, -1)
        q, k, v = (project(x).reshape(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, causal=self.causal).reshape(x.shape))


class MLP(nnx.Module):
    def __init__(self, channels: int, hidden: int, activation: str, **kw: Unpack[Setting]):
        self.activation = ACTIVATIONS[activation]
        self.fc1 = Linear(channels, hidden, **kw)
        self.fc2 = Linear(hidden, channels, **kw)

    def __call__(self, x: Tokens) -> Tokens:
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nnx.Module):
    def __init__(self, spec: TowerSpec, causal: bool, **kw: Unpack[Setting]):
        self.layer_norm1 = LayerNorm(spec.hidden_size, spec.layer_norm_eps, **kw)
        self.self_attn = SelfAttention(spec.hidden_size, spec.num_attention_heads, causal, **kw)
        self.layer_norm2 = LayerNorm(spec.hidden_size, spec.layer_norm_eps, **kw)
        self.mlp = MLP(spec.hidden_size, spec.intermediate_size, spec.hidden_act, **kw)

    def __call__(self, x: Tokens) -> Tokens:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The residual tower that CLIP's text and image models share. `spec` has the sizes, `causal` masks the future."""

    def __init__(self, spec: TowerSpec, *, causal: bool, **kw: Unpack[Setting]):
        self.layers = nnx.List([EncoderLayer(spec, causal, **kw) for _ in range(spec.num_hidden_layers)])

    def __call__(self, x: Tokens) -> Tokens:
        return self.layers[-1](self.before_last(x))

    def before_last(self, x: Tokens) -> Tokens:
        """The penultimate hidden states: those that the last layer is given."""
        for index in range(len(self.layers) - 1):
            x = self.layers[index](x)
        return x


class TextTransformer(nnx.Module):
    def __init__(self, spec: CLIPTextSpec, **kw: Unpack[Setting]):
        self.embeddings = Embeddings(spec, **kw)
        self.encoder = Encoder(spec, causal=True, **kw)
        self.final_layer_norm = LayerNorm(spec.hidden_size, spec.layer_norm_eps, **kw)

    def __call__(self, ids: Int[Array | np.ndarray, "b l"]) -> Tokens:
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))


class CLIPTextModel(nnx.Module):
    """Token ids [b, l], l <= max_position_embeddings -> normed last hidden states [b, l, hidden_size].

    Stable Diffusion 2.x conditions on the penultimate layer: its folders hold one layer less, so the last state is it.
    """

    def __init__(self, spec: CLIPTextSpec, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.text_model = TextTransformer(spec, dtype=dtype, rngs=rngs)

    def __call__(self, ids: Int[Array | np.ndarray, "b l"]) -> Tokens:
        return self.text_model(ids)

    def penultimate(self, ids: Int[Array | np.ndarray, "b l"]) -> Tokens:
        """Hidden states that the last layer is given, without the final norm."""
        return self.text_model.encoder.before_last(self.text_model.embeddings(ids))


class CLIPTextModelWithProjection(nnx.Module):
    """Token ids [b, l] and positions of the end tokens [b] -> penultimate hidden states [b, l, hidden_size], without
    the final norm, and the projected states of the end tokens [b, projection_dim]."""

    def __init__(self, spec: CLIPTextSpec, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.text_model = TextTransformer(spec, dtype=dtype, rngs=rngs)
        self.text_projection = Linear(spec.hidden_size, spec.projection_dim, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self, ids: Int[Array | np.ndarray, "b l"], end: Int[Array | np.ndarray, "b"]
    ) -> tuple[Tokens, Float[Array, "b p"]]:
        encoder = self.text_model.encoder
        states = encoder.before_last(self.text_model.embeddings(ids))
        last = self.text_model.final_layer_norm(encoder.layers[-1](states))
        return states, self.text_projection(last[jnp.arange(len(ids)), end])
