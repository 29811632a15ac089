"""Layers shared by the UNet and the autoencoder. Images are [batch, height, width, channels] inside."""

from collections.abc import Callable
from typing import TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dreambooth_jax.ops.channels import spread
from dreambooth_jax.ops.convolve import Given, Image, convolve
from dreambooth_jax.ops.group_norm import group_norm
from dreambooth_jax.ops.quantise import dequantise, product


class Setting(TypedDict):
    """Keywords that every layer takes: dtype of the computation (parameters are float32), random streams of the
    initialisers."""

    dtype: DTypeLike
    rngs: nnx.Rngs


class Linear(nnx.Module):
    """x W + b over the last axis, or with low-rank factors x W + (x A) B + b: see `adapted`."""

    def __init__(self, cin: int, cout: int, *, use_bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (cin, cout)))
        self.bias = nnx.Param(nnx.initializers.zeros_init()(rngs.params(), (cout,))) if use_bias else None
        self.factors: nnx.Dict | None = nnx.data(None)

    def __call__(self, x: Float[Array, "*b cin"]) -> Float[Array, "*b cout"]:
        y = adapted(self, jnp.matmul, x.astype(self.dtype))
        return y if self.bias is None else y + spread(self.bias.astype(self.dtype), y.shape)


class Conv(nnx.Module):
    """A square convolution, with low-rank factors if given (`adapted`); `padding` defaults to the one that keeps the
    size at stride 1."""

    def __init__(
        self,
        cin: int,
        cout: int,
        size: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.stride, self.padding = stride, (size - 1) // 2 if padding is None else padding
        self.dtype = dtype
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (size, size, cin, cout)))
        self.bias = nnx.Param(jnp.zeros(cout))
        self.factors: nnx.Dict | None = nnx.data(None)

    def __call__(self, x: Given) -> Image:
        def times(x: Image, kernel: Float[Array, "k k cin d"]) -> Image:
            if kernel.shape[0] == 1:
                return x @ kernel[0, 0]
            return convolve(x, kernel, self.stride, self.padding)

        y = adapted(self, times, jnp.asarray(x))
        return y + spread(self.bias.astype(self.dtype), y.shape)


def adapted(
    layer: Linear | Conv, times: Callable[[Array, Array], Array], x: Float[Array, "... cin"]
) -> Float[Array, "... cout"]:
    """x W with the layer's low-rank difference: x W + (x A) B (arXiv 2106.09685, equation 3), never forming A B.

    With a magnitude m (DoRA, arXiv 2402.09353, equation 5) that is scaled per output channel by m / |W + A B|.

    Args:
        layer: its `factors` are None or a selection of {"lora_A": A [..., cin, r], "lora_B": B [r, cout]}, scale folded
            into B, "lora_magnitude_vector": m [cout], and "int8": the steps of a kernel in eight bits (ops.quantise).
        times: (x, kernel) -> their product, matrix product or convolution.
        x: of the layer's dtype.
    """
    factors = {name: variable.get_value() for name, variable in (layer.factors or {}).items()}
    kernel, step = layer.kernel.get_value(), factors.get("int8")
    y = times(x, kernel.astype(layer.dtype)) if step is None else product(times, x, kernel, step)
    if "lora_A" not in factors:
        return y
    a, b = factors["lora_A"], factors["lora_B"]
    y = y + times(x, a.astype(layer.dtype)) @ b.astype(layer.dtype)
    if "lora_magnitude_vector" in factors:
        whole = kernel if step is None else dequantise(kernel, step)
        norm = jax.lax.stop_gradient(column_norms(whole, a, b))
        y = y * (factors["lora_magnitude_vector"] / norm).astype(layer.dtype)
    return y


def column_norms(
    kernel: Float[Array, "*k cin cout"], a: Float[Array, "*k cin r"], b: Float[Array, "r cout"]
) -> Float[Array, "cout"]:
    """|W + A B| per output channel, in float32: |W|^2 + 2 diag((W^T A) B) + diag(B^T (A^T A) B)."""
    w, a, b = (x.astype(jnp.float32).reshape(-1, x.shape[-1]) for x in (kernel, a, b))
    squared = jnp.square(w).sum(0) + 2 * ((a.T @ w) * b).sum(0) + (((a.T @ a) @ b) * b).sum(0)
    return jnp.sqrt(squared)


class GroupNorm(nnx.Module):
    """Group normalisation, with `silu` then SiLU (ops.group_norm)."""

    def __init__(self, channels: int, groups: int, eps: float, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.groups, self.eps, self.dtype = groups, eps, dtype
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Image, *, silu: bool = False) -> Image:
        scale, bias = self.scale.get_value(), self.bias.get_value()
        return group_norm(x, scale, bias, self.groups, self.eps, silu, self.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) scale + bias over the last axis (arXiv 1607.06450), statistics in float32."""

    def __init__(self, channels: int, eps: float, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.eps, self.dtype = eps, dtype
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        scale, bias = (spread(vector.get_value(), x.shape) for vector in (self.scale, self.bias))
        return (normed * scale + bias).astype(self.dtype)


class ResnetBlock2D(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + proj(silu(temb))))); `temb_dim` None leaves the time embedding out."""

    def __init__(
        self, cin: int, cout: int, *, groups: int, eps: float, temb_dim: int | None = None, **kw: Unpack[Setting]
    ):
        self.norm1 = GroupNorm(cin, groups, eps, **kw)
        self.conv1 = Conv(cin, cout, 3, **kw)
        self.time_emb_proj = None if temb_dim is None else Linear(temb_dim, cout, **kw)
        self.norm2 = GroupNorm(cout, groups, eps, **kw)
        self.conv2 = Conv(cout, cout, 3, **kw)
        self.conv_shortcut = Conv(cin, cout, 1, **kw) if cin != cout else None

    def __call__(self, x: Image, temb: Float[Array, "b e"] | None = None) -> Image:
        h = self.conv1(self.norm1(x, silu=True))
        if self.time_emb_proj is not None:
            h = h + spread(self.time_emb_proj(jax.nn.silu(temb)), h.shape)
        h = self.conv2(self.norm2(h, silu=True))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample2D(nnx.Module):
    """Stride-2 convolution; `padding` 0 pads below and to the right only, as the autoencoder does."""

    def __init__(self, channels: int, *, padding: int, **kw: Unpack[Setting]):
        self.symmetric = padding > 0
        self.conv = Conv(channels, channels, 3, stride=2, padding=padding, **kw)

    def __call__(self, x: Image) -> Image:
        return self.conv(x if self.symmetric else jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))))


class Upsample2D(nnx.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int, **kw: Unpack[Setting]):
        self.conv = Conv(channels, channels, 3, **kw)

    def __call__(self, x: Image) -> Image:
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))
