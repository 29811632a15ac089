"""What an optimizer's moments cost on a TPU chip, by the cycle estimates of its compiler: seconds for each row.

    pip install -e ".[plan]" && python benchmarks/moments.py

Twelve kernels 1280 x 1280, whose gradients are computed again from factors of 128 rows, as most of Stable Diffusion's
are. The step without moments is plain gradient descent; all rows clip by the global norm. GiB and milliseconds are for
the 860 M parameters of its UNet; those for the bytes at full speed, and those by cycles, which hold the two products of
a gradient too and do not count copies that run beside them.
"""

import argparse

import jax
import jax.numpy as jnp
import optax

from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.chips import CHIPS
from dreambooth_jax.devices.sharding import make_mesh, replicated
from dreambooth_jax.devices.tpu import compile_for, devices_of
from dreambooth_jax.diffusion.adam import largest_magnitudes
from dreambooth_jax.diffusion.loss import Losses
from dreambooth_jax.diffusion.optimizer import clip_by_global_norm, make_optimizer
from dreambooth_jax.diffusion.step import apply_gradients, init_state, recomputed

COUNT, WIDTH, ROWS, PARAMETERS = 12, 1280, 128, 860e6
RATE = optax.constant_schedule(1e-5)


def adamw(first: str, second: str) -> optax.GradientTransformation:
    return make_optimizer("adamw", RATE, moment_dtype=first, second_moment_dtype=second)


OPTIMIZERS = {
    "gradient descent": optax.chain(clip_by_global_norm(1.0), optax.sgd(1e-5)),
    "adamw, float32": adamw("float32", "float32"),
    "adamw, bfloat16 and float32": adamw("bfloat16", "float32"),
    "adamw, bfloat16": adamw("bfloat16", "bfloat16"),
    "adamw, int8": adamw("int8", "int8"),
    "adamw, bfloat16 and int8": adamw("bfloat16", "int8"),
    "muon, float32": make_optimizer("muon", RATE),
    "adafactor": make_optimizer("adafactor", RATE),
}


def products(params, frozen, factors):
    """The gradient of every kernel, from its factors."""
    zero = jnp.zeros(())
    return {name: jnp.einsum("ri,ro->io", *factors[name]) for name in params}, Losses(zero, zero, zero)


def main() -> None:
    runtime.start()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chip", default="v5e", choices=[name for name, chip in CHIPS.items() if chip.axes == 2])
    parser.add_argument("--only", nargs="+", default=list(OPTIMIZERS), help="names of rows")
    options = parser.parse_args()
    chip, mesh = CHIPS[options.chip], make_mesh(devices=devices_of(f"{options.chip}:1x1"))
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh))  # noqa: E731
    names = [f"{number}.kernel" for number in range(COUNT)]
    factor = place(jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16))
    params = {name: jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32) for name in names}
    size = COUNT * WIDTH * WIDTH
    print("| optimizer | bytes a parameter | GiB | ms for its bytes | ms by cycles | compiled in s |\n|" + "---|" * 6)
    for name in options.only:
        optimizer = OPTIMIZERS[name]

        def step(state, factors, optimizer=optimizer):
            grads, _, for_optimizer = recomputed(products)(state.trainable, {}, factors)
            norm = optax.tree.norm(grads)
            return apply_gradients(optimizer, state, for_optimizer(norm), norm, largest_magnitudes(grads), None)

        state = jax.tree.map(place, jax.eval_shape(lambda p, o=optimizer: init_state(p, o), params))
        lowered = jax.jit(step, donate_argnums=0).lower(state, dict.fromkeys(names, (factor, factor)))
        cost = compile_for(chip, lowered)
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state)) / size
        least = 2 * (4 + held) * PARAMETERS / chip.bandwidth  # parameter and state are read and written
        cycles = cost.cycle_seconds / size * PARAMETERS
        sizes = f"{held:.2f} | {held * PARAMETERS / 2**30:.2f}"
        print(f"| {name} | {sizes} | {least * 1e3:.1f} | {cycles * 1e3:.1f} | {cost.compile_seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
