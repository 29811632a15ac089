"""Ten equal transformer layers of SDXL one after the other, and as a loop over their stacked parameters.

    pip install -e ".[plan]" && python benchmarks/scan.py

The transformer of the middle block (1280 channels, 32 x 32 tokens, two images) on one v5e chip, in a loop over training
steps as in `train`: LoRA, the kernels frozen in bfloat16, or all weights in float32, with a plain update. Parameters
are held under the names that files, adapters and shardings use, therefore the program stacks them. Quick compiles. A
loop's body counts once: nine tenths of the plain program's bytes and roofline are added to the loop's.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dreambooth_jax.adapters.lora import lora
from dreambooth_jax.adapters.method import full
from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.chips import CHIPS
from dreambooth_jax.devices.sharding import make_mesh, placed_shapes, replicated
from dreambooth_jax.devices.tpu import Cost, compile_for, devices_of
from dreambooth_jax.models.params import functional, under_prefix, with_prefix
from dreambooth_jax.models.unet import BasicTransformerBlock

DEPTH, WIDTH, CONTEXT, HEADS, TOKENS, IMAGES = 10, 1280, 2048, 20, 32 * 32, 2
METHODS = {"LoRA": lora("", "attention", 16, 16.0), "all weights": full("")}
LAYER = functional(
    lambda rngs: BasicTransformerBlock(WIDTH, CONTEXT, HEADS, only_cross=False, dtype=jnp.bfloat16, rngs=rngs)
)


def one_after_the_other(params, x, context):
    for number in range(DEPTH):
        x = jax.checkpoint(LAYER.apply)(under_prefix(f"{number}.", params), x, context)
    return x


def scanned(params, x, context):
    layers = [under_prefix(f"{number}.", params) for number in range(DEPTH)]
    stacked = jax.tree.map(lambda *same: jnp.stack(same), *layers)
    return jax.lax.scan(lambda x, layer: (jax.checkpoint(LAYER.apply)(layer, x, context), None), x, stacked)[0]


def cost(method: str, run: Callable) -> Cost:
    """The compiler's answer for training steps through the layers."""
    shapes = {name: x for n in range(DEPTH) for name, x in with_prefix(f"{n}.", LAYER.shapes).items()}
    trainable, frozen = METHODS[method].shapes(shapes)
    frozen = {n: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.ndim > 1 else x.dtype) for n, x in frozen.items()}
    mesh = make_mesh(devices=devices_of("v5e:1x1"))
    inputs = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=replicated(mesh))
        for shape in ((IMAGES, TOKENS, WIDTH), (IMAGES, 77, CONTEXT))
    ]

    def steps(trainable, frozen, x, context, count):
        def step(_, trainable):
            grads = jax.grad(lambda p: jnp.square(run(frozen | p, x, context)).astype(jnp.float32).mean())(trainable)
            return jax.tree.map(lambda p, g: p - 1e-4 * g, trainable, grads)

        return jax.lax.fori_loop(0, count, step, trainable)

    with jax.set_mesh(mesh):
        count = jax.ShapeDtypeStruct((), jnp.int32)
        placed = (placed_shapes(mesh, tree) for tree in (trainable, frozen))
        lowered = jax.jit(steps, donate_argnums=0).lower(*placed, *inputs, count)
    return compile_for(CHIPS["v5e"], lowered, quick=True)


def main() -> None:
    runtime.start()
    print("| ten layers | held GiB | temporaries GiB | GB moved | roofline ms | compiled in s |")
    print("|---|---|---|---|---|---|", flush=True)
    for method in METHODS:
        plain, loop = cost(method, one_after_the_other), cost(method, scanned)
        share = (DEPTH - 1) / DEPTH
        loop = dataclasses.replace(
            loop,
            bytes=loop.bytes + share * plain.bytes,
            roofline_seconds=loop.roofline_seconds + share * plain.roofline_seconds,
        )
        for name, found in (("one after the other", plain), ("loop", loop)):
            sizes = f"{found.arguments / 2**30:.2f} | {found.temporaries / 2**30:.2f} | {found.bytes / 1e9:.2f}"
            times = f"{found.roofline_seconds * 1e3:.1f} | {found.compile_seconds:.0f}"
            print(f"| {method}, {name} | {sizes} | {times} |", flush=True)


if __name__ == "__main__":
    main()
