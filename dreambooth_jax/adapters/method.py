"""A method: the choice of trainable parameters, and how they join the frozen ones.

Loss, step, checkpoint and sampler know only `trainable`, `frozen` and `combine(frozen, trainable) -> params`.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from jaxtyping import Array, Key

from dreambooth_jax.models.params import Params, Shape, Shapes, Tensors

Value = TypeVar("Value", bound=Shape)


class Method(NamedTuple):
    """A training method.

    Attributes:
        shapes: (shapes of all parameters) -> (trainable, frozen) shapes.
        start: (all parameters, the run's key) -> (trainable, frozen) before the first step, of the shapes that `shapes`
            gives. New arrays have the key's sharding.
        combine: (frozen, trainable) -> the parameters that models take, under their names.
        says: description of the trainable parameters for a person.
        adapter: (trainable) -> the parameters of an adapter file, any scale multiplied in; None if the method trains
            the base's own parameters.
        multiplier: trainable parameter's name -> factor on its learning rate.
        decays: trainable parameter's name -> whether weight decay applies; None if it applies to all.
    """

    shapes: Callable[[Shapes], tuple[Shapes, Shapes]]
    start: Callable[[Params, Key[Array, ""]], tuple[Params, Params]]
    combine: Callable[[Params, Params], Params]
    says: str
    adapter: Callable[[Tensors], Tensors] | None = None
    multiplier: Callable[[str], float] = lambda name: 1.0
    decays: Callable[[str], bool] | None = None


def full(pattern: str, names: str = "") -> Method:
    """Fine-tuning of the base's own parameters in whose name the regex `pattern` is found."""
    divide = lambda params: split(params, pattern)  # noqa: E731
    return Method(divide, lambda params, key: divide(params), combine, f"full fine-tuning of {names}")


def split(params: Mapping[str, Value], pattern: str) -> tuple[dict[str, Value], dict[str, Value]]:
    """(trainable, frozen): the parameters whose name `pattern` is found in, and the others."""
    trainable = {name: value for name, value in params.items() if re.search(pattern, name)}
    return trainable, {name: value for name, value in params.items() if name not in trainable}


def combine(frozen: Params, trainable: Params) -> Params:
    """All parameters under their names, the trainable ones in the places of the base's."""
    return frozen | trainable
