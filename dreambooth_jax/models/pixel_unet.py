"""The UNets of DeepFloyd IF: denoisers of pixels after Imagen (arXiv 2205.11487), `UNet2DConditionModel` of diffusers
with its simple cross-attention.

Against models/unet.py: the embedding of time scales and shifts the second norm of every residual block; resolution
changes inside residual blocks; one attention follows a residual block, over its pixels and the text at once, without
feed-forward; the pooled text joins the embedding of time. A super-resolution stage takes the low-resolution picture as
three more channels and the level of the noise on it as a second time.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Real

from dreambooth_jax.models.layers import Conv, GroupNorm, Image, LayerNorm, Linear, Setting
from dreambooth_jax.models.remat import REMAT
from dreambooth_jax.models.spec import not_among, not_per_block, per_block, read_spec
from dreambooth_jax.models.unet import timestep_embedding
from dreambooth_jax.ops.attention import attention
from dreambooth_jax.ops.channels import spread

Tokens = Float[Array, "b l c"]
ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class PixelUNetSpec:
    """The implemented fields of unet/config.json. `attention_head_dim` is here the width of a head."""

    sample_size: int = 64
    in_channels: int = 3
    out_channels: int = 6
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3
    up_block_types: tuple[str, ...] = ("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    attention_head_dim: int = 8
    only_cross_attention: bool | tuple[bool, ...] = False
    mid_block_only_cross_attention: bool | None = None
    mid_block_scale_factor: float = 1.0
    resnet_out_scale_factor: float = 1.0
    resnet_skip_time_act: bool = False
    time_embedding_act_fn: str | None = None
    time_embedding_dim: int | None = None
    class_embed_type: str | None = None
    encoder_hid_dim: int = 0
    addition_embed_type_num_heads: int = 64

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "PixelUNetSpec":
        """Raises UnsupportedConfig, naming the fields, for anything not implemented."""
        spec = read_spec(cls, _REFERENCE_DEFAULTS | dict(config), _NEUTRAL, _problems)
        blocks, only = len(spec.block_out_channels), spec.only_cross_attention
        middle = spec.mid_block_only_cross_attention
        if middle is None:
            middle = only if isinstance(only, bool) else False
        whole = {name: per_block(getattr(spec, name), blocks) for name in _PER_BLOCK}
        return dataclasses.replace(spec, mid_block_only_cross_attention=middle, **whole)

    @property
    def downscale(self) -> int:
        """Height and width must be multiples of this."""
        return 2 ** (len(self.block_out_channels) - 1)


_PER_BLOCK = ("layers_per_block", "only_cross_attention")
_DOWN_TYPES = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
_UP_TYPES = ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D")


def _problems(spec: PixelUNetSpec) -> list[str]:
    allowed = {
        "down_block_types": _DOWN_TYPES,
        "up_block_types": _UP_TYPES,
        "act_fn": tuple(ACTIVATIONS),
        "class_embed_type": (None, "timestep"),
        "time_embedding_act_fn": (None, *ACTIVATIONS),
    }
    problems = not_among(spec, allowed)
    for name in ("attention_head_dim", "cross_attention_dim"):
        if not isinstance(getattr(spec, name), int):
            problems.append(f"{name} = {getattr(spec, name)!r} (implemented: one number for all blocks)")
    if not spec.encoder_hid_dim:
        problems.append("encoder_hid_dim = None (it needs the width of the text states)")
    return problems + not_per_block(
        spec, ("down_block_types", "up_block_types", *_PER_BLOCK), len(spec.block_out_channels)
    )


# The reference's defaults, for absent fields of which only another value is implemented.
_REFERENCE_DEFAULTS = {
    "addition_embed_type": None,
    "cross_attention_norm": None,
    "encoder_hid_dim_type": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_time_scale_shift": "default",
}
_NEUTRAL = {
    "addition_embed_type": ("text",),
    "addition_time_embed_dim": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": ("group_norm",),
    "downsample_padding": (1,),
    "dropout": (0, 0.0),
    "dual_cross_attention": (False,),
    "encoder_hid_dim_type": ("text_proj",),
    "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "projection_class_embeddings_input_dim": (None,),
    "resnet_time_scale_shift": ("scale_shift",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),
    "upcast_attention": (False, True),  # always so here: see attention.attention
    "use_linear_projection": (False, True),  # there are no transformers
}
_CROSS_NORM_GROUPS = 32  # the reference's constant, whatever `norm_num_groups` is


class TimestepEmbedding(nnx.Module):
    def __init__(self, dim: int, out: int, act: str, **kw: Unpack[Setting]):
        self.act = act
        self.linear_1 = Linear(dim, out, **kw)
        self.linear_2 = Linear(out, out, **kw)

    def __call__(self, x: Float[Array, "b e"]) -> Float[Array, "b t"]:
        return self.linear_2(ACTIVATIONS[self.act](self.linear_1(x)))


class AttentionPooling(nnx.Module):
    """One vector of a text: attention from the mean of its states, plus a learnt vector, to all of them and itself."""

    def __init__(self, channels: int, heads: int, **kw: Unpack[Setting]):
        self.heads = heads
        self.positional_embedding = nnx.Param(
            nnx.initializers.normal(channels**-0.5)(kw["rngs"].params(), (1, channels))
        )
        self.q_proj = Linear(channels, channels, **kw)
        self.k_proj = Linear(channels, channels, **kw)
        self.v_proj = Linear(channels, channels, **kw)

    def __call__(self, x: Tokens) -> Float[Array, "b c"]:
        mean = x.mean(1, keepdims=True) + self.positional_embedding.astype(x.dtype)
        tokens = jnp.concatenate([mean, x], 1)
        q, k, v = (_split_heads(y, self.heads) for y in (self.q_proj(mean), self.k_proj(tokens), self.v_proj(tokens)))
        return attention(q, k, v).reshape(len(x), -1)


class TextTimeEmbedding(nnx.Module):
    """The pooled text as a summand of the embedding of time. Padding takes part, as in the reference."""

    def __init__(self, text_dim: int, out: int, heads: int, **kw: Unpack[Setting]):
        self.norm1 = LayerNorm(text_dim, 1e-5, **kw)
        self.pool = AttentionPooling(text_dim, heads, **kw)
        self.proj = Linear(text_dim, out, **kw)
        self.norm2 = LayerNorm(out, 1e-5, **kw)

    def __call__(self, text: Tokens) -> Float[Array, "b t"]:
        return self.norm2(self.proj(self.pool(self.norm1(text))))


def _split_heads(x: Tokens, heads: int) -> Float[Array, "b l n d"]:
    return x.reshape(*x.shape[:2], heads, -1)


def halve(x: Image) -> Image:
    """Mean of 2x2 pixels."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def double(x: Image) -> Image:
    """Each pixel four times."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def keep(x: Image) -> Image:
    return x


class ResnetBlock2D(nnx.Module):
    """(shortcut(resize(x)) + conv(act(norm(conv(resize(act(norm(x))))) (1 + scale) + shift))) / divisor, where scale
    and shift are a projection of the embedding of time.

    Args:
        resize: `halve`, `double` or `keep`.
        act: name of the activation.
        skip_time_act: whether the embedding of time is activated already.
        divisor: number by which the sum is divided.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        *,
        temb_dim: int,
        groups: int,
        eps: float,
        act: str,
        skip_time_act: bool,
        divisor: float = 1.0,
        resize: Callable[[Image], Image] = keep,
        **kw: Unpack[Setting],
    ):
        self.act, self.resize, self.skip_time_act, self.divisor = act, resize, skip_time_act, divisor
        self.norm1 = GroupNorm(cin, groups, eps, **kw)
        self.conv1 = Conv(cin, cout, 3, **kw)
        self.time_emb_proj = Linear(temb_dim, 2 * cout, **kw)
        self.norm2 = GroupNorm(cout, groups, eps, **kw)
        self.conv2 = Conv(cout, cout, 3, **kw)
        self.conv_shortcut = Conv(cin, cout, 1, **kw) if cin != cout else None

    def __call__(self, x: Image, temb: Float[Array, "b t"]) -> Image:
        act = ACTIVATIONS[self.act]
        h = self.conv1(self.resize(act(self.norm1(x))))
        time = self.time_emb_proj(temb if self.skip_time_act else act(temb))
        scale, shift = (spread(part, h.shape) for part in jnp.split(time, 2, axis=-1))
        h = self.conv2(act(self.norm2(h) * (1 + scale) + shift))
        x = self.resize(x)
        return ((x if self.conv_shortcut is None else self.conv_shortcut(x)) + h) / self.divisor


