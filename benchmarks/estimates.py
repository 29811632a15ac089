"""How far the TPU compiler's estimates can be trusted: four kernels whose cost is known, per chip.

    pip install -e ".[plan]" && python benchmarks/estimates.py

For each, the time that the published peaks allow, and the compiler's two opinions of it as ratios to that.
"""

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.chips import CHIPS
from dreambooth_jax.devices.tpu import compile_for, devices_of
from dreambooth_jax.ops.attention import attention

SLICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4"}


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def scale_and_add(x, y):
    return 2 * x + y


# name -> function, argument shapes, FLOPs, bytes that must move (bfloat16)
KERNELS = {
    "matmul 8192^3": (jnp.matmul, [(8192, 8192)] * 2, 2 * 8192**3, 3 * 2 * 8192**2),
    "convolution 8x64x64, 640 to 640": (
        convolve,
        [(8, 64, 64, 640), (3, 3, 640, 640)],
        2 * 9 * 640 * 640 * 8 * 64 * 64,
        2 * (2 * 8 * 64 * 64 * 640 + 9 * 640 * 640),
    ),
    "attention 4 x 4096 x 8 x 128": (
        attention,
        [(4, 4096, 8, 128)] * 3,
        4 * 4 * 8 * 4096**2 * 128,
        4 * 2 * 4 * 4096 * 8 * 128,
    ),
    "2x + y, 512 MiB each": (scale_and_add, [(2**28,)] * 2, 2 * 2**28, 3 * 2 * 2**28),
}


def main() -> None:
    runtime.start()
    print("| chip | kernel | published peaks allow | bound | roofline | cycles |\n|---|---|---|---|---|---|")
    for generation, chip in CHIPS.items():
        place = SingleDeviceSharding(devices_of(SLICES[generation])[0])
        for name, (function, shapes, flops, size) in KERNELS.items():
            arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
            cost = compile_for(chip, jax.jit(function).lower(*arguments))
            compute, memory = flops / chip.flops, size / chip.bandwidth
            allowed, bound = max((compute, "compute"), (memory, "HBM"))
            ratios = f"{cost.roofline_seconds / allowed:.2f} | {cost.cycle_seconds / allowed:.2f}"
            print(f"| {generation} | {name} | {allowed * 1e3:.2f} ms | {bound} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
