"""Numbers in 16 and 8 bits, rounded at random: up or down, so that the mean over steps is the number itself."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float32, Integer, UInt32

_ONE = np.uint32(0x3F800000)  # the float32 number 1
_DROPPED = 20  # bits of float32's mantissa of 23
_LEAST_BOUND = 2.0**-96  # so that s and 1 / s are finite


class EightBits(NamedTuple):
    """A tensor in eight bits.

    The code of a magnitude x is the upper part of the float32 number 1 + s x, less that of 1: three bits of mantissa,
    and four of the exponent beside a sign, five without one. The spacing is 1/16 to 1/8 of x, and 1/8 of 1 / s below
    that, down to 0. The code covers as many orders of magnitude as the table of arXiv 2110.02861 (section 1.3), by
    arithmetic alone. s is a power of two, so that numbers stay as they are when it changes. Any other s would round all
    of them anew in every step.

    Attributes:
        codes: in the tensor's own shape, to be placed like it; int8, or uint8 where there are no signs.
        bound: number that no magnitude exceeds. s times it is below 2^15, or 2^31 without signs, and above half that.
    """

    codes: Integer[Array, "..."]
    bound: Float32[Array, ""]


def in_eight_bits(
    x: Float32[Array, "..."], bound: Float32[Array, ""], bits: UInt32[Array, "..."], dtype: DTypeLike
) -> EightBits:
    """Codes of x, each one of the two next to it. In uint8 no number above 0 becomes 0: something is divided by it.

    Args:
        x: finite, of magnitudes up to `bound`; for uint8 at least 0.
        bits: random, of which the upper 20 are used.
    """
    magnitude = jnp.abs(x)
    exact = _bits(1 + magnitude * _scale(bound, dtype)) - _ONE
    codes = (exact + (bits >> (32 - _DROPPED))) >> _DROPPED
    if dtype == jnp.uint8:
        return EightBits(jnp.where(x > 0, jnp.maximum(codes, 1), codes).astype(dtype), bound)
    signed = codes.astype(jnp.int32)
    return EightBits(jnp.where(x < 0, -signed, signed).astype(dtype), bound)


def from_eight_bits(held: EightBits) -> Float32[Array, "..."]:
    """The numbers that the codes stand for."""
    codes, unit = held.codes.astype(jnp.int32), 1 / _scale(held.bound, held.codes.dtype)
    magnitude = (_float((jnp.abs(codes).astype(jnp.uint32) << _DROPPED) + _ONE) - 1) * unit
    return jnp.where(codes < 0, -magnitude, magnitude)


def _scale(bound: Float32[Array, ""], dtype: DTypeLike) -> Float32[Array, ""]:
    """The s of `EightBits` for a bound: a power of two, made of the bound's exponent."""
    octaves = 30 if dtype == jnp.uint8 else 14
    return _float((np.uint32(254 + octaves) - (_bits(jnp.maximum(bound, _LEAST_BOUND)) >> 23)) << 23)


def in_bfloat16(x: Float32[Array, "..."], bits: UInt32[Array, "..."]) -> BFloat16[Array, "..."]:
    """One of the two bfloat16 numbers next to each element.

    A bfloat16 number is the upper half of a float32 number: 16 random bits are added to the lower half, whose carry
    rounds up.

    Args:
        x: finite, at least 0.
        bits: random, of which the upper 16 are used.
    """
    return jax.lax.bitcast_convert_type(((_bits(x) + (bits >> 16)) >> 16).astype(jnp.uint16), jnp.bfloat16)


def random_bits(shape: tuple[int, ...], step: Integer[Array, ""], number: int) -> UInt32[Array, "..."]:
    """32 bits for every element: the hashes of its indices, of the step and of the tensor, added and mixed. They are
    computed where the element is, on any number of devices, and are never stored.

    Those of the indices are vectors, so that few operations are left for an element.

    Args:
        step: number of the update. Every update has bits of its own.
        number: of the tensor. Every tensor has bits of its own.
    """
    total = _mixed(step.astype(jnp.uint32) * np.uint32(0x9E3779B1) + np.uint32(number))
    for axis, size in enumerate(shape):
        index = jnp.arange(size, dtype=jnp.uint32) + np.uint32(axis * 0x3C6EF372)
        total += _mixed(index).reshape(-1, *(1,) * (len(shape) - axis - 1))
    return (total ^ (total >> 15)) * np.uint32(0x2C1B3C6D)


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finaliser of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)


def _bits(x: Float32[Array, "..."]) -> UInt32[Array, "..."]:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _float(bits: UInt32[Array, "..."]) -> Float32[Array, "..."]:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
