"""The forms of a difference to a kernel, and the parameters that hold it: `MODULE.FACTOR.LEAF` beside `MODULE.kernel`.

| form | factors | difference |
|---|---|---|
| LoRA (arXiv 2106.09685) | lora_A [..., in, r], lora_B [r, out] | A B |
| DoRA (arXiv 2402.09353) | and lora_magnitude_vector m [out] | m (W + A B) / norm(W + A B) - W, per output channel |
| LoHa (arXiv 2108.06098) | hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b | (w1_a w1_b) * (w2_a w2_b) |
| LoKr (arXiv 2309.14859) | lokr_w1, lokr_w2, or either as w_a w_b | w1 (Kronecker product) w2 |
| full | diff | diff |

LoHa's and LoKr's factors have the layout of PyTorch and of the files, [out, in, h, w], with r between; `hada_t1`,
`hada_t2` and `lokr_t2` [r, r, h, w] are the cores of a Tucker decomposition of a convolution.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dreambooth_jax.models.params import Tensors, Value

LORA_A, LORA_B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"
INPUT_MAGNITUDE = "lora_input_magnitude"  # of files that normalise per input channel; not trained
_FACTOR = re.compile(
    r"^(.*)\.(lora_A|lora_B|lora_magnitude_vector|lora_input_magnitude|hada_\w+|lokr_\w+|diff)\.(\w+)$"
)


class Form(NamedTuple):
    """A form of low-rank difference, as it is trained.

    Attributes:
        zero: the factor that is zero at the start, so that training starts at the base.
        scaled: the factor that carries the scale.
        deviation: factor -> standard deviation at the start; that of the others is 1 / r.
    """

    zero: str
    scaled: str
    deviation: Mapping[str, float]


# A normal with deviation 1 / r as in diffusers' scripts, LoHa's as in LyCORIS.
FORMS: dict[str, Form] = {
    "lora": Form(LORA_B, LORA_B, {}),
    "dora": Form(LORA_B, LORA_B, {}),
    "loha": Form("hada_w2_a", "hada_w1_a", {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_b": 1.0}),
    "lokr": Form("lokr_w2", "lokr_w1", {}),
}


def parse(name: str) -> tuple[str, str, str] | None:
    """(module, factor, leaf) of a factor's name, None for a name of the base."""
    found = _FACTOR.match(name)
    return (found[1], found[2], found[3]) if found else None


