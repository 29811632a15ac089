"""LoRA and its relatives as training methods: the base stays frozen, chosen kernels get a trainable low-rank difference
(adapters.factors).

LoRA's and DoRA's factors stay factors: beside `MODULE.kernel` the layer finds `MODULE.lora_A.kernel` and
`MODULE.lora_B.kernel` and computes x W + (x A) B (models.layers.adapted). LoHa and LoKr have no such form: `combine`
adds their differences to the kernels.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from dreambooth_jax.adapters.factors import FORMS, LORA_B, MAGNITUDE, by_module, merge, parse, shapes
from dreambooth_jax.adapters.method import Method, Value
from dreambooth_jax.adapters.quantised import whole
from dreambooth_jax.models.layers import column_norms
from dreambooth_jax.models.params import Params, Shapes, Tensors

# Modules that get a difference: regexes for the end of the module's name.
TARGETS = {
    "cross": r"\.attn2\.(to_[qkv]|to_out\.0)",
    "attention": r"to_[qkv]|to_out\.0|[qkv]_proj|out_proj",
    "transformer": r"to_[qkv]|to_out\.0|[qkv]_proj|out_proj|ff\.net\.(0\.proj|2)|proj_in|proj_out|mlp\.fc[12]",
    "all": r"(?:blocks?|layers)\..*",  # every layer of the blocks: not the first, the last and the time embedding's
}
Ranks = Sequence[tuple[str, int, float]]


def lora(
    parts: str,
    targets: str,
    rank: int,
    alpha: float,
    names: str = "",
    *,
    form: str = "lora",
    ranks: Ranks = (),
    stabilized: bool = False,
    ratio: float = 1.0,
) -> Method:
    """Low-rank differences of the kernels of the modules that match both regexes.

    Args:
        parts: regex found in the names of the parameters that may train.
        targets: key of `TARGETS`, or regex for the end of a module's name, such as r"\\.to_[qkv]".
        rank: r.
        alpha: numerator of the scale alpha / rank, so that the learning rate need not follow the rank.
        form: key of factors.FORMS.
        ranks: (regex found in the module's name, rank, alpha), the first match before `rank` and `alpha`; rank 0 leaves
            the module out.
        stabilized: whether the scale is alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732, equation 3).
        ratio: learning rate of B over that of A (LoRA+, arXiv 2402.12354).

    Raises:
        ValueError: from `shapes` and `start`, if no module matches, a regex of `ranks` matches none of the modules, or
            a rank is above a module's own.
    """

    def shapes_of(params: Shapes) -> tuple[Shapes, Shapes]:
        trainable = {}
        kernels = chosen(params, parts, targets, ranks)
        _check_ranks({module: (rank_of(module)[0], min(x.shape[-2:])) for module, x in kernels.items()}, rank)
        for module, kernel in kernels.items():
            for name, shape in shapes(form, kernel.shape, rank_of(module)[0]).items():
                trainable[f"{module}.{name}"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        return trainable, dict(params)

    def rank_of(module: str) -> tuple[int, float]:
        return next(((r, a) for pattern, r, a in ranks if re.search(pattern, module)), (rank, alpha))

    def scale(module: str) -> float:
        r, a = rank_of(module)
        return a / r**0.5 if stabilized else a / r

    def start(params: Params, key: Key[Array, ""]) -> tuple[Params, Params]:
        wanted = shapes_of({name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in params.items()})[0]
        modules = by_module(wanted)
        kernels = {name: x for name, x in params.items() if name.startswith(tuple(f"{m}." for m in modules))}

        def first(key: Key[Array, ""], kernels: Params) -> Params:
            kernels = whole(kernels, modules)
            magnitudes = {n: parse(n)[0] for n in wanted if parse(n)[1] == MAGNITUDE}
            return {n: _first(form, n, x.shape, key) for n, x in wanted.items() if n not in magnitudes} | {
                n: _norms(kernels[f"{module}.kernel"]) for n, module in magnitudes.items()
            }

        return jax.jit(first, out_shardings=key.sharding)(key, kernels if form == "dora" else {}), params

    def scaled(trainable: Tensors) -> dict[str, Array | np.ndarray]:
        carries = FORMS[form].scaled
        return {
            n: scale(module) * x if f == carries else x for n, x in trainable.items() for module, f, _ in [parse(n)]
        }

    def combine(frozen: Params, trainable: Params) -> Params:
        joined = frozen | cast(Params, scaled(trainable))
        return joined if form in ("lora", "dora") else cast(Params, merge(whole(joined, by_module(trainable))))

    return Method(
        shapes_of,
        start,
        combine,
        f"{_SAYS[form]} of rank {rank} on {names}",
        adapter=scaled,
        multiplier=lambda name: ratio if parse(name)[1] == LORA_B else 1.0,
        decays=(lambda name: parse(name)[1] != MAGNITUDE) if form == "dora" else None,
    )


_SAYS = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}


def chosen(params: Mapping[str, Value], parts: str, targets: str, ranks: Ranks = ()) -> dict[str, Value]:
    """Module name -> kernel of the modules that match both regexes.

    Raises:
        ValueError: there are none, or see `lora`.
    """
    kernels = {n.removesuffix(".kernel"): v for n, v in params.items() if n.endswith(".kernel") and len(v.shape) > 1}
    pattern = TARGETS.get(targets, targets)
    found = {n: v for n, v in kernels.items() if re.search(parts, n) and re.search(f"(?:{pattern})$", n)}
    if not found:
        some = ", ".join(list(kernels)[:3])
        raise ValueError(f"lora_targets = {targets!r}: no module's name ends like that; there are {some}, ...")
    left = dict(found)
    for pattern, rank, _ in ranks:
        matching = {name: left.pop(name) for name in list(left) if re.search(pattern, name)}
        if not matching:
            raise ValueError(
                f"lora_ranks: {pattern!r} is found in none of the {len(found)} modules' names that are left"
            )
        if rank == 0:
            found = {name: kernel for name, kernel in found.items() if name not in matching}
    return found


def _check_ranks(ranks: Mapping[str, tuple[int, int]], default: int) -> None:
    """Raises ValueError if a module's rank, the first of its pair, is above that of its kernel, the second."""
    above = {module: pair for module, pair in ranks.items() if pair[0] > pair[1]}
    for module, (rank, own) in above.items():
        field = f"lora_rank = {default}" if rank == default else "lora_ranks"
        raise ValueError(
            f"{field}: {rank} is above the rank of {module}, {own}, and of {len(above) - 1} others; lora_ranks = "
            f'(("{re.escape(module)}$", {own}, {float(own)}),) gives a module another, 0 leaves it out'
        )


def _first(form: str, name: str, shape: tuple[int, ...], key: Key[Array, ""]) -> Array:
    """The factor `name` before the first step; one of them is zero, so that training starts at the base."""
    factor = parse(name)[1]
    if factor.removesuffix("_b") == FORMS[form].zero or factor == FORMS[form].zero:
        return jnp.zeros(shape)
    rank = shape[0] if factor.endswith("_b") else shape[-1]
    deviation = FORMS[form].deviation.get(factor, 1 / rank)
    return deviation * jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), shape)


def _norms(kernel: Array) -> Array:
    """DoRA's magnitudes of the base, by the same sums as in the layer: their quotient is 1."""
    nothing = jnp.zeros((*kernel.shape[:-1], 1)), jnp.zeros((1, kernel.shape[-1]))
    return column_norms(kernel, *nothing)
