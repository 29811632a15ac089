"""Muon, for training the embedded base from scratch."""

import functools
import math

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from dreambooth_jax.devices.sharding import AXES, make_mesh, replicated
from dreambooth_jax.diffusion.optimizer import clip_by_global_norm
from dreambooth_jax.models.params import Params, Shapes

# Input and output layers are not orthogonalised: their few channels differ in meaning. They use AdamW.
_OUTERMOST = ("conv_in.kernel", "conv_out.kernel", "patch_embedding.kernel")


def make_muon(
    params: Params | Shapes, rate: optax.Schedule, *, weight_decay: float, clip_norm: float = 1.0
) -> optax.GradientTransformation:
    """Muon (https://kellerjordan.github.io/posts/muon) for all matrices and convolutions but the outermost, AdamW with
    the same root mean square of an update for the rest (arXiv 2502.16982, equation 4); for training from scratch.

    Args:
        params: trainable parameters, arrays or shapes.
        rate: update count -> learning rate.
        weight_decay: decoupled decay, multiplied by the learning rate.
        clip_norm: limit of the gradient's global norm.
    """

    def dimensions(name: str, ndim: int) -> MuonDimensionNumbers | None:
        if not name.endswith("kernel") or name.endswith(_OUTERMOST):
            return None
        *window, rows, columns = range(ndim)
        return MuonDimensionNumbers((rows, *window), columns)

    optimizer = optax.contrib.muon(
        rate,
        ns_steps=4,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        adam_b2=0.99,
        consistent_rms=0.2,
        muon_weight_dimension_numbers={name: dimensions(name, x.ndim) for name, x in params.items()},
    )
    # Every device orthogonalises its share of each matrix. Otherwise all devices would do the same work.
    mesh = make_mesh()
    divided = optax.stateless(lambda updates, params: jax.tree.map(functools.partial(_divided, mesh), updates))
    whole = optax.stateless(lambda updates, params: jax.lax.with_sharding_constraint(updates, replicated(mesh)))
    return optax.chain(clip_by_global_norm(clip_norm), divided, optimizer, whole)


def _divided(mesh: Mesh, kernel: jax.Array) -> jax.Array:
    """[..., in, out] divided over all devices along the longer side of the matrix [... * in, out], inside a jitted
    function; whole where that does not divide, and for vectors."""
    if kernel.ndim < 2:
        return kernel
    axis = kernel.ndim - (1 if kernel.shape[-1] > math.prod(kernel.shape[:-1]) else 2)
    if kernel.shape[axis] % mesh.size:
        return kernel
    spec = [AXES if i == axis else None for i in range(kernel.ndim)]
    return jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, PartitionSpec(*spec)))
