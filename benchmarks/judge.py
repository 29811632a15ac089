"""The judge of the embedded base's pictures: a small convolutional classifier, independent of the base.

    python benchmarks/judge.py                # trains it once, in ten minutes, and prints its accuracy

It sees composites whose poses and settings are drawn apart from those that the base is trained on, and says which
sprite a picture shows and what is behind it. It is kept in ~/.cache/dreambooth_jax/judge.
"""

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from tqdm import trange

from dreambooth_jax.devices import runtime, sharding
from dreambooth_jax.devices.sharding import spread
from dreambooth_jax.diffusion.step import TrainState, init_state, run_steps
from dreambooth_jax.models.layers import Conv, Downsample2D, ResnetBlock2D
from dreambooth_jax.models.params import functional
from dreambooth_jax.tiny import world
from dreambooth_jax.tiny.muon import make_muon

CACHE = Path("~/.cache/dreambooth_jax/judge").expanduser()
STEPS, BATCH, PICTURES, HELD_OUT = 1800, 64, 60_000, 2000


class Net(nnx.Module):
    """64x64 pictures in [-1, 1] -> logits of sprites and of backgrounds."""

    def __init__(self, sprites: int, backgrounds: int, *, rngs: nnx.Rngs):
        kw = {"dtype": jnp.float32, "rngs": rngs}
        widths = (32, 32, 64, 128, 256)
        self.stem = Conv(3, widths[0], 3, stride=2, **kw)
        self.blocks = nnx.List([ResnetBlock2D(a, b, groups=8, eps=1e-5, **kw) for a, b in itertools.pairwise(widths)])
        self.downs = nnx.List([Downsample2D(width, padding=1, **kw) for width in widths[1:-1]])
        self.sprite = nnx.Linear(widths[-1], sprites, **kw)
        self.background = nnx.Linear(widths[-1], backgrounds, **kw)

    def __call__(self, x: Float[Array, "b 64 64 3"]) -> tuple[Float[Array, "b s"], Float[Array, "b g"]]:
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number < len(self.downs):
                x = self.downs[number](x)
        x = jax.nn.silu(x).mean((1, 2))
        return self.sprite(x), self.background(x)


class Verdict(NamedTuple):
    """Probabilities, per picture: of each noun, of each sprite, of each background."""

    nouns: np.ndarray
    sprites: np.ndarray
    backgrounds: np.ndarray


class Judge:
    """A trained judge.

    Attributes:
        sprites: what it tells apart; `nouns`: their distinct nouns, sorted.
    """

    def __init__(self, sprites: list[world.Sprite]):
        self.sprites = sprites
        self.nouns = sorted({sprite.noun for sprite in sprites})
        self.member = np.array([[sprite.noun == noun for noun in self.nouns] for sprite in sprites], np.float32)
        self.net = functional(lambda rngs: Net(len(sprites), len(world.BACKGROUNDS), rngs=rngs))
        self._apply = jax.jit(lambda params, images: self.net.apply(params, images.astype(jnp.float32) / 127.5 - 1))
        path = CACHE / f"{len(sprites)}.npz"
        if not path.exists():
            params = train(self.net, sprites)
            CACHE.mkdir(parents=True, exist_ok=True)
            np.savez(path, **params)
        with np.load(path) as arrays:
            self.params = {name: jnp.asarray(arrays[name]) for name in arrays.files}

    def __call__(self, images: np.ndarray, batch: int = 100) -> Verdict:
        """Judges uint8 pictures [n, 64, 64, 3]."""
        sprites, backgrounds = [], []
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            padded = np.pad(part, ((0, batch - len(part)), (0, 0), (0, 0), (0, 0)))
            by_sprite, by_background = self._apply(self.params, padded)
            sprites.append(np.asarray(jax.nn.softmax(by_sprite))[: len(part)])
            backgrounds.append(np.asarray(jax.nn.softmax(by_background))[: len(part)])
        sprites = np.concatenate(sprites)
        return Verdict(sprites @ self.member, sprites, np.concatenate(backgrounds))

    def accuracy(self) -> tuple[float, float]:
        """Share of held-out composites whose noun, and whose background, it names right."""
        images, _, labels, backgrounds = world.render(
            self.sprites, HELD_OUT, 64, seed=1, split="judge-held-out", subject_weight=1.0
        )
        verdict = self(images)
        nouns = np.array([self.nouns.index(self.sprites[label].noun) for label in labels])
        return (verdict.nouns.argmax(1) == nouns).mean(), (verdict.backgrounds.argmax(1) == backgrounds).mean()


def augment(images: Array, key: Array) -> Array:
    """uint8 -> [-1, 1], a little blurred and noisy at random, as painted pictures may be."""
    x = images.astype(jnp.float32) / 127.5 - 1
    blur_key, amount_key, noise_key = jax.random.split(key, 3)
    amount = jax.random.uniform(blur_key, (len(x), 1, 1, 1))
    x = x + amount * (nnx.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False) - x)
    return x + 0.1 * jax.random.uniform(amount_key, (len(x), 1, 1, 1)) * jax.random.normal(noise_key, x.shape)


def train(net, sprites: list[world.Sprite]) -> dict[str, Array]:
    """Cross-entropy of both answers."""
    data = world.render(sprites, PICTURES, 64, seed=1, split="judge", subject_weight=1.0)
    data = [data[i] for i in (0, 2, 3)]
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, STEPS)
    params = net.init(jax.random.key(1))
    optimizer = make_muon(params, rate, weight_decay=1e-2)

    def loss(params, images, labels, backgrounds, key):
        by_sprite, by_background = net.apply(params, augment(images, key))
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        return cross_entropy(by_sprite, labels).mean() + cross_entropy(by_background, backgrounds).mean()

    def step(state: TrainState, frozen, data, key):
        index_key, augment_key = jax.random.split(jax.random.fold_in(key, state.step))
        index = jax.random.randint(index_key, (BATCH,), 0, PICTURES)
        batch = spread([x[index] for x in data])
        value, grads = jax.value_and_grad(loss)(state.trainable, *batch, augment_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        return TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), opt_state, None), (value,)

    everywhere = sharding.replicated(sharding.make_mesh())
    run = jax.jit(run_steps(step, 20), donate_argnums=0, out_shardings=everywhere)
    state, data = jax.device_put((init_state(params, optimizer), data), everywhere)
    with trange(0, STEPS, 20, desc="judge", mininterval=5) as bar:
        for _ in bar:
            state, (losses,) = run(state, {}, data, jax.random.key(2), jnp.asarray(20))
            bar.set_postfix(loss=f"{losses.mean():.3f}", refresh=False)
    return state.trainable


def core_sprites(source: str) -> list[world.Sprite]:
    """What the embedded base is trained on."""
    return [sprite for sprite in world.load_sprites(source or None) if sprite.noun in world.CORE_NOUNS]


def main() -> None:
    runtime.start()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", default="", help="folder with the two npm tarballs; default: they are fetched")
    judge = Judge(core_sprites(parser.parse_args().world))
    noun, background = judge.accuracy()
    print(f"held-out composites: noun {noun:.1%} of {len(judge.nouns)}, background {background:.1%}")


if __name__ == "__main__":
    main()
