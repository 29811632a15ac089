"""A frozen base in eight bits: `MODULE.kernel` holds whole numbers, `MODULE.int8.scale` beside it the steps of the
output channels (ops.quantise). The layers of models.layers compute with both.
"""

from collections.abc import Collection

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dreambooth_jax.devices.sharding import replicated
from dreambooth_jax.models.params import Params, Shapes
from dreambooth_jax.ops.quantise import dequantise, quantise

STEP = ".int8.scale"


def quantised_shapes(shapes: Shapes, modules: Collection[str]) -> Shapes:
    """`shapes` with the kernels of `modules` in eight bits."""
    held = dict(shapes)
    for module in modules:
        kernel = shapes[f"{module}.kernel"]
        held[f"{module}.kernel"] = jax.ShapeDtypeStruct(kernel.shape, jnp.int8)
        held[module + STEP] = jax.ShapeDtypeStruct(kernel.shape[-1:], jnp.float32)
    return held


def quantised(params: Params, modules: Collection[str], mesh: Mesh) -> Params:
    """`params` with the kernels of `modules` in eight bits, placed as they were, their steps on every device. Float
    kernels are taken out of `params` one by one, so that the base is never held twice."""
    held = {}
    for module in modules:
        kernel = params.pop(f"{module}.kernel")
        rounded = jax.jit(quantise, out_shardings=(kernel.sharding, replicated(mesh)), donate_argnums=0)
        held[f"{module}.kernel"], held[module + STEP] = rounded(kernel)
    return params | held


def whole(params: Params, modules: Collection[str]) -> Params:
    """`params` with the kernels of `modules` in float32, where they are held in eight bits."""
    eight_bits = [module for module in modules if module + STEP in params]
    plain = {f"{m}.kernel": dequantise(params[f"{m}.kernel"], params[m + STEP]) for m in eight_bits}
    steps = {module + STEP for module in eight_bits}
    return {name: value for name, value in params.items() if name not in steps} | plain