class AddedKVAttention(nnx.Module):
    """Attention of the pixels to the text and, unless `only_cross`, to each other, residual.

    The norm of the text takes its statistics over all tokens: texts must have the length of training, 77.
    """

    def __init__(
        self, channels: int, text_dim: int, head_dim: int, *, groups: int, only_cross: bool, **kw: Unpack[Setting]
    ):
        self.heads = channels // head_dim
        self.group_norm = GroupNorm(channels, groups, 1e-5, **kw)
        self.norm_cross = GroupNorm(text_dim, _CROSS_NORM_GROUPS, 1e-5, **kw)
        self.to_q = Linear(channels, channels, **kw)
        self.to_k = None if only_cross else Linear(channels, channels, **kw)
        self.to_v = None if only_cross else Linear(channels, channels, **kw)
        self.add_k_proj = Linear(text_dim, channels, **kw)
        self.add_v_proj = Linear(text_dim, channels, **kw)
        self.to_out = nnx.List([Linear(channels, channels, **kw)])

    def __call__(self, x: Image, text: Tokens) -> Image:
        text = self.norm_cross(text[:, None])[:, 0]
        pixels = self.group_norm(x).reshape(len(x), -1, x.shape[-1])
        k, v = self.add_k_proj(text), self.add_v_proj(text)
        if self.to_k is not None:
            k = jnp.concatenate([k, self.to_k(pixels)], 1)
            v = jnp.concatenate([v, self.to_v(pixels)], 1)
        q, k, v = (_split_heads(y, self.heads) for y in (self.to_q(pixels), k, v))
        return x + self.to_out[0](attention(q, k, v).reshape(pixels.shape)).reshape(x.shape)


