"""Placement of arrays: one mesh with axes ("data", "fsdp"), parameters placed by (regex, rule) lists over their names.

Batches are split over both axes, parameters and everything shaped like them (optimizer moments, EMA) over "fsdp".
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import PyTree

AXES = ("data", "fsdp")
Rule = Callable[[tuple[int, ...], int], PartitionSpec]
Rules = Sequence[tuple[str, Rule]]
Shape = jax.Array | np.ndarray | jax.ShapeDtypeStruct
Tree = TypeVar("Tree")


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; an axis of -1 takes the devices that the other axis leaves.

    Raises:
        ValueError: the sizes do not multiply to the number of devices; names the sizes that would.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh data={data}, fsdp={fsdp}: give positive sizes, and -1 at most once")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        divisors = [d for d in range(1, len(devices) + 1) if len(devices) % d == 0]
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} does not cover {len(devices)} devices; "
            f"each axis must be one of {divisors}, their product {len(devices)}"
        )
    return jax.make_mesh(tuple(sizes), AXES, devices=devices, axis_types=(AxisType.Auto,) * 2)


def replicate(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Every device holds the whole array."""
    return PartitionSpec()


def split_largest(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Splits the largest axis that `fsdp` divides (the last of equals); replicates when there is none."""
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if not divisible or fsdp == 1:
        return PartitionSpec()
    largest = max(divisible, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*(None,) * largest, "fsdp")


# First match wins. Vectors and low-rank factors are not worth a collective each.
RULES: Rules = (
    (r"\.(bias|scale)$|\.((lora|hada|lokr)_|new$)", replicate),
    (r".*", split_largest),
)


def param_sharding(mesh: Mesh | AbstractMesh, name: str, shape: tuple[int, ...], rules: Rules = RULES) -> NamedSharding:
    """Sharding of the parameter `name` of `shape`, by the first rule whose regex is found in the name."""
    rule = next(rule for pattern, rule in rules if re.search(pattern, name))
    return NamedSharding(mesh, rule(shape, mesh.shape["fsdp"]))


def placed_shapes(mesh: Mesh, shapes: Mapping[str, Shape]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of parameters with the shardings that `param_sharding` gives them."""
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=param_sharding(mesh, name, x.shape))
        for name, x in shapes.items()
    }


