"""LPIPS: the distance between deep features of two images (arXiv 1801.03924, equation 1), on AlexNet or VGG-16.

Convolutions are named "features.N" with torchvision's numbers, the learnt weights of the layers "lin0" to "lin4" as in
the files of the `lpips` package.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dreambooth_jax.models.layers import Conv

Image = Float[Array, "b h w c"]

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPS = 1e-10


class Step(NamedTuple):
    """A convolution with ReLU: torchvision's number, channels, size, stride, padding; `pool`: (size, stride) of the
    maximum pooling before it, or None; `kept`: whether its output enters the distance."""

    number: int
    cout: int
    size: int
    stride: int
    padding: int
    pool: tuple[int, int] | None
    kept: bool


ALEX = (
    Step(0, 64, 11, 4, 2, None, True),
    Step(3, 192, 5, 1, 2, (3, 2), True),
    Step(6, 384, 3, 1, 1, (3, 2), True),
    Step(8, 256, 3, 1, 1, None, True),
    Step(10, 256, 3, 1, 1, None, True),
)
_NUMBERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_CHANNELS = (64,) * 2 + (128,) * 2 + (256,) * 3 + (512,) * 6
VGG = tuple(
    Step(number, cout, 3, 1, 1, (2, 2) if number in (5, 10, 17, 24) else None, number in (2, 7, 14, 21, 28))
    for number, cout in zip(_NUMBERS, _CHANNELS, strict=True)
)
BACKBONES = {"alex": ALEX, "vgg": VGG}


class Head(nnx.Module):
    """The learnt weights of a layer's channels, not negative."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jnp.ones((1, 1, channels, 1)))


class LPIPS(nnx.Module):
    """Images in [-1, 1] -> features -> distances. `backbone` is "alex" or "vgg"."""

    def __init__(self, backbone: str, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.steps, self.dtype = BACKBONES[backbone], dtype
        convs, cin = {}, 3
        for step in self.steps:
            sizes = {"stride": step.stride, "padding": step.padding}
            convs[str(step.number)] = Conv(cin, step.cout, step.size, **sizes, dtype=dtype, rngs=rngs)
            cin = step.cout
        self.features = nnx.Dict(convs)
        kept = [step for step in self.steps if step.kept]
        for number, step in enumerate(kept):
            setattr(self, f"lin{number}", Head(step.cout, rngs=rngs))

    def maps(self, images: Float[Array, "b h w 3"]) -> list[Array]:
        """The five feature maps, each place a unit vector times the square roots of the layer's weights, so that the
        squared distance of two maps, averaged over places and summed over layers, is LPIPS."""
        x = ((images - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)).astype(self.dtype)
        kept: list[Array] = []
        for step in self.steps:
            if step.pool is not None:
                x = nnx.max_pool(x, (step.pool[0],) * 2, (step.pool[1],) * 2)
            x = jax.nn.relu(self.features[str(step.number)](x))
            if step.kept:
                head = getattr(self, f"lin{len(kept)}").kernel[0, 0, :, 0]
                kept.append(_unit(x.astype(jnp.float32)) * jnp.sqrt(head))
        return kept

    def __call__(self, images: Float[Array, "b h w 3"], others: Float[Array, "b h w 3"]) -> Float[Array, "b"]:
        """The distance of each image and its other."""
        return distance(self.maps(images), self.maps(others))


def distance(maps: list[Array], others: list[Array]) -> Float[Array, "b"]:
    """LPIPS of images whose `maps` are given."""
    layers = [jnp.square(a - b).sum(-1).mean((1, 2)) for a, b in zip(maps, others, strict=True)]
    return jnp.stack(layers).sum(0)


def _unit(x: Image) -> Image:
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + EPS)
