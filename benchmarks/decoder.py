"""Stable Diffusion 1.5's decoder on v5e as its compiler sees it: four pictures of 512 x 512, at once or one after the
other, in float32 or bfloat16; and what bfloat16 costs the embedded base's decoder, in decibels.

    pip install -e ".[plan]" && python benchmarks/decoder.py          # three minutes
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.chips import CHIPS
from dreambooth_jax.devices.sharding import make_mesh, replicated
from dreambooth_jax.devices.tpu import compile_for, devices_of
from dreambooth_jax.families.pipeline import describe_base, load_pipeline, read_params
from dreambooth_jax.models.params import functional
from dreambooth_jax.models.vae import AutoencoderKL

PICTURES = 4
PHOTOS = Path(__file__).parent.parent / "examples" / "subjects"
# dtype of the decoder, whether one picture after the other, dtype in which its kernels are held
ROWS = (
    ("float32", False, "float32"),
    ("bfloat16", False, "float32"),
    ("float32", True, "float32"),
    ("bfloat16", True, "float32"),
    ("bfloat16", True, "bfloat16"),
)


def row(dtype: str, in_turn: bool, held: str) -> str:
    """Temporaries and the quick roofline of a way of decoding."""
    spec = describe_base("stable-diffusion-v1-5/stable-diffusion-v1-5").models.specs["vae"]
    vae = functional(lambda rngs: AutoencoderKL(spec, dtype=jnp.dtype(dtype), rngs=rngs))
    mesh = make_mesh(devices=devices_of("v5e:1x1"))
    place = replicated(mesh)
    params = {n: jax.ShapeDtypeStruct(x.shape, held, sharding=place) for n, x in vae.shapes.items()}
    latents = jax.ShapeDtypeStruct((PICTURES, 64, 64, spec.latent_channels), jnp.float32, sharding=place)

    def decode(params, z):
        one = lambda z: vae.apply(params, z, method="decode").astype(jnp.float32)  # noqa: E731
        return jax.lax.map(lambda z: one(z[None])[0], z) if in_turn else one(z)

    with jax.set_mesh(mesh):
        cost = compile_for(CHIPS["v5e"], jax.jit(decode).lower(params, latents), quick=True)
    seconds = cost.roofline_seconds * (PICTURES if in_turn else 1)  # a loop's body is counted once
    how = "one after the other" if in_turn else "all at once"
    return f"| {dtype}, {how}, kernels in {held} | {cost.temporaries / 2**30:.2f} | {seconds * 1e3:.0f} |"


def decibels() -> str:
    """PSNR between the embedded base's decoder in float32 and in bfloat16, and of each to the photos."""
    paths = sorted(PHOTOS.glob("*/*.jpg"))
    images = np.stack([np.asarray(Image.open(path).resize((64, 64), Image.Resampling.LANCZOS)) for path in paths])
    decoded, latents = {}, None
    for dtype in ("float32", "bfloat16"):
        pipeline = load_pipeline("tiny", dtype=jnp.dtype(dtype))
        params = read_params(pipeline, shapes=pipeline.frozen_shapes)
        latents = jax.jit(pipeline.encode_images)(params, images)[0] if latents is None else latents
        decoded[dtype] = np.asarray(jax.jit(pipeline.decode)(params, latents))
    between = _psnr(decoded["float32"], decoded["bfloat16"])
    photos = ", ".join(f"{name} {_psnr(pixels, images / 255).mean():.1f}" for name, pixels in decoded.items())
    lowest = f"lowest {between.min():.1f}"
    return f"{len(images)} photos: {between.mean():.1f} dB between both, {lowest}; to the photos {photos}"


def _psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return -10 * np.log10(np.square(a - b).mean((1, 2, 3)))


def main() -> None:
    runtime.start()
    print(decibels(), flush=True)
    print("| decoder | temporaries GiB | ms |\n|---|---|---|", flush=True)
    for settings in ROWS:
        print(row(*settings), flush=True)


if __name__ == "__main__":
    main()
