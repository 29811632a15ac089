"""Gradients computed a second time instead of being kept.

Clipping by the global norm needs every gradient before the first parameter is updated, so all gradients are kept until
the norm is known: 1.6 GiB in bfloat16 for the UNet of Stable Diffusion. But a kernel's gradient is a product,
dW = x^T dy, and at low resolutions its two factors are far smaller than the product: 128 rows of 1280 channels for
1280 x 1280 weights. The product is therefore computed once for the norm and once for the optimizer, and only the
factors are kept in between. (Norms of single examples without their gradients are known as ghost clipping, arXiv
2110.05679; this is the ordinary norm, exactly.)

The function is traced, and its equations are evaluated one by one, to find the equation of each result.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from absl import logging
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var, primitives
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from dreambooth_jax.ops.barriers import after

_PRODUCTS = (primitives.dot_general_p, primitives.conv_general_dilated_p)
# Operations between a product and the gradient.
_SHAPING = (
    primitives.broadcast_in_dim_p,
    primitives.convert_element_type_p,
    primitives.reshape_p,
    primitives.squeeze_p,
    primitives.transpose_p,
)
Again = Callable[[Array, Array], Array | None]


class _Origin(NamedTuple):
    """The equation of a value, and its inputs."""

    equation: JaxprEqn
    inputs: list[ArrayLike]
    value: Array  # kept, so that no other value gets its id


def recompute_gradients(function: Callable[..., PyTree]) -> Callable[..., tuple[PyTree, Again]]:
    """Builds `run(*args) -> (function(*args), again)`, inside a jitted function.

    `again(value, known)` computes `value`, an array in the result, a second time, once the array `known` is known. It
    returns None where the value is not a product, or its factors together are not smaller than it.
    """

    def run(*args: PyTree) -> tuple[PyTree, Again]:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        origins: dict[int, _Origin] = {}
        try:
            results = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args), origins)
        except (AttributeError, KeyError) as error:  # of JAX's internals, which another release may name differently
            logging.warning("gradients are kept, not recomputed: this release of JAX is not known (%r)", error)
            return function(*args), lambda value, known: None

        def again(value: Array, known: Array) -> Array | None:
            return _again(value, known, origins)

        return jax.tree.unflatten(jax.tree.structure(shapes), results), again

    return run


def _evaluate(
    jaxpr: Jaxpr, consts: Sequence[ArrayLike], args: Sequence[ArrayLike], origins: dict[int, _Origin]
) -> list[ArrayLike]:
    """The results of `jaxpr`. The origins of these and of all intermediate values are written to `origins`."""
    values = dict(zip(jaxpr.constvars + jaxpr.invars, [*consts, *args], strict=True))

    def read(atom: Var | Literal) -> ArrayLike:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        with equation.ctx.manager, jax.named_scope(str(equation.source_info.name_stack)):
            outputs = _carry_out(equation, inputs, origins)
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _carry_out(equation: JaxprEqn, inputs: list[ArrayLike], origins: dict[int, _Origin]) -> list[ArrayLike]:
    if equation.primitive is primitives.remat_p:  # jax.checkpoint, which holds products of the backward pass
        if equation.params["differentiated"] and equation.params["prevent_cse"]:
            held = after(inputs)
            origins |= {
                id(new): origins[id(old)]._replace(value=new)
                for old, new in zip(inputs, held, strict=True)
                if id(old) in origins
            }
            inputs = held
        return _evaluate(equation.params["jaxpr"], (), inputs, origins)
    outputs = _bind(equation, inputs)
    origins |= {id(value): _Origin(equation, inputs, value) for value in outputs}
    return list(outputs)


def _bind(equation: JaxprEqn, inputs: list[ArrayLike]) -> list[Array]:
    primitive = equation.primitive
    outputs = primitive.bind(*inputs, **primitive.get_bind_params(equation.params))
    return outputs if primitive.multiple_results else [outputs]


def _again(value: Array, known: Array, origins: dict[int, _Origin]) -> Array | None:
    shaping, origin = [], origins.get(id(value))
    while origin is not None and origin.equation.primitive in _SHAPING:
        shaping.append(origin.equation)
        origin = origins.get(id(origin.inputs[0]))
    if origin is None or not _is_product(origin.equation):
        return None
    *platform, x, dy = origin.inputs
    if x.size + dy.size >= value.size:
        return None
    x, dy = after((x, dy), known)
    outputs = _bind(origin.equation, [*platform, x, dy])
    for equation in reversed(shaping):
        outputs = _bind(equation, outputs)
    return outputs[0]


def _is_product(equation: JaxprEqn) -> bool:
    """Whether the equation is a product of two factors, or a choice by platform between ways to compute one."""
    if equation.primitive is primitives.cond_p:
        inner = [inside for branch in equation.params["branches"] for inside in branch.jaxpr.eqns]
        return len(equation.invars) == 3 and any(_is_product(inside) for inside in inner)
    return equation.primitive in _PRODUCTS
