"""What trains: a method is the choice of trainable parameters and how they join the frozen ones.

Loss, step, checkpoint and sampler know only `trainable`, `frozen` and `combine(frozen, trainable) -> params`.

* Full fine-tuning trains the base's own parameters.
* LoRA (arXiv 2106.09685, equation 3) leaves the base frozen and trains a low-rank difference of chosen kernels,
  W = W0 + (alpha / r) A B, with A [..., in, r] random, B [r, out] zero at the start, and r its rank.
"""

import re
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from dreambooth_jax.models.params import Params

METHODS = ("full", "lora")
Value = TypeVar("Value")


class Method(NamedTuple):
    """What distinguishes the methods.

    Attributes:
        shapes: (shapes of all parameters) -> (trainable, frozen) shapes.
        start: (all parameters, the run's key) -> (trainable, frozen) before the first step, shaped as `shapes` says;
            what is new lies where the key does.
        combine: (frozen, trainable) -> all parameters under their names.
        says: what trains, for a person.
    """

    shapes: Callable[[Params], tuple[Params, Params]]
    start: Callable[[Params, Key[Array, ""]], tuple[Params, Params]]
    combine: Callable[[Params, Params], Params]
    says: str


def make_method(config: ConfigDict) -> Method:
    """The method that the config names."""
    parts = r"^(unet|text_encoder)\." if config.train_text_encoder else r"^unet\."
    names = "the UNet and text encoder" if config.train_text_encoder else "the UNet"
    if config.method == "lora":
        return lora(parts, config.lora_targets, config.lora_rank, config.lora_alpha, names)
    return full(parts, names)


def full(pattern: str, names: str = "") -> Method:
    """Fine-tuning of the parameters in whose name the regex `pattern` is found."""
    divide = lambda params: split(params, pattern)  # noqa: E731
    return Method(divide, lambda params, key: divide(params), combine, f"full fine-tuning of {names}")


def split(params: Mapping[str, Value], pattern: str) -> tuple[dict[str, Value], dict[str, Value]]:
    """(trainable, frozen): the parameters whose name `pattern` is found in, and the others."""
    trainable = {name: value for name, value in params.items() if re.search(pattern, name)}
    return trainable, {name: value for name, value in params.items() if name not in trainable}


def combine(frozen: Params, trainable: Params) -> Params:
    """All parameters under their names: the trained ones in the places of the base's."""
    return frozen | trainable


def lora(parts: str, targets: str, rank: int, alpha: float, names: str = "") -> Method:
    """Low-rank differences of the kernels of the modules that match both regexes.

    Args:
        parts: found in the names of what may train.
        targets: found at the end of a module's name, such as r"\\.to_[qkv]".
        rank: r; no larger than the kernel's own is used.
        alpha: the difference is scaled by alpha / rank, so that the learning rate need not follow the rank.

    Raises:
        ValueError: from `shapes` and `start`, if no module matches.
    """

    def chosen(params: Mapping[str, Value]) -> dict[str, Value]:
        """Module name -> kernel."""
        kernels = {n.removesuffix(".kernel"): v for n, v in params.items() if n.endswith(".kernel")}
        found = {n: v for n, v in kernels.items() if re.search(parts, n) and re.search(f"(?:{targets})$", n)}
        if not found:
            some = ", ".join(list(kernels)[:3])
            raise ValueError(f"lora_targets = {targets!r}: no module's name ends like that; there are {some}, ...")
        return found

    def shapes(params: Params) -> tuple[Params, Params]:
        trainable = {}
        for module, kernel in chosen(params).items():
            *window, rows, columns = kernel.shape
            r = min(rank, rows, columns)
            trainable[f"{module}.lora_A.kernel"] = jax.ShapeDtypeStruct((*window, rows, r), jnp.float32)
            trainable[f"{module}.lora_B.kernel"] = jax.ShapeDtypeStruct((r, columns), jnp.float32)
        return trainable, dict(params)

    def start(params: Params, key: Key[Array, ""]) -> tuple[Params, Params]:
        wanted = shapes(params)[0]
        first = jax.jit(lambda key: {n: _first(n, x.shape, key) for n, x in wanted.items()}, out_shardings=key.sharding)
        return first(key), params

    def merge(frozen: Params, trainable: Params) -> Params:
        merged = dict(frozen)
        for name, b in trainable.items():
            if module := _module_of_b(name):
                kernel, a = f"{module}.kernel", trainable[f"{module}.lora_A.kernel"]
                merged[kernel] = frozen[kernel] + alpha / rank * (a @ b)
        return merged

    return Method(shapes, start, merge, f"LoRA of rank {rank} on {names}")


def lora_for_files(trainable: Params, *, rank: int, alpha: float) -> Params:
    """A LoRA as files have it that state no alpha, which readers then take for the rank: scaled by alpha / rank
    through B, and for convolutions with a 1x1 convolution for B."""
    for_files = {}
    for name, value in trainable.items():
        if module := _module_of_b(name):
            window = (1,) * (trainable[f"{module}.lora_A.kernel"].ndim - 2)
            value = alpha / rank * value.reshape(*window, *value.shape)
        for_files[name] = value
    return for_files


def _module_of_b(name: str) -> str | None:
    return name.removesuffix(".lora_B.kernel") if name.endswith(".lora_B.kernel") else None


def _first(name: str, shape: tuple[int, ...], key: Key[Array, ""]) -> Array:
    """B = 0, so that training starts at the base; A normal with standard deviation 1 / r, as in diffusers' scripts."""
    if name.endswith(".lora_B.kernel"):
        return jnp.zeros(shape)
    return jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), shape) / shape[-1]
