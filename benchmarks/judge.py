"""The judge of the embedded base's pictures: a small convolutional classifier, independent of the base.

    python benchmarks/judge.py                # trains it once, in ten minutes, and prints its accuracy

It says which sprite a picture shows or that the thing is deformed, and what is behind it. The deformed ones of its
training are warped, shuffled in patches, or halves of two sprites. It is kept in ~/.cache/dreambooth_jax/judge.
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
from dreambooth_jax.devices.sharding import split_batch
from dreambooth_jax.diffusion.step import TrainState, init_state, run_steps
from dreambooth_jax.files.hub import EMBEDDED_FOLDER
from dreambooth_jax.files.tokenizer import load_tokenizer
from dreambooth_jax.models.layers import Conv, Downsample2D, ResnetBlock2D
from dreambooth_jax.models.params import functional
from dreambooth_jax.ops.pixels import from_bytes
from dreambooth_jax.tiny import world
from dreambooth_jax.tiny.fit import make_muon
from dreambooth_jax.tiny.world.atlas import Atlas, Labels, compose, draw_labels, make_atlas

CACHE = Path("~/.cache/dreambooth_jax/judge").expanduser()
STEPS, BATCH, HELD_OUT, SIZE = 1500, 64, 2000, 64
DEFORMED_SHARE = 0.25
DEFORMED = "deformed"


class Net(nnx.Module):
    """64x64 pictures in [-1, 1] -> logits of sprites and, last, of "deformed"; and logits of backgrounds."""

    def __init__(self, sprites: int, backgrounds: int, *, rngs: nnx.Rngs):
        kw = {"dtype": jnp.float32, "rngs": rngs}
        widths = (32, 32, 64, 128, 256)
        self.stem = Conv(3, widths[0], 3, stride=2, **kw)
        self.blocks = nnx.List([ResnetBlock2D(a, b, groups=8, eps=1e-5, **kw) for a, b in itertools.pairwise(widths)])
        self.downs = nnx.List([Downsample2D(width, padding=1, **kw) for width in widths[1:-1]])
        self.sprite = nnx.Linear(widths[-1], sprites + 1, **kw)
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
    """Probabilities, per picture: of each noun and, last, of "deformed"; of each sprite; of each background."""

    nouns: np.ndarray
    sprites: np.ndarray
    backgrounds: np.ndarray


class Judge:
    """A trained judge.

    Attributes:
        sprites: what it tells apart.
        nouns: their distinct nouns, sorted, then DEFORMED.
    """

    def __init__(self, sprites: list[world.Sprite]):
        self.sprites = sprites
        self.nouns = [*sorted({sprite.noun for sprite in sprites}), DEFORMED]
        nouns = [*(sprite.noun for sprite in sprites), DEFORMED]
        self.member = np.array([[noun == name for name in self.nouns] for noun in nouns], np.float32)
        self.net = functional(lambda rngs: Net(len(sprites), len(world.BACKGROUNDS), rngs=rngs))
        self._apply = jax.jit(lambda params, images: self.net.apply(params, from_bytes(images)))
        path = CACHE / f"{len(sprites)}_{DEFORMED}.npz"
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

    def named(self, images: np.ndarray, nouns: list[str]) -> np.ndarray:
        """Whether each picture's first guess, "deformed" among the answers, is the noun given for it."""
        answers = np.array([self.nouns.index(noun) for noun in nouns])
        return self(images).nouns.argmax(1) == answers

    def accuracy(self) -> tuple[float, float, float]:
        """Share of composites drawn apart whose noun, and whose background, it names right; share of deformed ones that
        it rejects."""
        images, _, labels, backgrounds = world.render(
            self.sprites, HELD_OUT, SIZE, seed=1, split="judge-held-out", subject_share=0.5
        )
        background = self(images).backgrounds.argmax(1) == backgrounds
        atlas = _atlas(self.sprites, "judge-held-out")
        bad, _ = jax.jit(lambda key: drawn(atlas, key, HELD_OUT // 4, deform))(jax.random.key(7))
        rejected = self.named(np.asarray(bad), [DEFORMED] * len(bad))
        return self.named(images, [self.sprites[i].noun for i in labels]).mean(), background.mean(), rejected.mean()


def _atlas(sprites: list[world.Sprite], bank: str) -> Atlas:
    tokenizer = load_tokenizer(EMBEDDED_FOLDER)
    return make_atlas(sprites, tokenizer, SIZE, subject_share=world.SUBJECT_SHARE, bank=bank)


def drawn(atlas: Atlas, key: Array, count: int, change=lambda layers, key: layers) -> tuple[Array, Labels]:
    """Composed pictures and what they show."""
    label_key, key = jax.random.split(key)
    labels = draw_labels(atlas, label_key, count)
    return compose(atlas, labels, key, SIZE, change), labels


def deform(layers: Float[Array, "b h w 4"], key: Array) -> Float[Array, "b h w 4"]:
    """Each layer warped, with its patches shuffled, or joined with the half of another."""
    kind_key, warp_key, shuffle_key, mix_key = jax.random.split(key, 4)
    count = len(layers)
    kind = jax.random.randint(kind_key, (count,), 0, 3)
    changed = (
        jax.vmap(_warped)(layers, jax.random.split(warp_key, count)),
        jax.vmap(_shuffled)(layers, jax.random.split(shuffle_key, count)),
        jax.vmap(_mixed)(layers, jnp.roll(layers, 1, axis=0), jax.random.split(mix_key, count)),
    )
    return jnp.stack(changed)[kind, jnp.arange(count)]


def _warped(layer: Float[Array, "h w 4"], key: Array) -> Float[Array, "h w 4"]:
    """Moved by a smooth random field of 4 to 8 pixels."""
    field_key, strength_key = jax.random.split(key)
    size = layer.shape[0]
    field = jax.image.resize(jax.random.normal(field_key, (2, 5, 5)), (2, size, size), "cubic")
    strength = jax.random.uniform(strength_key, minval=4.0, maxval=8.0) * size / 64
    places = jnp.indices((size, size)) + strength * field
    look_up = lambda channel: jax.scipy.ndimage.map_coordinates(channel, places, order=1)  # noqa: E731
    return jnp.stack([look_up(layer[..., i]) for i in range(4)], axis=-1)


def _shuffled(layer: Float[Array, "h w 4"], key: Array) -> Float[Array, "h w 4"]:
    """The 3 x 3 patches of the middle in another order."""
    edge, side = layer.shape[0] // 8, layer.shape[0] // 4
    middle = layer[edge : edge + 3 * side, edge : edge + 3 * side]
    patches = middle.reshape(3, side, 3, side, 4).swapaxes(1, 2).reshape(9, side, side, 4)
    patches = jnp.roll(patches, 1, axis=0)[jax.random.permutation(key, 9)]
    middle = patches.reshape(3, 3, side, side, 4).swapaxes(1, 2).reshape(middle.shape)
    return layer.at[edge : edge + 3 * side, edge : edge + 3 * side].set(middle)


def _mixed(layer: Float[Array, "h w 4"], other: Float[Array, "h w 4"], key: Array) -> Float[Array, "h w 4"]:
    """The left or the upper half of one and the rest of another."""
    half = jnp.arange(layer.shape[0]) < layer.shape[0] // 2
    sideways = jax.random.bernoulli(key)
    return jnp.where(jnp.where(sideways, half[None, :, None], half[:, None, None]), layer, other)


def train(net, sprites: list[world.Sprite]) -> dict[str, Array]:
    """Cross-entropy of both answers, on composed pictures with a little noise and without blur."""
    atlas = _atlas(sprites, "judge")
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, STEPS)
    params = net.init(jax.random.key(1))
    optimizer = make_muon(rate, weight_decay=1e-2)

    def batch(atlas, key):
        coin_key, picture_key, noise_key = jax.random.split(key, 3)
        deformed = jax.random.bernoulli(coin_key, DEFORMED_SHARE, (BATCH,))
        change = lambda layers, key: jnp.where(deformed[:, None, None, None], deform(layers, key), layers)  # noqa: E731
        images, labels = drawn(atlas, picture_key, BATCH, change)
        noise = 0.03 * jax.random.normal(noise_key, images.shape)
        return from_bytes(images) + noise, jnp.where(deformed, len(sprites), labels.sprite), labels.background

    def loss(params, images, labels, backgrounds):
        by_sprite, by_background = net.apply(params, images)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        return cross_entropy(by_sprite, labels).mean() + cross_entropy(by_background, backgrounds).mean()

    def step(state: TrainState, frozen, data, key):
        drawn_batch = split_batch(batch(data, jax.random.fold_in(key, state.step)))
        value, grads = jax.value_and_grad(loss)(state.trainable, *drawn_batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        return TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), opt_state, None), (value,)

    on_all = sharding.replicated(sharding.make_mesh())
    run = jax.jit(run_steps(step, 20), donate_argnums=0, out_shardings=on_all)
    state, atlas = jax.device_put((init_state(params, optimizer), atlas), on_all)
    with trange(0, STEPS, 20, desc="judge", mininterval=5) as bar:
        for _ in bar:
            state, (losses,) = run(state, {}, atlas, jax.random.key(2), jnp.asarray(20))
            bar.set_postfix(loss=f"{losses.mean():.3f}", refresh=False)
    return state.trainable


def core_sprites(source: str, held_out: bool = False) -> list[world.Sprite]:
    """The sprites of the embedded base's training, or those kept out of it."""
    found = world.load_sprites(source or None, held_out=held_out)
    return [sprite for sprite in found if sprite.noun in world.CORE_NOUNS]


def main() -> None:
    runtime.start()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", default="", help="folder with the three npm tarballs; default: they are fetched")
    judge = Judge(core_sprites(parser.parse_args().world))
    noun, background, rejected = judge.accuracy()
    print(f"on held-out composites: noun {noun:.1%} of {len(judge.nouns) - 1}, background {background:.1%};", end=" ")
    print(f"deformed ones rejected {rejected:.1%}")


if __name__ == "__main__":
    main()