class Stage(nnx.Module):
    """The residual blocks of one resolution, each followed by an attention where the block type has one."""

    def __init__(
        self,
        channels_in: Sequence[int],
        channels: int,
        *,
        attend: dict[str, Any] | None,
        resnet: dict[str, Any],
        down: bool = False,
        up: bool = False,
        **kw: Unpack[Setting],
    ):
        self.resnets = nnx.List([ResnetBlock2D(cin, channels, **resnet, **kw) for cin in channels_in])
        self.attentions = attend and nnx.List([AddedKVAttention(channels, **attend, **kw) for _ in channels_in])
        resized = {**resnet, **kw}
        self.downsamplers = nnx.List([ResnetBlock2D(channels, channels, resize=halve, **resized)]) if down else None
        self.upsamplers = nnx.List([ResnetBlock2D(channels, channels, resize=double, **resized)]) if up else None

    def layers(self) -> Iterator[tuple[ResnetBlock2D, AddedKVAttention | None]]:
        """Arguments of `layer`."""
        return zip(self.resnets, self.attentions or itertools.repeat(None), strict=False)


def layer(resnet: ResnetBlock2D, attention: AddedKVAttention | None, x: Image, temb: Array, text: Tokens) -> Image:
    x = resnet(x, temb)
    return x if attention is None else attention(x, text)


class MidBlock(nnx.Module):
    def __init__(self, channels: int, *, attend: dict[str, Any], resnet: dict[str, Any], **kw: Unpack[Setting]):
        self.resnets = nnx.List([ResnetBlock2D(channels, channels, **resnet, **kw) for _ in range(2)])
        self.attentions = nnx.List([AddedKVAttention(channels, **attend, **kw)])

    def __call__(self, x: Image, temb: Array, text: Tokens) -> Image:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, temb), text), temb)


