"""UNet2DConditionModel: the denoiser of Stable Diffusion 1.x and 2.x (arXiv 2112.10752, section 3.3 and appendix B) and
of SDXL (arXiv 2307.01952, section 2)."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Real

from dreambooth_jax.models.layers import (
    Conv,
    Downsample2D,
    GroupNorm,
    Image,
    LayerNorm,
    Linear,
    ResnetBlock2D,
    Setting,
    Upsample2D,
)
from dreambooth_jax.models.remat import REMAT
from dreambooth_jax.models.spec import not_among, not_per_block, per_block, read_spec
from dreambooth_jax.ops.attention import attention

Tokens = Float[Array, "b l c"]


@dataclasses.dataclass(frozen=True)
class UNetSpec:
    """The implemented fields of unet/config.json. `attention_head_dim` is the number of heads: the format's
    historic misnomer, which every Stable Diffusion 1.x and 2.x file follows."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    only_cross_attention: bool | tuple[bool, ...] = False  # then self-attention, too, attends to the text
    num_class_embeds: int | None = None
    mid_block_type: str = "UNetMidBlock2DCrossAttn"  # "" for none
    addition_embed_type: str | None = None  # "text_time": pooled text and sizes join the time embedding
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    use_linear_projection: bool = False
    upcast_attention: bool = False  # always so here: see attention.attention

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "UNetSpec":
        """Raises UnsupportedConfig, naming the fields, for anything not implemented."""
        config = dict(config) | {"mid_block_type": config.get("mid_block_type", cls.mid_block_type) or ""}
        spec = read_spec(cls, config, _NEUTRAL, _problems, _AVERAGE)
        blocks = len(spec.block_out_channels)
        return dataclasses.replace(spec, **{name: per_block(getattr(spec, name), blocks) for name in _PER_BLOCK})

    @property
    def downscale(self) -> int:
        """Latent height and width must be multiples of this."""
        return 2 ** (len(self.block_out_channels) - 1)


_DOWN_TYPES = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP_TYPES = ("CrossAttnUpBlock2D", "UpBlock2D")
_PER_BLOCK = (
    "layers_per_block",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "attention_head_dim",
    "only_cross_attention",
)


def _problems(spec: UNetSpec) -> list[str]:
    types = not_among(
        spec,
        {
            "down_block_types": _DOWN_TYPES,
            "up_block_types": _UP_TYPES,
            "mid_block_type": (UNetSpec.mid_block_type, ""),
            "addition_embed_type": (None, "text_time"),
        },
    )
    if spec.addition_embed_type and not (spec.addition_time_embed_dim and spec.projection_class_embeddings_input_dim):
        types.append("addition_embed_type = 'text_time' (its addition_time_embed_dim or input_dim is absent)")
    names = ("down_block_types", "up_block_types", *_PER_BLOCK)
    return types + not_per_block(spec, names, len(spec.block_out_channels))


_NEUTRAL = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type_num_heads": (64,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0, 0.0),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1, 1.0),
    "num_attention_heads": (None,),
    "resnet_out_scale_factor": (1, 1.0),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


# Fields of diffusers' EMAModel, which it stores in the config of the averaged model.
_AVERAGE = ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")


def timestep_embedding(
    t: Real[Array, "b"], dim: int, *, flip_sin_to_cos: bool, freq_shift: float
) -> Float[Array, "b e"]:
    """Sinusoidal embedding of the timestep (arXiv 2006.11239), in float32."""
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([cos, sin] if flip_sin_to_cos else [sin, cos], -1)


def repeat_rows(x: Float[Array, "b *c"], others: Float[Array, "r *d"]) -> Float[Array, "r *c"]:
    """The rows of `x`, each repeated r / b times in a row, so that there are as many as of `others`."""
    times = len(others) // len(x)
    return x if times == 1 else jnp.repeat(x, times, axis=0)


