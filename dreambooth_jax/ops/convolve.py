"""A convolution whose gradients are fast on CPU too (see devices/workarounds.py, "convolution gradients")."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Height, width and channels may differ between argument and result. Constants of a program are numpy arrays.
Image = Float[Array, "b _h _w _c"]
Given = Float[Array | np.ndarray, "b _h _w _c"]
Kernel = Float[Array | np.ndarray, "_h _w _c _d"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: Given, kernel: Float[Array | np.ndarray, "k k c d"], stride: int, padding: int) -> Image:
    """A convolution padded by `padding` on every side, as PyTorch does."""
    return _convolve(x, kernel, stride, padding)


def _convolve(x: Given, kernel: Kernel, stride: int, padding: int) -> Image:
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, ((padding,) * 2,) * 2, dimension_numbers=dims)


def _input_gradient(kernel: Kernel, out: Given, stride: int, padding: int, shape: tuple[int, ...]) -> Image:
    x = jax.ShapeDtypeStruct(shape, out.dtype)
    return jax.linear_transpose(lambda x: _convolve(x, kernel, stride, padding), x)(out)[0]


def _kernel_gradient(x: Given, out: Given, stride: int, padding: int, shape: tuple[int, ...]) -> Array:
    kernel = jax.ShapeDtypeStruct(shape, out.dtype)
    return jax.linear_transpose(lambda kernel: _convolve(x, kernel, stride, padding), kernel)(out)[0]


# Gradients on CPU as plain stride-1 NHWC convolutions. XLA's own are ten times slower there inside loops and with
# strides.


def _input_gradient_on_cpu(kernel: Kernel, out: Given, stride: int, padding: int, shape: tuple[int, ...]) -> Image:
    size = kernel.shape[0]
    return _convolve(
        _dilate(out, stride, padding, size, shape), kernel[::-1, ::-1].swapaxes(2, 3), 1, size - 1 - padding
    )


def _kernel_gradient_on_cpu(x: Given, out: Given, stride: int, padding: int, shape: tuple[int, ...]) -> Array:
    out = _dilate(out, stride, padding, shape[0], x.shape)
    return _convolve(x.transpose(3, 1, 2, 0), out.transpose(1, 2, 0, 3), 1, padding).transpose(1, 2, 0, 3)


def _dilate(out: Given, stride: int, padding: int, size: int, shape: tuple[int, ...]) -> Image:
    """The results of a strided convolution of [b, h, w, c] `shape` at the places of stride 1, with zeros between."""
    full = [length + 2 * padding - size + 1 for length in shape[1:3]]
    gaps = [(0, whole - (part - 1) * stride - 1, stride - 1) for whole, part in zip(full, out.shape[1:3], strict=True)]
    return jax.lax.pad(out, jnp.zeros((), out.dtype), [(0, 0, 0), *gaps, (0, 0, 0)])


def _convolve_backward(stride: int, padding: int, saved: tuple[Given, Kernel], out: Given) -> tuple[Image, Array]:
    x, kernel = saved

    def by_platform(
        cpu: Callable[..., Array], default: Callable[..., Array], factor: Given | Kernel, shape: tuple[int, ...]
    ) -> Array:
        settings = {"stride": stride, "padding": padding, "shape": shape}
        cpu, default = (functools.partial(way, **settings) for way in (cpu, default))
        return jax.lax.platform_dependent(factor, out, cpu=cpu, default=default)

    return (
        by_platform(_input_gradient_on_cpu, _input_gradient, kernel, x.shape),
        by_platform(_kernel_gradient_on_cpu, _kernel_gradient, x, kernel.shape),
    )


convolve.defvjp(
    lambda x, kernel, stride, padding: (_convolve(x, kernel, stride, padding), (x, kernel)), _convolve_backward
)
