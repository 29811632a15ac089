"""Layers shared by the UNet and the autoencoder. Images are [batch, height, width, channels] inside."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Image = Float[Array, "b h w c"]


def conv(cin: int, cout: int, size: int, *, stride: int = 1, padding: int | None = None, **kw) -> nnx.Conv:
    """A square convolution padded as PyTorch does: `padding` on every side (default: keeps the size at stride 1)."""
    pad = (size - 1) // 2 if padding is None else padding
    return nnx.Conv(cin, cout, (size, size), strides=stride, padding=((pad, pad), (pad, pad)), **kw)


class GroupNorm(nnx.Module):
    """Group normalisation (arXiv 1803.08494), statistics in float32, two-pass variance as in PyTorch."""

    def __init__(self, channels: int, groups: int, eps: float, *, dtype, rngs: nnx.Rngs):
        self.groups, self.eps, self.dtype = groups, eps, dtype
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Image) -> Image:
        b, h, w, c = x.shape
        grouped = x.astype(jnp.float32).reshape(b, h * w, self.groups, c // self.groups)
        mean = grouped.mean((1, 3), keepdims=True)
        variance = jnp.square(grouped - mean).mean((1, 3), keepdims=True)
        normed = ((grouped - mean) * jax.lax.rsqrt(variance + self.eps)).reshape(b, h, w, c)
        return (normed * self.scale + self.bias).astype(self.dtype)


def attention(
    query: Float[Array, "b q n d"], key: Float[Array, "b k n d"], value: Float[Array, "b k n d"], *, causal: bool = False
) -> Float[Array, "b q n d"]:
    """softmax(QK^T / sqrt(d)) V, scores and softmax in float32 (so that `upcast_attention` always holds)."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=causal)


class ResnetBlock2D(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + proj(silu(temb))))); `temb_dim` None leaves the time embedding out."""

    def __init__(self, cin: int, cout: int, *, groups: int, eps: float, temb_dim: int | None = None, **kw):
        self.norm1 = GroupNorm(cin, groups, eps, **kw)
        self.conv1 = conv(cin, cout, 3, **kw)
        self.time_emb_proj = None if temb_dim is None else nnx.Linear(temb_dim, cout, **kw)
        self.norm2 = GroupNorm(cout, groups, eps, **kw)
        self.conv2 = conv(cout, cout, 3, **kw)
        self.conv_shortcut = conv(cin, cout, 1, **kw) if cin != cout else None

    def __call__(self, x: Image, temb: Float[Array, "b e"] | None = None) -> Image:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(jax.nn.silu(temb))[:, None, None]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample2D(nnx.Module):
    """Stride-2 convolution; `padding` 0 pads below and to the right only, as the autoencoder does."""

    def __init__(self, channels: int, *, padding: int, **kw):
        self.symmetric = padding > 0
        self.conv = conv(channels, channels, 3, stride=2, padding=padding, **kw)

    def __call__(self, x: Image) -> Image:
        return self.conv(x if self.symmetric else jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))))


class Upsample2D(nnx.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int, **kw):
        self.conv = conv(channels, channels, 3, **kw)

    def __call__(self, x: Image) -> Image:
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))