class PixelUNet(nnx.Module):
    """Predicts the noise in pixels `x` at timestep `t` and how its variance lies between its bounds, given text states.

    Args:
        spec: sizes, from `PixelUNetSpec.from_config`.
        dtype: precision of the computation; parameters are float32.
        remat: results that the backward pass recomputes, a key of `REMAT`.
    """

    def __init__(self, spec: PixelUNetSpec, *, dtype: DTypeLike = jnp.float32, remat: str = "nothing", rngs: nnx.Rngs):
        kw: Setting = {"dtype": dtype, "rngs": rngs}
        widths, groups, last = spec.block_out_channels, spec.norm_num_groups, len(spec.block_out_channels) - 1
        temb_dim = spec.time_embedding_dim or 4 * widths[0]
        common = {
            "temb_dim": temb_dim,
            "groups": groups,
            "eps": spec.norm_eps,
            "act": spec.act_fn,
            "skip_time_act": spec.resnet_skip_time_act,
        }
        resnet = common | {"divisor": spec.resnet_out_scale_factor}

        def attend(only_cross: bool) -> dict[str, Any]:
            sizes = {"text_dim": spec.cross_attention_dim, "head_dim": spec.attention_head_dim}
            return sizes | {"groups": groups, "only_cross": only_cross}

        self.spec, self.dtype, self.remat = spec, dtype, remat
        self.conv_in = Conv(spec.in_channels, widths[0], 3, **kw)
        self.time_embedding = TimestepEmbedding(widths[0], temb_dim, spec.act_fn, **kw)
        self.class_embedding = (
            TimestepEmbedding(widths[0], temb_dim, spec.act_fn, **kw) if spec.class_embed_type else None
        )
        self.add_embedding = TextTimeEmbedding(spec.encoder_hid_dim, temb_dim, spec.addition_embed_type_num_heads, **kw)
        self.encoder_hid_proj = Linear(spec.encoder_hid_dim, spec.cross_attention_dim, **kw)

        skips = [widths[0]]
        self.down_blocks: nnx.List = nnx.List([])
        for level, width in enumerate(widths):
            layers = spec.layers_per_block[level]
            cross = spec.down_block_types[level].startswith("Simple")
            inside = attend(spec.only_cross_attention[level]) if cross else None
            cins = [skips[-1]] + [width] * (layers - 1)
            self.down_blocks.append(Stage(cins, width, attend=inside, resnet=resnet, down=level < last, **kw))
            skips += [width] * (layers + (level < last))

        self.mid_block = MidBlock(
            widths[-1],
            attend=attend(spec.mid_block_only_cross_attention),
            resnet=common | {"divisor": spec.mid_block_scale_factor},
            **kw,
        )

        below = widths[-1]
        self.up_blocks: nnx.List = nnx.List([])
        for position, kind in enumerate(spec.up_block_types):
            level = last - position
            width = widths[level]
            cins = []
            for _ in range(spec.layers_per_block[level] + 1):
                cins.append(below + skips.pop())
                below = width
            inside = attend(spec.only_cross_attention[level]) if kind.startswith("Simple") else None
            self.up_blocks.append(Stage(cins, width, attend=inside, resnet=resnet, up=level > 0, **kw))

        self.conv_norm_out = GroupNorm(widths[0], groups, spec.norm_eps, **kw)
        self.conv_out = Conv(widths[0], spec.out_channels, 3, **kw)

    def embedding(self, t: Real[Array, "b"], text: Tokens, level: Float[Array, "b"] | None) -> Float[Array, "b t"]:
        """The sum of the embeddings of time, of the text and, in a super-resolution stage, of the noise level."""
        spec = self.spec

        def sinusoid(t: Array) -> Array:
            embedded = timestep_embedding(
                t, spec.block_out_channels[0], flip_sin_to_cos=spec.flip_sin_to_cos, freq_shift=spec.freq_shift
            )
            return embedded.astype(self.dtype)

        temb = self.time_embedding(sinusoid(t)) + self.add_embedding(text)
        if self.class_embedding is not None:
            temb = temb + self.class_embedding(sinusoid(level))
        return temb if spec.time_embedding_act_fn is None else ACTIVATIONS[spec.time_embedding_act_fn](temb)

    def __call__(
        self,
        x: Float[Array, "b h w in"],
        t: Real[Array, "b"] | Real[Array, ""],
        text: Float[Array, "b l e"],
        level: Float[Array, "b"] | None = None,
    ) -> Float[Array, "b h w out"]:
        """The predicted noise and, in the further channels, the interpolation of its variance.

        Args:
            x: noisy pixels; in a super-resolution stage, the enlarged low-resolution picture behind them.
            t: timesteps in [0, T).
            text: states of all tokens with their padding.
            level: timestep of the noise on the low-resolution picture; None for a stage without one.

        Raises:
            ValueError: height or width is no multiple of `spec.downscale`, or `level` is absent.
        """
        spec = self.spec
        if x.shape[1] % spec.downscale or x.shape[2] % spec.downscale:
            raise ValueError(f"pictures of {x.shape[1]}x{x.shape[2]}: both must be multiples of {spec.downscale}")
        if (level is None) != (self.class_embedding is None):
            raise ValueError(f"class_embed_type = {spec.class_embed_type!r}: noise level {level}")
        recompute = REMAT[self.remat]
        compute, mid = recompute(layer), recompute(MidBlock.__call__)
        resize = recompute(ResnetBlock2D.__call__)
        text = text.astype(self.dtype)
        temb = self.embedding(jnp.broadcast_to(t, x.shape[:1]), text, level)
        text = self.encoder_hid_proj(text)

        x = self.conv_in(x.astype(self.dtype))
        skips = [x]
        for block in self.down_blocks:
            for modules in block.layers():
                x = compute(*modules, x, temb, text)
                skips.append(x)
            if block.downsamplers:
                x = resize(block.downsamplers[0], x, temb)
                skips.append(x)
        x = mid(self.mid_block, x, temb, text)
        for block in self.up_blocks:
            for modules in block.layers():
                x = compute(*modules, jnp.concatenate([x, skips.pop()], -1), temb, text)
            if block.upsamplers:
                x = resize(block.upsamplers[0], x, temb)
        return self.conv_out(ACTIVATIONS[spec.act_fn](self.conv_norm_out(x)))
