"""What the backward pass computes again instead of keeping it: results of layers, and their parameters made whole."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.extend.core import Primitive, primitives

from dreambooth_jax.devices.sharding import divides_params, made_whole
from dreambooth_jax.ops import flash
from dreambooth_jax.ops.barriers import after

# A regex of the names of parameters in layers, without the prefix of the model.
LAYERS = r"(?:down_blocks|mid_block|up_blocks)\."
Layer = Callable[..., Any]


def _is_worth_its_room(primitive: Primitive, *factors: jax.core.ShapedArray, **params: Any) -> bool:
    """Whether to save this value for the backward pass: a matrix product or a convolution, except products larger than
    both of their factors (GEGLU's, scores of attention)."""
    if primitive is not primitives.dot_general_p:
        return primitive is primitives.conv_general_dilated_p
    product = jax.eval_shape(functools.partial(primitive.bind, **params), *factors)
    return product.size <= max(factor.size for factor in factors)


_DEAR = jax.checkpoint_policies.save_from_both_policies(
    _is_worth_its_room, jax.checkpoint_policies.save_only_these_names(flash.RESIDUALS)
)


def _recompute(layer: Layer) -> Layer:
    """`nnx.remat` of `layer`, a function of modules and arrays. Parameters are made whole inside it, so that the
    backward pass keeps the devices' shares (FSDP, arXiv 2304.11277, section 3.2): whole, those of IF-I-XL take 8 GiB.
    Modules should be the layer's alone: a parameter that it does not use gets a gradient of zeros."""

    @functools.wraps(layer)
    def on_whole_params(*args: Any) -> Any:
        if not divides_params():
            return layer(*args)
        arrays = [x for x in args if isinstance(x, jax.Array)]
        return layer(*(_whole(x, arrays) if isinstance(x, nnx.Module) else x for x in args))

    return nnx.remat(on_whole_params)


def _whole(module: nnx.Module, arrays: list[jax.Array]) -> nnx.Module:
    """The module with whole parameters, once `arrays` are known: the compiler would gather parameters far ahead."""
    graph, state = nnx.split(module)
    paths = {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(state)}
    shares = {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}
    values = made_whole(after(shares, arrays))
    return nnx.merge(graph, nnx.from_flat_state([(path, values[name]) for name, path in paths.items()]))


# Recomputed results -> transformation of a layer's function.
REMAT: dict[str, Callable[..., Layer]] = {
    "nothing": lambda layer: layer,
    "elementwise": functools.partial(nnx.remat, policy=_DEAR),
    "layers": _recompute,  # everything within a layer, its whole parameters too
}
