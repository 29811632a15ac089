"""What scoring a picture costs beside painting it: floating-point operations of both programs, as the compiler counts
them, for Stable Diffusion 1.5 at 512 px and the published judge.

python benchmarks/scoring.py          # half a minute; nothing is fetched

And the seconds in which the judge of the embedded base scores a subject's 132 pictures, here.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.evaluation.judge import embedded_judge
from dreambooth_jax.evaluation.scores import Painted, score
from dreambooth_jax.families.pipeline import describe_base
from dreambooth_jax.models.clip import CLIPModel, CLIPVisionSpec
from dreambooth_jax.models.clip_text import CLIPTextSpec
from dreambooth_jax.models.lpips import LPIPS
from dreambooth_jax.models.params import Functional, functional
from dreambooth_jax.models.vit import ViTModel, ViTSpec

STEPS, BATCH = 25, 4
DINO = ViTSpec(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
CLIP_TEXT = CLIPTextSpec()


def flops(function, *shapes) -> float:
    return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


def of_pictures(model: Functional, method: str) -> float:
    """Operations per picture of 224 px."""
    pixels = jax.ShapeDtypeStruct((BATCH, 224, 224, 3), jnp.float32)
    return flops(lambda params, x: model.apply(params, x, method=method), model.shapes, pixels) / BATCH


def embedded_seconds() -> float:
    """Of the second call: 25 prompts x 4 pictures and twice 16 of the class."""
    rng, judge = np.random.default_rng(0), embedded_judge(make_mesh())

    def noise(count: int) -> list[np.ndarray]:
        return list(rng.integers(0, 256, (count, 64, 64, 3), np.uint8))

    painted = Painted(noise(5), [noise(4) for _ in range(25)], ["a dog"] * 25, noise(16), noise(16), "a dog")
    score(judge, painted)
    began = time.monotonic()
    score(judge, painted)
    return time.monotonic() - began


def main() -> None:
    clip = functional(lambda rngs: CLIPModel(CLIP_TEXT, CLIPVisionSpec(), 512, rngs=rngs))
    models = {
        "DINO ViT-S/16": (functional(lambda rngs: ViTModel(DINO, rngs=rngs)), "features"),
        "CLIP ViT-B/32": (clip, "image_features"),
        "LPIPS AlexNet": (functional(lambda rngs: LPIPS("alex", rngs=rngs)), "maps"),
    }
    pipeline = describe_base("stable-diffusion-v1-5/stable-diffusion-v1-5", dtype=jnp.bfloat16)
    shape = jax.ShapeDtypeStruct((2, *pipeline.example_shape(512)), jnp.float32)
    states = jax.ShapeDtypeStruct((2, 77, 768), jnp.float32)
    times = jax.ShapeDtypeStruct((2,), jnp.int32)
    painting = STEPS * flops(
        lambda p, x, t, c: pipeline.denoise(p, x, t, {"states": c}), pipeline.shapes, shape, times, states
    )
    print(f"painting, {STEPS} steps with guidance, the UNet alone: {painting / 1e12:.2f} TFLOP a picture")
    scoring = 0.0
    for name, (model, method) in models.items():
        own = of_pictures(model, method)
        scoring += own
        print(f"{name}: {own / 1e9:.2f} GFLOP a picture")
    print(f"scoring: {scoring / painting:.4%} of painting")
    print(f"the embedded judge: {embedded_seconds():.1f} s for 132 pictures")


if __name__ == "__main__":
    main()
