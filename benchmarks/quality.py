"""How good the embedded base is, in features of ImageNet (EfficientNet-Lite0) and before a judge of its own (judge.py).

    python benchmarks/convert_weights.py efficientnet-lite0 && python benchmarks/convert_weights.py lpips-alex
    python benchmarks/quality.py              # prints the table; sheets go to --output

The references are rendered pictures of the world: poses and individuals of `load_sprites(held_out=True)` where a class
has them, and settings of a bank of their own. Precision and recall are those of arXiv 1904.06991, k = 3; KID is x 1000.
Every painted row has its ceilings beside it: other rendered pictures, and the references through the autoencoder.
"""

import argparse
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from judge import Judge, core_sprites

from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.evaluation import metrics
from dreambooth_jax.evaluation.features import imagenet_features, lpips_features
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.painting.painter import Request, make_painter
from dreambooth_jax.painting.sheets import contact_sheet, save_png
from dreambooth_jax.tiny import world
from dreambooth_jax.tiny.world.names import with_article

CACHE = Path("~/.cache/dreambooth_jax").expanduser()
COUNT, BATCH, TRAINING = 100, 20, 300
# The classes of DreamBooth's data set, as this world calls them (its "stuffed animal" is the teddy bear).
CLASSES = (
    "dog",
    "cat",
    "backpack",
    "teddy bear",
    "bowl",
    "can",
    "candle",
    "clock",
    "sneaker",
    "boot",
    "teapot",
    "glasses",
    "vase",
    "toy",
    "cartoon",
)
NO_DOGS = ("cow", "horse", "sheep", "pig", "tiger", "fox")  # the floor of "a dog"


class Score(NamedTuple):
    """Of a set of pictures against references. `copy`: mean of the largest cosines to a training picture."""

    precision: float
    recall: float
    kid: float
    copy: float


def reference_sprites(training: list[world.Sprite], held_out: list[world.Sprite], noun: str) -> list[world.Sprite]:
    """Held-out individuals and poses of a class, and its individuals that have neither other poses nor relatives."""
    kept = [sprite for sprite in held_out if sprite.noun == noun and sprite.style == "3d"]
    moving = {sprite.individual for sprite in kept}
    still = [s for s in training if s.noun == noun and s.style == "3d" and s.individual not in moving]
    return kept + still


def rendered(sprites: list[world.Sprite], count: int, split: str, seed: int = 0) -> np.ndarray:
    return world.render(sprites, count, 64, seed=seed, split=split)[0]


