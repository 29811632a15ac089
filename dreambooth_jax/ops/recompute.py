"""Gradients computed twice instead of being held.

Clipping by the global norm needs every gradient before the first parameter may move, so all of them wait: 1.6 GiB in
bfloat16 for the UNet of Stable Diffusion. But a kernel's gradient is a product, dW = x^T dy, and at low resolutions its
two factors are far smaller than it is: 128 rows of 1280 channels for 1280 x 1280 weights. So the product is computed
once for the norm, and once more where the optimizer uses it; in between only the factors stay. (Norms of single
examples without their gradients are known as ghost clipping, arXiv 2110.05679; this is the ordinary norm, exactly.)

A function is traced, and its equations are carried out one by one, to know which of them made its results.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.extend.core import JaxprEqn, Literal, primitives
from jaxtyping import Array

_PRODUCTS = (primitives.dot_general_p, primitives.conv_general_dilated_p)
# What lies between a product and the gradient that it becomes.
_SHAPING = (
    primitives.broadcast_in_dim_p, primitives.convert_element_type_p, primitives.reshape_p, primitives.squeeze_p,
    primitives.transpose_p,
)  # fmt: skip


class _Origin(NamedTuple):
    """The equation that made a value, and from which values."""

    equation: JaxprEqn
    inputs: list[Array]
    value: Array  # kept, so that its id stays its own


def recompute_gradients(function: Callable) -> Callable:
    """Builds `run(*args) -> (function(*args), again)`, inside a jitted function.

    `again(value, after)` computes `value`, an array in the result, a second time, once the array `after` is known; None
    where it is no product, or one of factors that together are larger than it.
    """

    def run(*args):
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        origins: dict[int, _Origin] = {}
        results = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args), origins)

        def again(value: Array, after: Array) -> Array | None:
            return _again(value, after, origins)

        return jax.tree.unflatten(jax.tree.structure(shapes), results), again

    return run


def _evaluate(jaxpr, consts, args, origins: dict[int, _Origin]) -> list[Array]:
    """The results of `jaxpr`; where they and all values between come from is written to `origins`."""
    values = dict(zip(jaxpr.constvars + jaxpr.invars, [*consts, *args], strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        with equation.ctx.manager, jax.named_scope(str(equation.source_info.name_stack)):
            outputs = _carry_out(equation, inputs, origins)
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _carry_out(equation: JaxprEqn, inputs: list[Array], origins: dict[int, _Origin]) -> list[Array]:
    if equation.primitive is primitives.remat_p:  # jax.checkpoint: products of the backward pass stand inside
        if equation.params["differentiated"] and equation.params["prevent_cse"]:
            held = jax.lax.optimization_barrier(inputs)
            origins |= {
                id(new): origins[id(old)]._replace(value=new)
                for old, new in zip(inputs, held, strict=True)
                if id(old) in origins
            }
            inputs = held
        return _evaluate(equation.params["jaxpr"], (), inputs, origins)
    outputs = _bind(equation, inputs)
    origins |= {id(value): _Origin(equation, inputs, value) for value in outputs}
    return outputs


def _bind(equation: JaxprEqn, inputs: list[Array]) -> list[Array]:
    primitive = equation.primitive
    outputs = primitive.bind(*inputs, **primitive.get_bind_params(equation.params))
    return outputs if primitive.multiple_results else [outputs]


def _again(value: Array, after: Array, origins: dict[int, _Origin]) -> Array | None:
    shaping, origin = [], origins.get(id(value))
    while origin is not None and origin.equation.primitive in _SHAPING:
        shaping.append(origin.equation)
        origin = origins.get(id(origin.inputs[0]))
    if origin is None or not _is_product(origin.equation):
        return None
    *platform, x, dy = origin.inputs
    if x.size + dy.size >= value.size:
        return None
    # Behind a barrier: the compiler would take the first result, and hold it.
    x, dy, _ = jax.lax.optimization_barrier((x, dy, after))
    outputs = _bind(origin.equation, [*platform, x, dy])
    for equation in reversed(shaping):
        outputs = _bind(equation, outputs)
    return outputs[0]


def _is_product(equation: JaxprEqn) -> bool:
    """Of two factors: itself one, or a choice by platform between ways to compute one."""
    if equation.primitive is primitives.cond_p:
        inner = [inside for branch in equation.params["branches"] for inside in branch.jaxpr.eqns]
        return len(equation.invars) == 3 and any(_is_product(inside) for inside in inner)
    return equation.primitive in _PRODUCTS
