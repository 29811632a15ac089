"""The forward process, and one algebra for everything that a model may predict.

A process adds noise to a clean example x0 (arXiv 2006.11239, equation 4):

    x_t = alpha_t x0 + sigma_t eps,   eps ~ N(0, 1)                                                             (1)

and every model predicts a linear combination of the two:

    y = a_t eps - b_t x0                                                                                        (2)

    | prediction                                       | a     | b     |
    |--------------------------------------------------|-------|-------|
    | epsilon, the noise                               | 1     | 0     |
    | v_prediction (arXiv 2202.00512, appendix D)      | alpha | sigma |
    | sample, the clean example                        | 0     | -1    |
    | velocity of a flow: alpha = 1 - s, sigma = s     | 1     | 1     |

Equation (2) is the target of the loss. Multiplying (1) by a and (2) by sigma and subtracting gives the clean example:

    a x_t - sigma y = (a alpha + b sigma) x0,   so   x0 = (a x_t - sigma y) / (a alpha + b sigma)                (3)

An error dy of the prediction is therefore an error dx0 = sigma dy / (a alpha + b sigma) of the clean example.
Min-SNR-gamma (arXiv 2303.09556, section 3.4) weights the squared error of x0 by min(snr, gamma), with snr = alpha^2 /
sigma^2; on the squared error of y this is

    w = min(snr, gamma) (sigma / (a alpha + b sigma))^2 = min(alpha^2, gamma sigma^2) / (a alpha + b sigma)^2     (4)

The last form is finite also where sigma is 0. For epsilon w = min(snr, gamma) / snr, for v min(snr, gamma) / (snr + 1).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Real

# Integers for a table of noise levels, real numbers for a flow.
Times = Real[Array, "b"] | Real[np.ndarray, "b"]
Value = TypeVar("Value", Array, np.ndarray, float)
Values = Float[Array, "b ..."] | Float[np.ndarray, "b ..."]


class Nodes(NamedTuple):
    """Times at which a sampler calls the model, in descending order, and the noise levels there; float64 on the host,
    because samplers subtract nearly equal numbers.

    Attributes:
        t: time given to the model.
        alpha, sigma: levels at t.
        a, b: coefficients of the prediction at t, equation (2).
        next_alpha, next_sigma: levels after the step; (1, 0) after the last one, unless the scheduler says otherwise.
        init_scale: standard deviation of the noise from which sampling starts.
    """

    t: Real[np.ndarray, "n"]
    alpha: Float[np.ndarray, "n"]
    sigma: Float[np.ndarray, "n"]
    a: Float[np.ndarray, "n"]
    b: Float[np.ndarray, "n"]
    next_alpha: Float[np.ndarray, "n"]
    next_sigma: Float[np.ndarray, "n"]
    init_scale: float


@dataclasses.dataclass(frozen=True, eq=False)
class Process:
    """A forward process and the prediction that goes with it.

    Attributes:
        alpha, sigma, a, b: functions of times [b] -> [b], float32; equations (1) and (2).
        draw_t: key -> time of one training example, scalar.
        nodes: (grid, steps) -> `Nodes`; a grid is the rule by which a sampler spaces its steps ("ddim", "ddpm", "dpm++"
            or "euler").
    """

    alpha: Callable[[Times], Float[Array, "b"]]
    sigma: Callable[[Times], Float[Array, "b"]]
    a: Callable[[Times], Float[Array, "b"]]
    b: Callable[[Times], Float[Array, "b"]]
    draw_t: Callable[[Key[Array, ""]], Real[Array, ""]]
    nodes: Callable[[str, int], Nodes]


# name -> (alpha, sigma) -> (a, b)
PREDICTIONS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "epsilon": lambda alpha, sigma: (np.ones_like(alpha), np.zeros_like(alpha)),
    "v_prediction": lambda alpha, sigma: (alpha, sigma),
    "sample": lambda alpha, sigma: (np.zeros_like(alpha), -np.ones_like(alpha)),
}


def table_process(
    alpha: Float[np.ndarray, "T"],
    sigma: Float[np.ndarray, "T"],
    prediction: str,
    nodes: Callable[[str, int], Nodes],
) -> Process:
    """The process whose times are the integers 0 ... T - 1, drawn uniformly.

    Args:
        alpha, sigma: noise level of every time.
        prediction: one of `PREDICTIONS`.
        nodes: see `Process`.
    """

    def lookup(values: np.ndarray) -> Callable[[Times], Array]:
        return lambda t: jnp.asarray(values, jnp.float32)[t]

    a, b = PREDICTIONS[prediction](alpha, sigma)
    return Process(
        *map(lookup, (alpha, sigma, a, b)),
        draw_t=lambda key: jax.random.randint(key, (), 0, len(alpha)),
        nodes=nodes,
    )


def flow_process(
    nodes: Callable[[str, int], Nodes], *, scale: float = 1000.0, shift: float = 1.0, logit_normal: bool = True
) -> Process:
    """The flow x_s = (1 - s) x0 + s eps with velocity eps - x0 (arXiv 2210.02747), at times t = scale s.

    Args:
        nodes: see `Process`.
        scale: time of pure noise.
        shift: k in s = k u / (1 + (k - 1) u): more noise where k > 1 (arXiv 2403.03206, equation 23).
        logit_normal: draw u = sigmoid(N(0, 1)) (arXiv 2403.03206, equation 19), or uniformly where False.
    """

    def draw_t(key: Key[Array, ""]) -> Float[Array, ""]:
        u = jax.nn.sigmoid(jax.random.normal(key)) if logit_normal else jax.random.uniform(key)
        return scale * shifted(u, shift)

    def one(t: Times) -> Array:
        return jnp.ones(t.shape, jnp.float32)

    def level(t: Times) -> Array:
        return jnp.asarray(t, jnp.float32) / scale

    return Process(lambda t: 1 - level(t), level, one, one, draw_t, nodes)


def shifted(u: Value, shift: float) -> Value:
    """k u / (1 + (k - 1) u), which maps [0, 1] to itself (arXiv 2403.03206, equation 23)."""
    return shift * u / (1 + (shift - 1) * u)


def _like(values: Float[Array, "b"], x: Values) -> Array:
    """[b] shaped to multiply [b, ...]."""
    return values.reshape(-1, *(1,) * (x.ndim - 1))


def corrupt(process: Process, x0: Values, eps: Values, t: Times) -> Float[Array, "b ..."]:
    """x_t of equation (1)."""
    return _like(process.alpha(t), x0) * x0 + _like(process.sigma(t), x0) * eps


def target(process: Process, x0: Values, eps: Values, t: Times) -> Float[Array, "b ..."]:
    """y of equation (2), which the model should predict."""
    return _like(process.a(t), x0) * eps - _like(process.b(t), x0) * x0


def snr_weight(process: Process, t: Times, gamma: float | Float[Array, ""]) -> Float[Array, "b"]:
    """w of equation (4): min-SNR-gamma weight of the squared error of the prediction."""
    alpha, sigma, a, b = (f(t) for f in (process.alpha, process.sigma, process.a, process.b))
    return jnp.minimum(alpha**2, gamma * sigma**2) / (a * alpha + b * sigma) ** 2
