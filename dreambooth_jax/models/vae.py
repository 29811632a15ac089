"""AutoencoderKL: images to latents and back (arXiv 2112.10752, section 3.1)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Unpack

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dreambooth_jax.models.layers import Conv, Downsample2D, GroupNorm, Image, ResnetBlock2D, Setting, Upsample2D
from dreambooth_jax.models.spec import not_among, not_per_block, read_spec
from dreambooth_jax.ops.attention import attention


@dataclasses.dataclass(frozen=True)
class VAESpec:
    """The implemented fields of vae/config.json. `scaling_factor` brings latents to unit variance."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "VAESpec":
        """Raises UnsupportedConfig, naming the fields, for anything not implemented."""
        return read_spec(cls, config, _NEUTRAL, _problems)

    @property
    def downscale(self) -> int:
        """Pixels per latent in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)


def _problems(spec: VAESpec) -> list[str]:
    types = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    return not_among(spec, types) + not_per_block(spec, tuple(types), len(spec.block_out_channels))


_NEUTRAL = {
    "act_fn": ("silu", "swish"),
    "force_upcast": (True, False),  # concerns float16 only, in which nothing is computed here
    "latents_mean": (None,),
    "latents_std": (None,),
    "shift_factor": (None, 0, 0.0),
}
_EPS = 1e-6


class AttentionBlock(nnx.Module):
    """Single-head self-attention over the pixels, residual."""

    def __init__(self, channels: int, groups: int, **kw: Unpack[Setting]):
        self.group_norm = GroupNorm(channels, groups, _EPS, **kw)
        self.to_q = nnx.Linear(channels, channels, **kw)
        self.to_k = nnx.Linear(channels, channels, **kw)
        self.to_v = nnx.Linear(channels, channels, **kw)
        self.to_out = nnx.List([nnx.Linear(channels, channels, **kw)])

    def __call__(self, x: Image) -> Image:
        tokens = self.group_norm(x).reshape(x.shape[0], -1, 1, x.shape[-1])
        out = attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](out).reshape(x.shape)


class MidBlock(nnx.Module):
    def __init__(self, channels: int, *, with_attention: bool, groups: int, **kw: Unpack[Setting]):
        resnet = {"groups": groups, "eps": _EPS, **kw}
        self.resnets = nnx.List([ResnetBlock2D(channels, channels, **resnet) for _ in range(2)])
        self.attentions = nnx.List([AttentionBlock(channels, groups, **kw)]) if with_attention else None

    def __call__(self, x: Image) -> Image:
        x = self.resnets[0](x)
        if self.attentions:
            x = self.attentions[0](x)
        return self.resnets[1](x)


class Stage(nnx.Module):
    def __init__(
        self,
        cin: int,
        cout: int,
        layers: int,
        *,
        groups: int,
        down: bool = False,
        up: bool = False,
        **kw: Unpack[Setting],
    ):
        widths = [cin] + [cout] * (layers - 1)
        self.resnets = nnx.List([ResnetBlock2D(width, cout, groups=groups, eps=_EPS, **kw) for width in widths])
        self.downsamplers = nnx.List([Downsample2D(cout, padding=0, **kw)]) if down else None
        self.upsamplers = nnx.List([Upsample2D(cout, **kw)]) if up else None

    def __call__(self, x: Image) -> Image:
        for block in (*self.resnets, *(self.downsamplers or ()), *(self.upsamplers or ())):
            x = block(x)
        return x


class Encoder(nnx.Module):
    def __init__(self, spec: VAESpec, **kw: Unpack[Setting]):
        widths, groups = spec.block_out_channels, spec.norm_num_groups
        self.conv_in = Conv(spec.in_channels, widths[0], 3, **kw)
        self.down_blocks: nnx.List = nnx.List([])
        for level, (cin, cout) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            down = level < len(widths) - 1
            self.down_blocks.append(Stage(cin, cout, spec.layers_per_block, groups=groups, down=down, **kw))
        self.mid_block = MidBlock(widths[-1], with_attention=spec.mid_block_add_attention, groups=groups, **kw)
        self.conv_norm_out = GroupNorm(widths[-1], groups, _EPS, **kw)
        self.conv_out = Conv(widths[-1], 2 * spec.latent_channels, 3, **kw)

    def __call__(self, x: Image) -> Image:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x), silu=True))


class Decoder(nnx.Module):
    def __init__(self, spec: VAESpec, **kw: Unpack[Setting]):
        widths, groups = spec.block_out_channels[::-1], spec.norm_num_groups
        self.conv_in = Conv(spec.latent_channels, widths[0], 3, **kw)
        self.mid_block = MidBlock(widths[0], with_attention=spec.mid_block_add_attention, groups=groups, **kw)
        self.up_blocks: nnx.List = nnx.List([])
        for level, (cin, cout) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            up = level < len(widths) - 1
            self.up_blocks.append(Stage(cin, cout, spec.layers_per_block + 1, groups=groups, up=up, **kw))
        self.conv_norm_out = GroupNorm(widths[-1], groups, _EPS, **kw)
        self.conv_out = Conv(widths[-1], spec.out_channels, 3, **kw)

    def __call__(self, z: Image) -> Image:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class AutoencoderKL(nnx.Module):
    """The autoencoder; latents here are unscaled (see `VAESpec.scaling_factor`).

    Args:
        spec: from `VAESpec.from_config`.
        dtype: of the computation; parameters are float32.
        decoder_dtype: of the decoder's; default: `dtype`.
    """

    def __init__(
        self,
        spec: VAESpec,
        *,
        dtype: DTypeLike = jnp.float32,
        decoder_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        kw: Setting = {"dtype": dtype, "rngs": rngs}
        of_decoder: Setting = {"dtype": decoder_dtype or dtype, "rngs": rngs}
        channels = spec.latent_channels
        self.spec, self.dtype, self.decoder_dtype = spec, dtype, of_decoder["dtype"]
        self.encoder = Encoder(spec, **kw)
        self.decoder = Decoder(spec, **of_decoder)
        self.quant_conv = Conv(2 * channels, 2 * channels, 1, **kw) if spec.use_quant_conv else None
        self.post_quant_conv = Conv(channels, channels, 1, **of_decoder) if spec.use_post_quant_conv else None

    def encode(self, x: Float[Array, "b h w p"]) -> tuple[Float[Array, "b lh lw c"], Float[Array, "b lh lw c"]]:
        """Pixels in [-1, 1] -> posterior mean and log variance of the latents.

        Raises:
            ValueError: height or width is no multiple of `spec.downscale`.
        """
        if x.shape[1] % self.spec.downscale or x.shape[2] % self.spec.downscale:
            raise ValueError(f"images of {x.shape[1]}x{x.shape[2]}: both must be multiples of {self.spec.downscale}")
        moments = self.encoder(x.astype(self.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z: Float[Array, "b lh lw c"]) -> Float[Array, "b h w p"]:
        """Latents -> pixels, nominally in [-1, 1] but not clipped."""
        z = z.astype(self.decoder_dtype)
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))