def reconstruct(pipeline, params, images: np.ndarray) -> np.ndarray:
    """Through the autoencoder and back, uint8."""
    there = jax.jit(lambda x: pipeline.encode_images(params, x)[0])
    back = jax.jit(lambda z: pipeline.decode(params, z))
    parts = [np.asarray(back(there(images[i : i + BATCH]))) for i in range(0, len(images), BATCH)]
    return np.round(np.concatenate(parts) * 255).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each of a batch of uint8 pictures, in dB."""
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean((1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-9))


def sharpness_ratio(images: np.ndarray, references: np.ndarray) -> float:
    """Mean variance of the Laplacian over that of the references."""
    return float(metrics.sharpness(images).mean() / metrics.sharpness(references).mean())


class Table:
    """Scores of picture sets against a class's references."""

    def __init__(self, features, sprites: list[world.Sprite], held_out: list[world.Sprite]):
        self.features, self.sprites, self.held_out = features, sprites, held_out
        self._known: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def of_class(self, noun: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """References of a class, their features, and the unit features of its training pictures."""
        if noun not in self._known:
            images = rendered(reference_sprites(self.sprites, self.held_out, noun), COUNT, "reference")
            members = [s for s in self.sprites if s.noun == noun]
            training = self.features.of(list(rendered(members, TRAINING, "train")))
            unit = training / np.linalg.norm(training, axis=1, keepdims=True)
            self._known[noun] = images, self.features.of(list(images)), unit
        return self._known[noun]

    def score(self, images: np.ndarray, noun: str) -> Score:
        _, references, training = self.of_class(noun)
        ours = self.features.of(list(images))
        unit = ours / np.linalg.norm(ours, axis=1, keepdims=True)
        precision, recall = metrics.precision_recall(references, ours)
        copy = metrics.closest(unit, training).similarity.mean()
        return Score(precision, recall, 1000 * metrics.kid(references, ours), float(copy))


def main() -> None:
    runtime.start()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--world", default="", help="folder with the three npm tarballs; default: they are fetched")
    parser.add_argument("--guidance", type=float, default=2.5, help="default: that of configs/dog.py")
    parser.add_argument("--steps", type=int, default=20, help="default: those of configs/dog.py")
    parser.add_argument("--classes", default=",".join(CLASSES), help="painted classes; the mean is over these")
    parser.add_argument("--judge", action="store_true", help="ask the judge too (trained first, in ten minutes)")
    parser.add_argument("--output", type=Path, default=Path("runs/quality"))
    options = parser.parse_args()
    sprites, held_out = core_sprites(options.world), core_sprites(options.world, held_out=True)
    mesh = make_mesh()
    table = Table(imagenet_features(CACHE / "efficientnet-lite0", mesh), sprites, held_out)
    pipeline = load_pipeline(options.base)
    params = read_params(pipeline, mesh)
    painter = make_painter(
        pipeline, mesh, resolution=64, batch_size=BATCH, sampler="dpm++", steps=options.steps, guidance=options.guidance
    )

    def paint(prompts: list[str], seed: int) -> np.ndarray:
        keys = jax.random.split(jax.random.key(seed), len(prompts))
        painted = dict(painter(params, [Request(prompt, "", key) for prompt, key in zip(prompts, keys, strict=True)]))
        return np.stack([painted[i] for i in range(len(prompts))])

    def report(name: str, *values: float | str) -> None:
        cells = [value if isinstance(value, str) else f"{value:.3g}" for value in values]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)

    dogs = table.of_class("dog")[0]
    print(f"references of a dog: checksum {zlib.crc32(dogs.tobytes()):08x}\n")
    print("| set | precision | recall | KID x 1000 | nearest training picture |\n|---|---|---|---|---|")
    report(
        "other rendered dogs", *table.score(rendered([s for s in sprites if s.noun == "dog"], COUNT, "other"), "dog")
    )
    again = reconstruct(pipeline, params, dogs)
    report("references through the autoencoder", *table.score(again, "dog"))
    others = [sprite for sprite in sprites if sprite.noun in NO_DOGS]
    report("rendered cows, horses, sheep, pigs, tigers, foxes", *table.score(rendered(others, COUNT, "other"), "dog"))
    painted = {}
    for noun in options.classes.split(","):
        painted[noun] = paint([f"a photo of {with_article(noun)}"] * COUNT, seed=len(painted))
        report(f"painted: a photo of {with_article(noun)}", *table.score(painted[noun], noun))
        rows = painted[noun][:80].reshape(8, 10, 64, 64, 3)
        save_png(options.output / f"{noun.replace(' ', '_')}.png", contact_sheet(rows, [noun] * 8), {})
    scores = np.array([table.score(images, noun) for noun, images in painted.items()])
    report(f"mean of the {len(painted)} classes", *scores.mean(0).tolist())

    print("\n| measure | value |\n|---|---|")
    lpips = lpips_features(CACHE / "lpips-alex", "alex", mesh, size=64)
    mixed = rendered(sprites, COUNT, "reference", seed=1)
    for name, images, through in (("dogs", dogs, again), ("all", mixed, reconstruct(pipeline, params, mixed))):
        distance = np.square(lpips.of(list(images)) - lpips.of(list(through))).sum(-1).mean()
        report(f"autoencoder, {name}: LPIPS (AlexNet, 64 px)", distance)
        report(f"autoencoder, {name}: PSNR, dB", psnr(images, through).mean())
        report(f"autoencoder, {name}: Laplacian variance / original", sharpness_ratio(through, images))
    for noun, images in painted.items():
        report(f"painted {noun}: Laplacian variance / references", sharpness_ratio(images, table.of_class(noun)[0]))
    rows = [row for i in range(0, 24, 8) for row in (dogs[i : i + 8], again[i : i + 8])]
    save_png(options.output / "autoencoder.png", contact_sheet(rows, ["picture", "again"] * 3), {})
    if options.judge:
        judge = Judge(sprites)
        noun, background, rejected = judge.accuracy()
        report("judge on held-out composites: noun, background, deformed rejected", *map(float, (noun, background)))
        report("judge: deformed ones rejected", float(rejected))
        named = [judge.named(images, [noun] * len(images)).mean() for noun, images in painted.items()]
        report(f"judge: painted thing named, mean of {len(named)} classes", float(np.mean(named)))
        ceiling = [judge.named(table.of_class(noun)[0], [noun] * COUNT).mean() for noun in painted]
        report("judge: references named, same classes", float(np.mean(ceiling)))
    started = time.perf_counter()
    paint(["a cat"] * BATCH, seed=1)
    report(f"{BATCH} pictures, {options.steps} steps, s", time.perf_counter() - started)


if __name__ == "__main__":
    main()
