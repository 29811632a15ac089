"""Muon: the momentum of every matrix is orthogonalised."""

import math
from collections.abc import Mapping

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array
from optax.contrib import MuonDimensionNumbers

from dreambooth_jax.devices.sharding import AXES, in_a_part, param_sharding
from dreambooth_jax.models.params import Params

# Input and output layers are not orthogonalised: their few channels differ in meaning.
_OUTERMOST = ("conv_in.kernel", "conv_out.kernel", "patch_embedding.kernel")
# Root mean square of an update over the learning rate: that of AdamW, whose rates and decay are used.
_SIZE = 0.2
# Parameters, some masked for a transformation of the others.
Masked = Mapping[str, Array | optax.MaskedNode]


def scale_by_muon(
    others: optax.GradientTransformation,
    *,
    iterations: int = 5,
    moment_dtype: DTypeLike = "float32",
    mesh: Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon (https://kellerjordan.github.io/posts/muon) for all matrices and convolutions but the outermost, with the
    root mean square of AdamW's updates (arXiv 2502.16982, equation 4). Low-rank factors are matrices too.

    Args:
        others: transformation of the other parameters: vectors, embeddings, input and output layers.
        iterations: number of Newton-Schulz iterations, of three products each.
        moment_dtype: dtype of the momentum.
        mesh: mesh whose devices each orthogonalise their share of a matrix. None, or in a part of a mesh: one device
            does all.
    """

    def sized(updates: Masked, params: Masked | None) -> Masked:
        return {name: x if isinstance(x, optax.MaskedNode) else x * _size(name, x.shape) for name, x in updates.items()}

    def divided(updates: Params, params: Params | None) -> Params:
        if mesh is None or in_a_part():
            return updates
        return {name: _divided(mesh, x) for name, x in updates.items()}

    def at_home(updates: Params, params: Params | None) -> Params:
        if mesh is None or in_a_part():
            return updates
        homes = {name: param_sharding(mesh, name, x.shape) for name, x in updates.items()}
        return jax.lax.with_sharding_constraint(updates, homes)

    momentum = optax.contrib.scale_by_muon(
        ns_steps=iterations, mu_dtype=moment_dtype, weight_dimension_numbers=_all_dimensions
    )
    matrices = optax.chain(momentum, optax.stateless(sized))
    scale = optax.partition({"matrices": matrices, "others": others}, _kinds)
    return optax.chain(optax.stateless(divided), scale, optax.stateless(at_home))


def dimensions(name: str, ndim: int) -> MuonDimensionNumbers | None:
    """The axes of a parameter's matrix: of a kernel [..., in, out], or of a factor in PyTorch's layout [out, in, ...].
    None for parameters that are no matrices."""
    if ndim < 2 or name.endswith(_OUTERMOST):
        return None
    *window, rows, columns = range(ndim)
    if name.endswith(".kernel"):
        return MuonDimensionNumbers((rows, *window), columns)
    return MuonDimensionNumbers(tuple(range(1, ndim)), 0) if name.endswith(".weight") else None


def _all_dimensions(params: Masked) -> dict[str, MuonDimensionNumbers | optax.MaskedNode | None]:
    return {
        name: x if isinstance(x, optax.MaskedNode) else dimensions(name, len(x.shape)) for name, x in params.items()
    }


def _kinds(params: Masked) -> dict[str, str]:
    return {name: "others" if axes is None else "matrices" for name, axes in _all_dimensions(params).items()}


def _size(name: str, shape: tuple[int, ...]) -> float:
    """The factor that brings a matrix with singular values of 1, whose root mean square is 1 / sqrt(longer side), to
    `_SIZE`."""
    rows, column = dimensions(name, len(shape))
    return _SIZE * math.sqrt(max(math.prod(shape[axis] for axis in rows), shape[column]))


def _divided(mesh: Mesh, x: Array) -> Array:
    """[..., in, out] divided over all devices along the longer side of the matrix [... * in, out]; whole where that
    does not divide, and for vectors."""
    if x.ndim < 2:
        return x
    axis = x.ndim - (1 if x.shape[-1] > math.prod(x.shape[:-1]) else 2)
    if x.shape[axis] % mesh.size:
        return x
    spec = [AXES if i == axis else None for i in range(x.ndim)]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))
