"""A full fine-tuning as an adapter: all differences to its base, or their best approximation of low rank."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dreambooth_jax.models.params import Tensors

_OVERSAMPLING, _ITERATIONS = 8, 3


def differences(base: Tensors, tuned: Tensors) -> dict[str, np.ndarray]:
    """`MODULE.diff.LEAF` -> difference, of every parameter that has changed."""
    found = {}
    for name, value in tuned.items():
        if not np.array_equal(value, base[name]):
            module, _, leaf = name.rpartition(".")
            found[f"{module}.diff.{leaf}"] = np.asarray(value) - np.asarray(base[name])
    return found


def low_rank(changes: Mapping[str, np.ndarray], rank: int) -> tuple[dict[str, np.ndarray], float]:
    """(LoRA factors of the kernels' `changes`, relative error of all changes in the Frobenius norm).

    Biases, norms and embeddings have no factors: what has changed there counts as error.

    Args:
        changes: see `differences`.
        rank: of every factor; no larger than the kernel's own is used.
    """
    factors: dict[str, np.ndarray] = {}
    left = whole = 0.0
    for name, change in changes.items():
        module = name.removesuffix(".diff.kernel")
        whole += float(np.square(change, dtype=np.float64).sum())
        if module == name or change.ndim < 2:
            left += float(np.square(change, dtype=np.float64).sum())
            continue
        matrix = change.reshape(-1, change.shape[-1])
        r = min(rank, *change.shape[-2:])
        a, b = (np.asarray(x) for x in _truncated(jnp.asarray(matrix), r))
        left += float(np.square(matrix - a @ b, dtype=np.float64).sum())
        factors[f"{module}.lora_A.kernel"] = a.reshape(*change.shape[:-1], r)
        factors[f"{module}.lora_B.kernel"] = b
    return factors, (left / whole) ** 0.5 if whole else 0.0


def _truncated(matrix: Float[Array, "m n"], rank: int) -> tuple[Float[Array, "m r"], Float[Array, "r n"]]:
    """The truncated singular value decomposition, sqrt(S) in both factors, from a random range finder with subspace
    iterations (arXiv 0909.4061, algorithms 4.4 and 5.1): a decomposition of the whole matrix would take minutes."""
    size = min(rank + _OVERSAMPLING, *matrix.shape)
    basis = jnp.linalg.qr(matrix @ jax.random.normal(jax.random.key(0), (matrix.shape[1], size)))[0]
    for _ in range(_ITERATIONS):
        basis = jnp.linalg.qr(matrix @ jnp.linalg.qr(matrix.T @ basis)[0])[0]
    u, s, v = jnp.linalg.svd(basis.T @ matrix, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return (basis @ u[:, :rank]) * root, root[:, None] * v[:rank]