def by_module(params: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """Module -> {"FACTOR.LEAF": value} of the factors among `params`."""
    found: dict[str, dict[str, Value]] = {}
    for name, value in params.items():
        if parts := parse(name):
            module, factor, leaf = parts
            found.setdefault(module, {})[f"{factor}.{leaf}"] = value
    return found


def shapes(form: str, kernel: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    """ "FACTOR.LEAF" -> shape, for a kernel [..., in, out] and a rank no larger than the kernel's own."""
    *window, rows, columns = kernel
    if form in ("lora", "dora"):
        magnitude = {f"{MAGNITUDE}.scale": (columns,)} if form == "dora" else {}
        return {f"{LORA_A}.kernel": (*window, rows, rank), f"{LORA_B}.kernel": (rank, columns)} | magnitude
    if form == "loha":
        a, b = (columns, rank), (rank, rows * math.prod(window))
        return {"hada_w1_a.weight": a, "hada_w1_b.weight": b, "hada_w2_a.weight": a, "hada_w2_b.weight": b}
    (rows_1, rows_2), (columns_1, columns_2) = _two_factors(rows), _two_factors(columns)
    first: dict[str, tuple[int, ...]] = {"lokr_w1.weight": (columns_1, rows_1)}
    if 2 * rank >= max(rows_2, columns_2):  # two factors would be larger than their product
        return first | {"lokr_w2.weight": (columns_2, rows_2, *window)}
    return first | {"lokr_w2_a.weight": (columns_2, rank), "lokr_w2_b.weight": (rank, rows_2 * math.prod(window))}


def _two_factors(size: int) -> tuple[int, int]:
    """(a, b), a b = size, a <= b, as near to each other as can be."""
    a = next(a for a in range(math.isqrt(size), 0, -1) if size % a == 0)
    return a, size // a


def rank_of(factors: Tensors) -> int:
    """The rank by which a file's alpha is divided: 1 alone for a LoKr of which nothing is factored (then alpha is
    ignored by every reader), the inner size of w2 where both are factored."""
    for name, axis in (("lora_B.kernel", 0), ("hada_w1_b.weight", 0), ("lokr_w2_b.weight", 0), ("lokr_w1_b.weight", 0)):
        if name in factors:
            return factors[name].shape[axis]
    return 1


def difference(
    kernel: Float[Array | np.ndarray, "*k cin cout"], factors: Tensors
) -> Float[Array | np.ndarray, "*k cin cout"]:
    """The difference to `kernel` that a module's factors make, their scale already in them."""
    plain = _plain_difference(kernel, factors)
    if f"{MAGNITUDE}.scale" in factors:
        return _with_norm(kernel + plain, factors[f"{MAGNITUDE}.scale"], -1) - kernel
    if f"{INPUT_MAGNITUDE}.scale" in factors:
        return _with_norm(kernel + plain, factors[f"{INPUT_MAGNITUDE}.scale"], -2) - kernel
    return plain


def _with_norm(kernel: Array | np.ndarray, magnitude: Array | np.ndarray, axis: int) -> Array | np.ndarray:
    """`kernel` scaled so that its norm over all axes but `axis` is `magnitude`."""
    others = tuple(i for i in range(kernel.ndim) if i != axis % kernel.ndim)
    norm = jnp.sqrt(jnp.square(kernel).sum(others, keepdims=True))
    return kernel / norm * jnp.expand_dims(magnitude, [i for i in range(kernel.ndim) if i in others])


def _plain_difference(kernel: Array | np.ndarray, factors: Tensors) -> Array | np.ndarray:
    if "diff.kernel" in factors:
        return factors["diff.kernel"]
    if "lora_B.kernel" in factors:
        return factors["lora_A.kernel"] @ factors["lora_B.kernel"]
    named = {name.removesuffix(".weight"): value for name, value in factors.items()}
    if "hada_w1_a" in named:
        first, second = (_product(named, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
        whole = first.reshape(*first.shape[:2], -1) * second.reshape(*second.shape[:2], -1)
    else:
        first = named["lokr_w1"] if "lokr_w1" in named else _product(named, "lokr_w1_a", "lokr_w1_b")
        second = named["lokr_w2"] if "lokr_w2" in named else _product(named, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
        second = second.reshape(second.shape[0], kernel.shape[-2] // first.shape[1], -1)
        whole = jnp.einsum("ab,cdx->acbdx", first, second)
    *window, rows, columns = kernel.shape
    return jnp.moveaxis(whole.reshape(columns, rows, *window), (0, 1), (-1, -2))


def _product(named: Tensors, a: str, b: str, core: str = "") -> Array | np.ndarray:
    """a b, or with a Tucker core t [p, q, h, w] the sum over p and q of a[p, out] b[q, in] t."""
    if core not in named:
        return named[a] @ named[b]
    return jnp.einsum("pqhw,po,qi->oihw", named[core], named[a], named[b])


def merge(params: Tensors) -> dict[str, Array | np.ndarray]:
    """The plain parameters of a model: every difference among `params` is added to its parameter."""
    return add({name: value for name, value in params.items() if not parse(name)}, params)


def add(base: Tensors, factors: Tensors, weight: float = 1.0) -> dict[str, Array | np.ndarray]:
    """`base` with `weight` times the differences that the `factors` make to it; weight 0 is the base exactly.

    Raises:
        KeyError: a factor's module is not in the base.
    """
    changed = {}
    for module, named in by_module(factors).items():
        for leaf in ("bias", "scale", "embedding"):
            if f"diff.{leaf}" in named:
                changed[f"{module}.{leaf}"] = base[f"{module}.{leaf}"] + weight * named[f"diff.{leaf}"]
        if set(named) - {"diff.bias", "diff.scale", "diff.embedding"}:
            kernel = base[f"{module}.kernel"]
            changed[f"{module}.kernel"] = kernel + weight * difference(kernel, named)
    return {**base, **changed}