def state_shardings(mesh: Mesh, params: Mapping[str, Shape], tree: PyTree, rules: Rules = RULES) -> PyTree:
    """Shardings for any tree that holds values named and shaped like `params` (moments, EMA, the params themselves);
    whatever is shaped otherwise (counters, factored moments) is replicated."""

    def place(path: jax.tree_util.KeyPath, leaf: Shape) -> NamedSharding:
        name = next((str(part.key) for part in reversed(path) if isinstance(part, jax.tree_util.DictKey)), None)
        if name in params and params[name].shape == leaf.shape:
            return param_sharding(mesh, name, leaf.shape, rules)
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def unshard(
    mesh: Mesh,
    params: dict[str, jax.Array],
    dtype: DTypeLike | Mapping[str, DTypeLike] | None = None,
    *,
    later: str = "",
) -> dict[str, jax.Array]:
    """Makes parameters whole before a computation uses them, inside a jitted function.

    Without it, the compiler shards activations like the parameters and exchanges activations hundreds of times per
    step. Gradients are reduced and scattered: every device gets the sum of its share alone (ZeRO, arXiv 1910.02054,
    section 5).

    In a part of the mesh (`in_a_part`) they are whole already.

    Args:
        dtype: dtype of the computation, or name -> dtype. Sharded parameters are cast before the all-gather, which
            halves its traffic; not so whole numbers, which are smaller. Replicated ones are not: the cast copy would be
            kept for the backward pass.
        later: regex of the beginnings of names whose parameters are cast alone: the layers that use them make them
            whole (`made_whole`); "" for none.
    """
    dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(params, dtype)
    if in_a_part():
        return params
    homes = {name: param_sharding(mesh, name, x.shape) for name, x in params.items()}

    def whole(name: str, x: jax.Array) -> jax.Array:
        rounded = x.astype(dtypes.get(name) or x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        rounded = jax.lax.with_sharding_constraint(rounded, homes[name])  # the cast comes before the all-gather
        return rounded if later and re.match(later, name) else _gathered(rounded, homes[name])

    return {name: x if homes[name].is_fully_replicated else whole(name, x) for name, x in params.items()}


def divides_params() -> bool:
    """Whether the function that is traced, under `jax.set_mesh`, has parameters divided over several devices."""
    return jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1 and not in_a_part()


def made_whole(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Parameters that `unshard` left to this layer, made whole under `jax.set_mesh`; names may lack their beginnings.
    Those that are whole stay so."""
    mesh = jax.sharding.get_abstract_mesh()
    homes = {name: param_sharding(mesh, name, x.shape) for name, x in params.items()}
    return {name: x if homes[name].is_fully_replicated else _gathered(x, homes[name]) for name, x in params.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: jax.Array, home: NamedSharding) -> jax.Array:
    """x on all devices. Its gradient is placed at `home` alone; autodiff would place it on all devices."""
    return jax.lax.with_sharding_constraint(x, replicated(home.mesh))


_gathered.defvjp(
    lambda x, home: (_gathered(x, home), None),
    lambda home, _, grad: (jax.lax.with_sharding_constraint(grad, home),),
)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def replicated_shapes(mesh: Mesh, shapes: Tree) -> Tree:
    """Shapes in any tree, each with the sharding `replicated`."""
    place = replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)


def batch_axes(sizes: Mapping[str, int], batch: int) -> tuple[str, ...]:
    """The mesh axes over which a leading axis of size `batch` is split: both, one of them, or none, so that it divides.

    A batch smaller than the mesh is computed on several devices redundantly: wasteful, never wrong.
    """
    choices = [AXES, AXES[:1], AXES[1:], ()]
    fitting = [axes for axes in choices if batch % math.prod(sizes[axis] for axis in axes) == 0]
    return max(fitting, key=lambda axes: math.prod(sizes[axis] for axis in axes))


def batch_sharding(mesh: Mesh, size: int) -> NamedSharding:
    """Splits a leading axis of `size` as `batch_axes` says."""
    axes = batch_axes(mesh.shape, size)
    return NamedSharding(mesh, PartitionSpec(axes) if axes else PartitionSpec())


def in_a_part() -> bool:
    """Whether the function that is traced computes on one device's part, inside `jax.shard_map`."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def gathered(params: dict[str, jax.Array], places: Mapping[str, PartitionSpec]) -> dict[str, jax.Array]:
    """Parameters made whole in a part of the mesh (`in_a_part`), from the shares that `places` gives every device."""

    def whole(x: jax.Array, place: PartitionSpec) -> jax.Array:
        for axis, name in enumerate(place):
            x = x if name is None else jax.lax.all_gather(x, name, axis=axis, tiled=True)
        return x

    return {name: whole(x, places[name]) for name, x in params.items()}


def on_each_part(function: Callable[..., Tree], *batches: jax.Array) -> Tree:
    """Applies `function`, which treats batch elements independently, to arrays that share their leading axis. Under
    `jax.set_mesh` every device computes its own part; the compiler does not divide kernels and loops by itself. In a
    part of the mesh (`in_a_part`) the arrays are divided already."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = () if mesh.empty or in_a_part() else batch_axes(mesh.shape, len(batches[0]))
    if not axes:
        return function(*batches)
    part = PartitionSpec(axes)
    return jax.shard_map(function, mesh=mesh, in_specs=part, out_specs=part, check_vma=False)(*batches)


def split_batch(batch: Tree) -> Tree:
    """Divides a batch over all devices, inside a jitted function."""
    place = batch_sharding(make_mesh(), len(jax.tree.leaves(batch)[0]))
    return jax.lax.with_sharding_constraint(batch, place)