class TimestepEmbedding(nnx.Module):
    def __init__(self, dim: int, out: int, **kw: Unpack[Setting]):
        self.linear_1 = Linear(dim, out, **kw)
        self.linear_2 = Linear(out, out, **kw)

    def __call__(self, x: Float[Array, "b e"]) -> Float[Array, "b t"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class Attention(nnx.Module):
    """Multi-head attention from `x` to `context`; queries, keys and values have no bias."""

    def __init__(self, channels: int, context_dim: int, heads: int, **kw: Unpack[Setting]):
        self.heads = heads
        self.to_q = Linear(channels, channels, use_bias=False, **kw)
        self.to_k = Linear(context_dim, channels, use_bias=False, **kw)
        self.to_v = Linear(context_dim, channels, use_bias=False, **kw)
        self.to_out = nnx.List([Linear(channels, channels, **kw)])

    def __call__(self, x: Tokens, context: Float[Array, "b k e"]) -> Tokens:
        q, k, v = (_split_heads(y, self.heads) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out[0](attention(q, k, v).reshape(x.shape))


def _split_heads(x: Tokens, heads: int) -> Float[Array, "b l n d"]:
    return x.reshape(*x.shape[:2], heads, -1)


class GEGLU(nnx.Module):
    """x * gelu(gate), both halves of one projection (arXiv 2002.05202)."""

    def __init__(self, channels: int, hidden: int, **kw: Unpack[Setting]):
        self.proj = Linear(channels, 2 * hidden, **kw)

    def __call__(self, x: Tokens) -> Float[Array, "b l h"]:
        hidden, gate = jnp.split(self.proj(x), 2, axis=-1)
        return hidden * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    def __init__(self, channels: int, **kw: Unpack[Setting]):
        # net.1 of the reference is dropout: it has no parameters, and its place in the list keeps the names.
        self.net = nnx.List([GEGLU(channels, 4 * channels, **kw), None, Linear(4 * channels, channels, **kw)])

    def __call__(self, x: Tokens) -> Tokens:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nnx.Module):
    """Self-attention (to the text states if `only_cross`), cross-attention to the text states, feed-forward; each
    pre-normed and residual."""

    def __init__(self, channels: int, context_dim: int, heads: int, *, only_cross: bool, **kw: Unpack[Setting]):
        self.only_cross = only_cross
        self.norm1 = LayerNorm(channels, 1e-5, **kw)
        self.attn1 = Attention(channels, context_dim if only_cross else channels, heads, **kw)
        self.norm2 = LayerNorm(channels, 1e-5, **kw)
        self.attn2 = Attention(channels, context_dim, heads, **kw)
        self.norm3 = LayerNorm(channels, 1e-5, **kw)
        self.ff = FeedForward(channels, **kw)

    def __call__(self, x: Tokens, context: Float[Array, "r k e"]) -> Float[Array, "r l c"]:
        x = repeat_rows(x, context) if self.only_cross else x
        normed = self.norm1(x)
        x = repeat_rows(x + self.attn1(normed, context if self.only_cross else normed), context)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the pixels of a feature map, between two projections."""

    def __init__(
        self,
        channels: int,
        context_dim: int,
        heads: int,
        depth: int,
        *,
        groups: int,
        linear: bool,
        only_cross: bool,
        **kw: Unpack[Setting],
    ):
        project = Linear if linear else lambda cin, cout, **kw: Conv(cin, cout, 1, **kw)
        self.norm = GroupNorm(channels, groups, 1e-6, **kw)
        self.proj_in = project(channels, channels, **kw)
        self.transformer_blocks = nnx.List(
            [BasicTransformerBlock(channels, context_dim, heads, only_cross=only_cross, **kw) for _ in range(depth)]
        )
        self.proj_out = project(channels, channels, **kw)

    def __call__(self, x: Image, context: Float[Array, "r k e"]) -> Float[Array, "r h w c"]:
        tokens = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        x = repeat_rows(x, context)
        return x + self.proj_out(tokens.reshape(x.shape))


class Stage(nnx.Module):
    """The residual blocks of one resolution, each followed by a transformer where the block type has one."""

    def __init__(
        self,
        channels_in: Sequence[int],
        channels: int,
        *,
        transformer: dict[str, Any] | None,
        resnet: dict[str, Any],
        down: bool = False,
        up: bool = False,
        **kw: Unpack[Setting],
    ):
        self.resnets = nnx.List([ResnetBlock2D(cin, channels, **resnet, **kw) for cin in channels_in])
        self.attentions = transformer and nnx.List(
            [Transformer2DModel(channels, **transformer, **kw) for _ in channels_in]
        )
        self.downsamplers = nnx.List([Downsample2D(channels, padding=1, **kw)]) if down else None
        self.upsamplers = nnx.List([Upsample2D(channels, **kw)]) if up else None

    def layers(self) -> Iterator[tuple[ResnetBlock2D, Transformer2DModel | None]]:
        """Arguments of `layer`."""
        return zip(self.resnets, self.attentions or itertools.repeat(None), strict=False)


def layer(
    resnet: ResnetBlock2D,
    attention: Transformer2DModel | None,
    x: Image,
    temb: Float[Array, "_b t"],
    context: Float[Array, "r k e"],
) -> Float[Array, "_r h w c"]:
    """The layer's result: a row for every row of `context` where there is attention, else for every row of `x`."""
    x = resnet(x, repeat_rows(temb, x))
    return x if attention is None else attention(x, context)


class MidBlock(nnx.Module):
    def __init__(self, channels: int, *, transformer: dict[str, Any], resnet: dict[str, Any], **kw: Unpack[Setting]):
        self.resnets = nnx.List([ResnetBlock2D(channels, channels, **resnet, **kw) for _ in range(2)])
        self.attentions = nnx.List([Transformer2DModel(channels, **transformer, **kw)])

    def __call__(self, x: Image, temb: Float[Array, "_b t"], context: Float[Array, "r k e"]) -> Float[Array, "r h w c"]:
        x = layer(self.resnets[0], self.attentions[0], x, temb, context)
        return layer(self.resnets[1], None, x, temb, context)


OUTER = 1  # layers of the way up that are computed anew where deep features of another step are given


class UNet2DConditionModel(nnx.Module):
    """Predicts the noise (or velocity) in latents `x` at timestep `t`, given text states.

    Args:
        spec: from `UNetSpec.from_config`.
        dtype: precision of the computation; parameters are float32.
        remat: results that the backward pass recomputes, a key of `REMAT`.
    """

    def __init__(self, spec: UNetSpec, *, dtype: DTypeLike = jnp.float32, remat: str = "nothing", rngs: nnx.Rngs):
        kw: Setting = {"dtype": dtype, "rngs": rngs}
        widths, groups = spec.block_out_channels, spec.norm_num_groups
        temb_dim = 4 * widths[0]
        resnet = {"groups": groups, "eps": spec.norm_eps, "temb_dim": temb_dim}

        def transformer(level: int) -> dict[str, Any]:
            return {
                "context_dim": spec.cross_attention_dim[level],
                "heads": spec.attention_head_dim[level],
                "depth": spec.transformer_layers_per_block[level],
                "linear": spec.use_linear_projection,
                "only_cross": spec.only_cross_attention[level],
                "groups": groups,
            }

        self.spec, self.dtype, self.remat = spec, dtype, remat
        self.conv_in = Conv(spec.in_channels, widths[0], 3, **kw)
        self.time_embedding = TimestepEmbedding(widths[0], temb_dim, **kw)
        self.class_embedding = nnx.Embed(spec.num_class_embeds, temb_dim, **kw) if spec.num_class_embeds else None
        added = spec.projection_class_embeddings_input_dim
        self.add_embedding = TimestepEmbedding(added, temb_dim, **kw) if spec.addition_embed_type else None

        last = len(widths) - 1
        skips = [widths[0]]
        self.down_blocks: nnx.List = nnx.List([])
        for level, width in enumerate(widths):
            layers = spec.layers_per_block[level]
            cross = spec.down_block_types[level].startswith("CrossAttn")
            block = Stage(
                [skips[-1]] + [width] * (layers - 1),
                width,
                transformer=transformer(level) if cross else None,
                resnet=resnet,
                down=level < last,
                **kw,
            )
            skips += [width] * (layers + (level < last))
            self.down_blocks.append(block)

        middle = transformer(last) | {"only_cross": False}  # as in the reference, whatever the config says
        self.mid_block = MidBlock(widths[-1], transformer=middle, resnet=resnet, **kw) if spec.mid_block_type else None

        below = widths[-1]
        self.up_blocks: nnx.List = nnx.List([])
        for position, kind in enumerate(spec.up_block_types):
            level = last - position
            width = widths[level]
            channels_in = []
            for _ in range(spec.layers_per_block[level] + 1):
                channels_in.append(below + skips.pop())
                below = width
            inside = transformer(level) if kind.startswith("CrossAttn") else None
            self.up_blocks.append(Stage(channels_in, width, transformer=inside, resnet=resnet, up=level > 0, **kw))

        self.conv_norm_out = GroupNorm(widths[0], groups, spec.norm_eps, **kw)
        self.conv_out = Conv(widths[0], spec.out_channels, 3, **kw)

    def __call__(
        self,
        x: Float[Array, "b h w in"],
        t: Real[Array, "b"] | Real[Array, ""],
        context: Float[Array, "r l e"],
        level: Int[Array, "b"] | None = None,
        pooled: Float[Array, "b p"] | None = None,
        sizes: Float[Array, "b s"] | None = None,
    ) -> Float[Array, "r h w out"]:
        """The prediction, like `x`, for every text.

        Args:
            x: noisy latents.
            t: timesteps in [0, T), whole or fractional.
            context: text states; several for a row of `x` follow one another. What lies before the first
                cross-attention is then computed once for all of them.
            level: timestep of the noise on the low-resolution picture; None without `spec.num_class_embeds`.
            pooled, sizes: text embedding and size numbers that join the embedding of time, with
                `spec.addition_embed_type` "text_time".

        Raises:
            ValueError: height or width is no multiple of `spec.downscale`; the number of texts is no multiple of the
                number of inputs; or `level` is absent.
        """
        return self.with_deep(None, x, t, context, level, pooled, sizes)[0]

    def with_deep(
        self,
        deep: Float[Array, "r _h _w c"] | None,
        x: Float[Array, "b h w in"],
        t: Real[Array, "b"] | Real[Array, ""],
        context: Float[Array, "r l e"],
        level: Int[Array, "b"] | None = None,
        pooled: Float[Array, "b p"] | None = None,
        sizes: Float[Array, "b s"] | None = None,
    ) -> tuple[Float[Array, "r h w out"], Float[Array, "r _h _w c"]]:
        """The prediction, and the deep features: those that enter the last `OUTER` layers of the way up.

        Args:
            deep: deep features of an earlier step, which take the place of this step's; all but the outermost layers
                are then left out (DeepCache, arXiv 2312.00858, section 3.2). None for the whole pass.

        Further arguments and errors are those of a call.
        """
        if (level is None) != (self.class_embedding is None):
            raise ValueError(f"num_class_embeds = {self.spec.num_class_embeds}: noise level {level}")
        if x.shape[1] % self.spec.downscale or x.shape[2] % self.spec.downscale:
            raise ValueError(f"latents of {x.shape[1]}x{x.shape[2]}: both must be multiples of {self.spec.downscale}")
        if len(context) % len(x):
            raise ValueError(f"{len(context)} texts for {len(x)} noisy inputs: expected equally many for every input")
        temb = self._embedded_time(jnp.broadcast_to(t, x.shape[:1]), level, pooled, sizes)
        context = context.astype(self.dtype)
        way_down = self._way_down(x.astype(self.dtype), temb, context)
        if deep is None:
            skips = list(way_down)
            inner = skips[-1]
            if self.mid_block is not None:
                inner = REMAT[self.remat](MidBlock.__call__)(self.mid_block, inner, temb, context)
            deep = repeat_rows(self._way_up(inner, skips[OUTER:], temb, context, first=0), context)
            skips = skips[:OUTER]
        else:
            skips = list(itertools.islice(way_down, OUTER))
        x = self._way_up(deep, skips, temb, context, first=-OUTER)
        return self.conv_out(self.conv_norm_out(x, silu=True)), deep

    def _embedded_time(
        self,
        t: Real[Array, "b"],
        level: Int[Array, "b"] | None,
        pooled: Float[Array, "b p"] | None,
        sizes: Float[Array, "b s"] | None,
    ) -> Float[Array, "b t"]:
        """Embedding of time and of whatever joins it."""
        spec = self.spec
        embedded = timestep_embedding(
            t, spec.block_out_channels[0], flip_sin_to_cos=spec.flip_sin_to_cos, freq_shift=spec.freq_shift
        )
        temb = self.time_embedding(embedded.astype(self.dtype))
        if self.class_embedding is not None:
            temb = temb + self.class_embedding(level)
        if self.add_embedding is not None:
            temb = temb + self._added(pooled, sizes)
        return temb

    def _way_down(self, x: Image, temb: Float[Array, "b t"], context: Float[Array, "r l e"]) -> Iterator[Array]:
        """Yields the features of the way down, the outermost first; those that are not asked for are not computed."""
        compute, halved = REMAT[self.remat](layer), REMAT[self.remat](Downsample2D.__call__)
        x = self.conv_in(x)
        yield x
        for block in self.down_blocks:
            for modules in block.layers():
                x = compute(*modules, x, temb, context)
                yield x
            if block.downsamplers:
                x = halved(block.downsamplers[0], x)
                yield x

    def _way_up(
        self,
        x: Image,
        skips: Sequence[Array],
        temb: Float[Array, "_b t"],
        context: Float[Array, "_r l e"],
        *,
        first: int,
    ) -> Array:
        """As many layers of the way up as there are `skips`, from number `first` on; the last skip joins the first."""
        compute, doubled = REMAT[self.remat](layer), REMAT[self.remat](Upsample2D.__call__)
        layers = [(block, modules) for block in self.up_blocks for modules in block.layers()]
        for (block, modules), skip in zip(layers[first:], reversed(skips), strict=False):
            x = compute(*modules, jnp.concatenate([x, repeat_rows(skip, x)], -1), temb, context)
            if block.upsamplers and modules[0] is block.resnets[-1]:
                x = doubled(block.upsamplers[0], x)
        return x

    def _added(self, pooled: Float[Array, "b p"], sizes: Float[Array, "b s"]) -> Float[Array, "b e"]:
        """Embedding of the pooled text and of every size number, as for time (arXiv 2307.01952, section 2.2)."""
        spec = self.spec
        embedded = timestep_embedding(
            sizes.reshape(-1),
            spec.addition_time_embed_dim,
            flip_sin_to_cos=spec.flip_sin_to_cos,
            freq_shift=spec.freq_shift,
        )
        both = jnp.concatenate([pooled.astype(jnp.float32), embedded.reshape(len(sizes), -1)], -1)
        return self.add_embedding(both.astype(self.dtype))
