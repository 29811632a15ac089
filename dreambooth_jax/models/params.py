"""Flat params: the one currency of the library.

A model's parameters are a plain dict `{"down_blocks.0.resnets.1.conv1.kernel": array}`. Names are the module's
attribute path, and modules carry the attribute names of the files people have, so that reading, writing, freezing,
LoRA targets and sharding rules address one namespace. `functional` turns an `nnx.Module` into pure functions of such a
dict.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx

Params = dict[str, jax.Array]
Shapes = dict[str, jax.ShapeDtypeStruct]
# Params on the devices or on the host.
Tensors = Mapping[str, jax.Array | np.ndarray]
Shape = jax.Array | np.ndarray | jax.ShapeDtypeStruct
Value = TypeVar("Value")


class Functional(NamedTuple):
    """A module split into its parameter shapes and pure functions over flat params.

    Attributes:
        shapes: name -> ShapeDtypeStruct of every parameter.
        init: (key) -> flat params with the module's own initialisers, for training from scratch.
        apply: (flat params, *args, method="__call__") -> output. Beside `MODULE.kernel` the params may have factors,
            `MODULE.lora_A.kernel` and the like, which layers.Linear and layers.Conv take.
    """

    shapes: Shapes
    init: Callable[[jax.Array], Params]
    apply: Callable[..., Any]


class _OneKey(nnx.RngStream):
    """Returns the same key on every call. Shapes do not depend on it, and tracing nnx's call counter takes time
    quadratic in the number of parameters."""

    def __call__(self) -> jax.Array:
        return self.key[...]


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Splits the module that `build` makes, without allocating its parameters.

    Args:
        build: rngs -> module. The module holds only `nnx.Param`s: no dropout, no running statistics.
    """
    rngs: Any = nnx.Rngs(params=0)  # its streams are attributes
    rngs.params = _OneKey(0, tag="params")
    graph, state = nnx.split(nnx.eval_shape(lambda: build(rngs)))
    # Paths keep their integer list indices: as strings they would sort "10" before "2" and permute the layers.
    paths = {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(state)}
    shapes = {".".join(map(str, path)): jax.ShapeDtypeStruct(v.shape, v.dtype) for path, v in nnx.to_flat_state(state)}

    def init(key: jax.Array) -> Params:
        fresh = nnx.to_flat_state(nnx.state(build(nnx.Rngs(params=key))))
        return {".".join(map(str, path)): variable.get_value() for path, variable in fresh}

    def apply(params: Params, *args: Any, method: str = "__call__") -> Any:
        module = nnx.merge(graph, nnx.from_flat_state([(path, params[name]) for name, path in paths.items()]))
        _hand_factors(module, paths, {name: value for name, value in params.items() if name not in paths})
        return getattr(module, method)(*args)

    return Functional(shapes, init, apply)


def _hand_factors(module: nnx.Module, paths: Mapping[str, tuple], factors: Mapping[str, jax.Array]) -> None:
    """Gives each layer its factors: `MODULE.lora_A.kernel` becomes the module's `factors["lora_A"]`.

    Raises:
        KeyError: no layer that takes factors has that name.
    """
    by_layer: dict[str, dict[str, nnx.Param]] = {}
    for name, value in factors.items():
        layer, _, factor = name.rpartition(".")[0].rpartition(".")
        by_layer.setdefault(layer, {})[factor] = nnx.Param(value)
    for layer, named in by_layer.items():
        path = paths.get(f"{layer}.kernel", ())[:-1]
        owner = functools.reduce(
            lambda node, key: node[key] if isinstance(key, int) else getattr(node, key), path, module
        )
        if not hasattr(owner, "factors"):
            raise KeyError(f"{layer}: no linear layer or convolution takes its {', '.join(named)}")
        owner.factors = nnx.Dict(named)


def with_prefix(prefix: str, params: Mapping[str, Value]) -> dict[str, Value]:
    """`{"conv_in.bias": x}` -> `{"unet.conv_in.bias": x}` for prefix "unet."."""
    return {prefix + name: value for name, value in params.items()}


def under_prefix(prefix: str, params: Mapping[str, Value]) -> dict[str, Value]:
    """The entries whose name starts with `prefix`, without it: the inverse of `with_prefix`."""
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def count(params: Mapping[str, Shape]) -> int:
    """Number of scalars in all tensors."""
    return sum(value.size for value in params.values())
