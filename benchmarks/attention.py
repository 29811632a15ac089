"""Self-attention of Stable Diffusion 1.5 on TPUs, forward and backward: XLA's own against the splash kernel.

    pip install -e ".[plan]" && python benchmarks/attention.py

Memory is the TPU compiler's; time is its roofline, with the kernels' matrix products at the published peak.
"""

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.chips import CHIPS
from dreambooth_jax.devices.tpu import compile_for, devices_of
from dreambooth_jax.ops.flash import flash_attention

SLICES = {"v5e": "v5e:1x1", "v6e": "v6e:1x1"}
# Images, tokens, heads, width of a head: the three resolutions with self-attention, (1+1) images.
SHAPES = {"64x64": (2, 4096, 8, 40), "32x32": (2, 1024, 8, 80), "16x16": (2, 256, 8, 160)}
KINDS = {"XLA": jax.nn.dot_product_attention, "splash": flash_attention}


def main() -> None:
    runtime.start()
    print("| chip | latents | attention | temporaries MiB | roofline ms | of it kernels ms |\n|" + "---|" * 6)
    for generation, topology in SLICES.items():
        place = SingleDeviceSharding(devices_of(topology)[0])
        for name, shape in SHAPES.items():
            qkv = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)] * 3
            for kind, attend in KINDS.items():
                if kind == "splash" and shape[1] < 1024:
                    continue  # shorter than its tiles
                gradient = jax.grad(lambda *qkv, f=attend: jnp.square(f(*qkv).astype(jnp.float32)).sum(), (0, 1, 2))
                cost = compile_for(CHIPS[generation], jax.jit(gradient).lower(*qkv))
                print(
                    f"| {generation} | {name} | {kind} | {cost.temporaries / 2**20:.0f} | "
                    f"{cost.roofline_seconds * 1e3:.2f} | {cost.kernel_seconds * 1e3:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
