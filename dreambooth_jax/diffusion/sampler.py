"""Samplers with classifier-free guidance.

With x0 the model's estimate of the clean image, every sampler here is linear in what it knows:

    x_{i+1} = a_i x_i + b_i x0_i + c_i x0_{i-1} + d_i z_i,   z_i ~ N(0, 1)

so a sampler is a table of coefficients, computed once in float64, and one scan over it:

    for each row:                                       # t, alpha, sigma, coefficients
        x0 = estimate(x, model(x, t))                   # equation (3) of process.py
        x, before = a x + b x0 + c before + d z, x0

Primes denote the levels after the step.

* DDIM (arXiv 2010.02502, equation 12, eta = 0): a = sigma'/sigma, b = alpha' - alpha sigma'/sigma, c = d = 0.
* Euler on dx/ds = (x - x0)/s of the variance-exploding form s = sigma/alpha (arXiv 2206.00364, algorithm 1): the same
  coefficients at other times. On a flow they are x + (s' - s) velocity.
* DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): x' = sigma'/sigma x - alpha' (e^{-h} - 1) D, with h the step in
  lambda = log(alpha/sigma) and D = x0_i + (x0_i - x0_{i-1}) / (2 r).
* DDPM (arXiv 2006.11239, algorithm 2, with the smaller variance) and Euler ancestral: d = sigma' sqrt(1 - r^2) and
  a = r sigma'/sigma with r = alpha sigma' / (alpha' sigma), b = alpha' - alpha a, c = 0. They differ in their times.
  A model that learns its variance (arXiv 2102.09672, equation 15) predicts f too: d^(1-f) e^f replaces d, with the
  larger variance e^2 = 1 - (alpha / alpha')^2, beta of the step that is taken. The last step adds no noise.

Features of the model's deep layers change slowly from step to step. With `reuse_features` = n the scan takes n rows at
a time (DeepCache, arXiv 2312.00858, section 3.3): the whole model at the first, at the others its outermost layers,
given the deep features of the first.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from dreambooth_jax.diffusion.loss import Predict
from dreambooth_jax.diffusion.process import Nodes, Process

# (params, x_t, t, cond, deep features of an earlier step or None) -> (output, deep features)
PredictDeep = Callable[[PyTree, Array, Array, PyTree, PyTree], tuple[Array, PyTree]]


class Table(NamedTuple):
    """Coefficients of a sampler, one row per step, float64, and the scale of the noise from which it starts.

    Attributes:
        t: time given to the model.
        xt, y, norm: x0 = (xt x - y prediction) / norm, equation (3) of process.py.
        a, b, c, d: of x, x0, the previous x0 and new noise.
        e: of new noise, its largest value.
    """

    t: np.ndarray
    xt: np.ndarray
    y: np.ndarray
    norm: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    d: np.ndarray
    e: np.ndarray
    init_scale: float


_Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _first_order(nodes: Nodes) -> _Columns:
    a = nodes.next_sigma / nodes.sigma
    return a, nodes.next_alpha - nodes.alpha * a, np.zeros_like(a), np.zeros_like(a)


def _ancestral(nodes: Nodes) -> _Columns:
    kept = nodes.alpha * nodes.next_sigma / (nodes.next_alpha * nodes.sigma)
    a = kept * nodes.next_sigma / nodes.sigma
    return a, nodes.next_alpha - nodes.alpha * a, np.zeros_like(a), nodes.next_sigma * np.sqrt(1 - kept**2)


def _second_order(nodes: Nodes) -> _Columns:
    a, b, c, d = _first_order(nodes)
    # Second order from the second step on; the last step goes to lambda = infinity, where only the first is defined.
    with np.errstate(divide="ignore"):  # a flow starts at lambda = -infinity, which leaves its second step first order
        h = np.diff(np.log(nodes.alpha) - np.log(nodes.sigma))
    gain = np.zeros_like(a)
    gain[1:-1] = -nodes.alpha[2:] * np.expm1(-h[1:]) / (2 * h[:-1] / h[1:])
    return a, b + gain, c - gain, d


# name -> rule by which steps are spaced, coefficients
_SAMPLERS: dict[str, tuple[str, Callable[[Nodes], _Columns]]] = {
    "ddim": ("ddim", _first_order),
    "dpm++": ("dpm++", _second_order),
    "euler": ("euler", _first_order),
    "ddpm": ("ddpm", _ancestral),
    "euler_a": ("euler", _ancestral),
}
SAMPLERS = tuple(_SAMPLERS)
ANCESTRAL = tuple(name for name, (_, rows) in _SAMPLERS.items() if rows is _ancestral)


def sampler_table(process: Process, sampler: str, steps: int) -> Table:
    """The coefficients of `sampler` in `steps` model calls, equal to those of diffusers' schedulers.

    Raises:
        ValueError: unknown sampler, or a number of steps that the training timesteps do not hold.
    """
    if sampler not in _SAMPLERS:
        raise ValueError(f"sampler = {sampler!r}; implemented: {', '.join(SAMPLERS)}")
    grid, rows = _SAMPLERS[sampler]
    nodes = process.nodes(grid, steps)
    norm = nodes.a * nodes.alpha + nodes.b * nodes.sigma
    e = np.sqrt(1 - (nodes.alpha / nodes.next_alpha) ** 2)
    return Table(nodes.t, nodes.a, nodes.sigma, norm, *rows(nodes), e, nodes.init_scale)


def make_sampler(
    predict: Predict,
    process: Process,
    *,
    sampler: str = "ddim",
    steps: int = 50,
    clip: Callable[[Array], Array] | None = None,
    split: Callable[[Array], tuple[Array, Array | None]] = lambda output: (output, None),
    reuse_features: int = 1,
    with_deep: PredictDeep | None = None,
    shares_input: bool = False,
) -> Callable[..., Float[Array, "b ..."]]:
    """Builds `sample(params, noise, cond, uncond, guidance, keys=None) -> x0`, to be jitted by the caller.

    Args:
        predict: (params, x_t, t, cond) -> output of the model.
        process: noise levels and prediction of the model.
        sampler: one of `SAMPLERS`.
        steps: model calls.
        clip: function applied to every estimate of x0, for models of pixels; None for none.
        split: output -> (prediction, f of equation 15 or None). Guidance concerns the prediction alone, f is that of
            `cond`.
        reuse_features: the whole model runs at every so many-th step; 1: at every step.
        with_deep: `predict` that gives its deep features and takes those of an earlier step; for `reuse_features` > 1.
        shares_input: whether `predict` takes a row of x_t for two rows of cond, negative prompt and prompt, and
            computes once what does not depend on them.

    Arguments of the returned function:
        params: of `predict`.
        noise: standard normal, [b, ...].
        cond, uncond: pytrees with leading axis b; `uncond` holds the negative prompts, or is None for no guidance.
        guidance: scale w of uncond + w (cond - uncond) (arXiv 2207.12598, equation 6 with w = 1 + w'); scalar.
        keys: one per image, [b], for samplers in `ANCESTRAL`: image j draws the noise of step i from
            fold_in(keys[j], i), so that it does not depend on its batch.
    Both conditions go through the model in one batch of 2b, those of a picture side by side.

    Raises:
        ValueError: see `sampler_table`; `reuse_features` is no number of steps, or above 1 without `with_deep`; or,
            when called, keys are missing.
    """
    table = sampler_table(process, sampler, steps)
    if not 1 <= reuse_features <= steps or (reuse_features > 1 and with_deep is None):
        raise ValueError(f"reuse_features = {reuse_features}: expected 1, or with `with_deep` up to the {steps} steps")
    model = with_deep if reuse_features > 1 else lambda *arguments: (predict(*arguments[:-1]), None)
    rows = _in_groups(table, reuse_features)

    def sample(
        params: PyTree,
        noise: Float[Array, "b ..."],
        cond: PyTree,
        uncond: PyTree,
        guidance: Float[Array, ""] | float,
        keys: Key[Array, "b"] | None = None,
    ) -> Float[Array, "b ..."]:
        if sampler in ANCESTRAL and keys is None:
            raise ValueError(f"sampler = {sampler!r} draws noise at every step: expected keys, one per image")
        both = cond if uncond is None else jax.tree.map(_side_by_side, uncond, cond)

        def guided(x: Float[Array, "b ..."], t: Float[Array, ""], deep: PyTree) -> tuple[Array, Array | None, PyTree]:
            if uncond is None:
                output, deep = model(params, x, jnp.full(len(x), t), both, deep)
                return *split(output.astype(jnp.float32)), deep
            given = x if shares_input else jnp.repeat(x, 2, axis=0)
            output, deep = model(params, given, jnp.full(len(given), t), both, deep)
            pairs = output.astype(jnp.float32).reshape(len(x), 2, *output.shape[1:])
            (without, _), (with_, f) = split(pairs[:, 0]), split(pairs[:, 1])
            return without + guidance * (with_ - without), f, deep

        def fresh(i: Int[Array, ""]) -> Float[Array, "b ..."]:
            return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), noise.shape[1:]))(keys)

        def body(carry: tuple[Array, Array], numbered_rows: tuple[Array, Table]) -> tuple[tuple[Array, Array], None]:
            (x, before), deep = carry, None
            for number in range(reuse_features):
                i, row = jax.tree.map(lambda column: column[number], numbered_rows)  # noqa: B023
                prediction, f, deep = guided(x, row.t, deep)
                x0 = (row.xt * x - row.y * prediction) / row.norm
                if clip is not None:
                    x0 = clip(x0)
                x, before = row.a * x + row.b * x0 + row.c * before, x0
                if sampler in ANCESTRAL:
                    x = x + _deviation(row, f) * fresh(i)
            return (x, before), None

        start = noise * jnp.float32(table.init_scale)
        return jax.lax.scan(body, (start, jnp.zeros_like(noise)), rows)[0][0]

    return sample


def _side_by_side(
    uncond: Shaped[Array | np.ndarray, "b *c"], cond: Shaped[Array | np.ndarray, "b *c"]
) -> Shaped[Array, "r *c"]:
    """The rows of both in turns, so that a device that holds a picture holds both of its conditions."""
    return jnp.stack([uncond, cond], 1).reshape(-1, *cond.shape[1:])


def _in_groups(table: Table, size: int) -> tuple[Array, Table]:
    """(numbers, rows) of the steps, `size` by `size`; rows that fill the last group leave x as it is."""
    steps, spare = len(table.t), -len(table.t) % size
    idle = {name: 0.0 for name in table._fields} | {"t": table.t[-1], "norm": 1.0, "a": 1.0}

    def grouped(name: str, column: np.ndarray) -> Array:
        filled = np.pad(column, (0, spare), constant_values=idle[name])
        return jnp.asarray(filled.reshape(-1, size), jnp.float32)

    columns = {name: grouped(name, column) for name, column in table._asdict().items() if name != "init_scale"}
    return jnp.arange(steps + spare).reshape(-1, size), table._replace(**columns, init_scale=None)


def _deviation(row: Table, f: Array | None) -> Array | np.ndarray:
    """d, or between d and e as the model has it (arXiv 2102.09672, equation 15)."""
    if f is None:
        return row.d
    return jnp.where(row.d > 0, jnp.maximum(row.d, 1e-10) ** (1 - f) * row.e**f, 0.0)


def noise_for_keys(keys: Key[Array, "b"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Standard normal noise [b, *shape], image i from `keys[i]` alone: the same in any batch, on any device."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def noise_for_seeds(seeds: Sequence[int] | Array | np.ndarray, shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """The noise of the keys `jax.random.key(seed)`."""
    return noise_for_keys(jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32)), shape)
