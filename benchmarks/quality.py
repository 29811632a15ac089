"""How good the embedded base is: its autoencoder, and its pictures before an independent judge (judge.py).

python benchmarks/quality.py              # prints the table; sheets go to --output
"""

import argparse
import functools
import json
import time
from pathlib import Path

import jax
import numpy as np
from judge import Judge, core_sprites

from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.sharding import make_mesh, param_sharding
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.files.safetensors import read_model
from dreambooth_jax.models.clip import CLIPModel, CLIPVisionSpec
from dreambooth_jax.models.clip_text import CLIPTextSpec
from dreambooth_jax.models.params import functional
from dreambooth_jax.painting.painter import Request, make_painter
from dreambooth_jax.painting.sheets import contact_sheet, save_png
from dreambooth_jax.tiny import world
from dreambooth_jax.tiny.world.names import with_article

NAMES, SAMPLES, BATCH = 100, 4, 16
STEPS = 25


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


def clip_cosines(pipeline, images: np.ndarray, texts: list[str]) -> np.ndarray:
    """What the CLIP beside a base makes of each picture and each text, scaled, [pictures, texts]."""
    folder = pipeline.folder / "clip"
    config = json.loads((folder / "config.json").read_text())
    text, vision = CLIPTextSpec.from_config(config["text_config"]), CLIPVisionSpec.from_config(config["vision_config"])
    clip = functional(lambda rngs: CLIPModel(text, vision, config["projection_dim"], rngs=rngs))
    pixels, end = images.astype(np.float32) / 127.5 - 1, pipeline.tokenizer.eos_token_id
    return np.asarray(
        clip.apply(read_model(folder, clip.shapes), pipeline.tokenize(texts)["ids"], pixels, end, method="logits")
    )


def top(probabilities: np.ndarray, answers: np.ndarray, k: int) -> np.ndarray:
    """Whether each answer is among the k most probable."""
    return (np.argsort(-probabilities, axis=1)[:, :k] == answers[:, None]).any(1)


def main() -> None:
    runtime.start()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--world", default="", help="folder with the two npm tarballs; default: they are fetched")
    parser.add_argument("--guidance", type=float, default=2.5, help="default: that of configs/dog.py")
    parser.add_argument("--dogs_seed", type=int, default=64, help='of the 64 pictures of "a dog"')
    parser.add_argument("--output", type=Path, default=Path("runs/quality"))
    options = parser.parse_args()
    sprites = core_sprites(options.world)
    judge = Judge(sprites)
    pipeline = load_pipeline(options.base)
    mesh = make_mesh()
    params = read_params(pipeline, functools.partial(param_sharding, mesh))
    painter = make_painter(
        pipeline, mesh, resolution=64, batch_size=BATCH, sampler="dpm++", steps=STEPS, guidance=options.guidance
    )

    def paint(prompts: list[str], seed: int) -> np.ndarray:
        keys = jax.random.split(jax.random.key(seed), len(prompts))
        painted = dict(painter(params, [Request(prompt, "", key) for prompt, key in zip(prompts, keys, strict=True)]))
        return np.stack([painted[i] for i in range(len(prompts))])

    def report(name: str, value: str, wanted: str = "") -> None:
        print(f"| {name} | {value} | {wanted} |", flush=True)

    print("| what | measured | wanted |\n|---|---|---|")
    noun, background = judge.accuracy()
    report("judge on held-out composites, noun", f"{noun:.1%} of {len(judge.nouns)}", ">= 95 %")
    report("judge on held-out composites, background", f"{background:.1%} of {len(world.BACKGROUNDS)}")

    images, _, labels, _ = world.render(sprites, 16 * BATCH, 64, seed=2, split="quality", subject_weight=1.0)
    shown = np.array([judge.nouns.index(sprites[label].noun) for label in labels])
    cosines = clip_cosines(pipeline, images, [f"a photo of {with_article(noun)}" for noun in judge.nouns])
    report("CLIP beside the base on held-out composites, noun", f"{top(cosines, shown, 1).mean():.1%}")
    again = reconstruct(pipeline, params, images)
    decibels = psnr(images, again)
    report("autoencoder, PSNR on held-out composites", f"{decibels.mean():.2f} dB", ">= 28 dB")
    rows = [row for i in range(0, 24, 8) for row in (images[i : i + 8], again[i : i + 8])]
    save_png(options.output / "autoencoder.png", contact_sheet(rows, ["picture", "again"] * 3), {})

    rng = np.random.default_rng(0)
    colours = tuple(world.COLOURS)
    names = [judge.nouns[i] for i in rng.choice(len(judge.nouns), NAMES, replace=False)]
    for title, asked, limits in (
        (f"{NAMES} names drawn from the vocabulary", names, (">= 60 %", ">= 85 %")),
        (f"{len(world.SUBJECT_NOUNS)} classes of DreamBooth's data set", list(world.SUBJECT_NOUNS), (">= 75 %", "")),
    ):
        asked = [name for name in asked for _ in range(SAMPLES)]
        behind = [colours[i] for i in rng.integers(len(colours), size=len(asked))]
        prompts = [
            f"a photo of {with_article(name)} on {with_article(colour)} background"
            for name, colour in zip(asked, behind, strict=True)
        ]
        painted = paint(prompts, seed=len(asked))
        verdict = judge(painted)
        answers = np.array([judge.nouns.index(name) for name in asked])
        wanted = np.array([world.BACKGROUNDS.index(colour) for colour in behind])
        first, fifth = (top(verdict.nouns, answers, k) for k in (1, 5))
        report(f"{title}: named thing is the judge's first guess", f"{first.mean():.1%}", limits[0])
        report(f"{title}: among its first five", f"{fifth.mean():.1%}", limits[1])
        report(f"{title}: named background colour", f"{top(verdict.backgrounds, wanted, 1).mean():.1%}", ">= 90 %")
        rows = painted.reshape(-1, SAMPLES, *painted.shape[1:])
        shares = first.reshape(-1, SAMPLES).mean(1)
        labels = [f"{name} {share:.0%}" for name, share in zip(asked[::SAMPLES], shares, strict=True)]
        save_png(options.output / f"names_{len(rows)}.png", contact_sheet(rows, labels), {})

    painted = paint(["a dog"] * 64, seed=options.dogs_seed)
    dogs = [i for i, sprite in enumerate(sprites) if sprite.noun == "dog"]
    variants = [sprites[dogs[i]].variant for i in judge(painted).sprites[:, dogs].argmax(1)]
    counts = sorted(((variants.count(v), v) for v in set(variants)), reverse=True)
    report('64 of "a dog": commonest variant', f"{counts[0][0] / 64:.0%} ({counts[0][1]})", "<= 60 %")
    report('64 of "a dog": variants', ", ".join(f"{v} {n}" for n, v in counts))
    save_png(options.output / "dogs.png", contact_sheet(painted.reshape(8, 8, *painted.shape[1:]), ["a dog"] * 8), {})

    paint(["a dog"] * BATCH, seed=0)
    started = time.perf_counter()
    paint(["a cat"] * BATCH, seed=1)
    report(f"{BATCH} pictures, {STEPS} steps, guidance", f"{time.perf_counter() - started:.1f} s", "< 20 s, two cores")


if __name__ == "__main__":
    main()
