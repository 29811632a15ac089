"""The paper's ablations on the embedded base: what the prior buys, and what the class noun (arXiv 2208.12242, tables 3
and 4), averaged over the six example subjects and several seeds.

    python benchmarks/ablation.py             # an hour or two on two cores; goes on where it was stopped

Each run trains on one subject, then paints it in settings that its photos do not show, and its bare class. Features
are those of the ViT beside the base, but for the subject score (`Ruler`), whose weights come from
`python benchmarks/convert_weights.py efficientnet-lite0`. Results are kept as one JSON line per run; intervals are 95 %
bootstraps over subjects.
"""

import argparse
import dataclasses
import functools
import json
import runpy
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from kept import kept
from PIL import Image
from tqdm import tqdm

from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.evaluation import metrics
from dreambooth_jax.evaluation.features import imagenet_features
from dreambooth_jax.families.pipeline import read_params
from dreambooth_jax.files.hub import EMBEDDED_FOLDER
from dreambooth_jax.files.safetensors import read_model
from dreambooth_jax.models.params import functional
from dreambooth_jax.models.vit import ViTModel, ViTSpec
from dreambooth_jax.ops.pixels import from_bytes
from dreambooth_jax.painting.painter import Request
from dreambooth_jax.painting.sheets import contact_sheet, save_png
from dreambooth_jax.runs.job import fresh_state, lower_steps
from dreambooth_jax.runs.setup import begin, prepare_data, set_up
from dreambooth_jax.tiny.world import load_sprites

ROOT = Path(__file__).parent.parent
SUBJECTS = {"dog": "dog", "cat": "cat", "car": "car", "backpack": "backpack", "teapot": "teapot", "robot": "robot"}
WRONG = {"dog": "can", "cat": "boot", "car": "clock", "backpack": "duck", "teapot": "sneaker", "robot": "bowl"}
SETTINGS = ("in the snow", "on the beach", "in front of a brick wall", "on a red background")
PLACES = ("snow", "beach", "brick wall", "red")  # the same, as the world calls them
CLASS_PICTURES = 32

# name -> (prior preservation, what stands for the class noun in the instance prompt)
ARMS = {
    "prior, right noun": (True, lambda subject: SUBJECTS[subject]),
    "no prior, right noun": (False, lambda subject: SUBJECTS[subject]),
    "no prior, no noun": (False, lambda subject: ""),
    "no prior, wrong noun": (False, lambda subject: WRONG[subject]),
}


class Ruler:
    """The subject score, in ImageNet features: 0 for other members of the class, 1 for the subject itself.

    Both are rendered in the settings of the prompts, so that the score of what is painted has its ceiling at 1.
    """

    def __init__(self, source: str):
        self.draw = runpy.run_path(str(ROOT / "examples" / "subjects" / "draw.py"))
        known = [
            load_sprites(source or None, longest=self.draw["SIZE"], held_out=kept_out) for kept_out in (False, True)
        ]
        self.sprites = [sprite for part in known for sprite in part if sprite.style == "3d"]
        features = imagenet_features(Path("~/.cache/dreambooth_jax/efficientnet-lite0").expanduser(), make_mesh())
        self._features = lambda images: jnp.asarray(units(features.of(list(images))))

    def __call__(self, subject: str, noun: str, painted: np.ndarray, photos: np.ndarray) -> float:
        """(painted - others) / (itself - others), each the mean cosine of pictures to the photos."""
        name, coat, _ = self.draw["SUBJECTS"][subject]
        itself = [s for s in self.sprites if s.individual == name]
        coated = [dataclasses.replace(sprite, rgba=coat(sprite.rgba)) for sprite in itself]
        others = [s for s in self.sprites if s.noun == noun and s.individual != name]
        reals = self._features(photos)
        near = [self._features(images) for images in (painted, self._rendered(coated), self._rendered(others))]
        ours, own, other = (float(metrics.similarity(features, reals)) for features in near)
        return (ours - other) / (own - other)

    def _rendered(self, sprites: list) -> np.ndarray:
        """Sixteen pictures in the settings of the prompts, as small as those that the base paints."""
        pictures = []
        for i in range(4 * len(PLACES)):
            rng = np.random.default_rng(i)
            sprite, stand = sprites[i % len(sprites)], self.draw["POSES"][i % len(self.draw["POSES"])]
            image = self.draw["picture"](rng, sprite, PLACES[i % len(PLACES)], *stand)
            pictures.append(np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.LANCZOS)))
        return np.stack(pictures)


def units(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Eye:
    """The ViT beside the base."""

    def __init__(self):
        folder = EMBEDDED_FOLDER / "vit"
        spec = ViTSpec.from_config(json.loads((folder / "config.json").read_text()))
        vit = functional(lambda rngs: ViTModel(spec, rngs=rngs))
        params = read_model(folder, vit.shapes)
        self._features = jax.jit(lambda x: vit.apply(params, from_bytes(x), method="features"))
        self._states = jax.jit(lambda x: vit.apply(params, from_bytes(x), method="hidden_states"))

    def features(self, images: np.ndarray) -> jax.Array:
        return self._features(images)

    def states(self, images: np.ndarray) -> list[jax.Array]:
        return [state[:, 1:] for state in self._states(images)]


def run_one(subject: str, arm: str, seed: int, steps: int, output: Path, eye: Eye, ruler: Ruler) -> dict:
    """Trains, paints and measures; class images and a sheet of pictures lie in `output`."""
    prior, noun_of = ARMS[arm]
    noun, wanted = SUBJECTS[subject], noun_of(subject)
    config = runpy.run_path(str(ROOT / "configs" / "dog.py"))["get_config"]()
    with tempfile.TemporaryDirectory() as workdir:
        config.update(
            workdir=workdir,
            instance_images=str(ROOT / "examples" / "subjects" / subject),
            class_noun=noun,
            instance_prompt=f"a photo of {{identifier}} {wanted}".rstrip(),
            prior_preservation=prior,
            class_images=str(output / "class_images" / noun),
            create_class_images=True,
            seed=seed,
            steps=steps,
        )
        run = set_up(config)
        params = read_params(run.pipeline, run.mesh)
        trainable, frozen, key = begin(run.job, params)
        (data,) = prepare_data(run, run.job.method.combine(frozen, trainable))
        state = fresh_state(run.job, trainable)
        advance = lower_steps(run.job, state, frozen, data, key).compile()
        for start in range(0, steps, config.steps_per_call):
            number = min(config.steps_per_call, steps - start)
            state, _ = advance(state, frozen, data, key, jnp.asarray(number, jnp.int32))
        tuned = run.job.method.combine(frozen, state.trainable)

        def paint(prompts: list[str]) -> np.ndarray:
            keys = jax.random.split(jax.random.key(1000 + seed), len(prompts))
            requests = [Request(prompt, "", key) for prompt, key in zip(prompts, keys, strict=True)]
            painted = dict(run.paint(tuned, requests))
            return np.stack([painted[i] for i in range(len(requests))])

        phrase = f"a {config.identifier} {wanted}".rstrip()
        of_subject = paint([f"{phrase} {place}" for place in SETTINGS for _ in range(4)])
        same_prompt = of_subject.reshape(len(SETTINGS), 4, *of_subject.shape[1:])
        of_class = paint([f"a {noun}"] * CLASS_PICTURES)
        real = run.examples[0].images
    rows = [list(real), *map(list, same_prompt), list(of_class[:8])]
    sheet = f"{subject}_{arm}_seed_{seed}_{steps}_steps.png".replace(", ", "_").replace(" ", "-")
    save_png(output / sheet, contact_sheet(rows, [f"{subject}, {arm}", *SETTINGS, f"a {noun}"]), {})
    reals = eye.features(real)
    return {
        "of": subject,
        "arm": arm,
        "subject": ruler(subject, noun, of_subject, real),
        "DINO": float(metrics.similarity(eye.features(of_subject), reals)),
        "PRES": float(metrics.similarity(eye.features(of_class), reals)),
        "DIV": float(np.mean([metrics.diversity(eye.states(row)) for row in same_prompt])),
        "class DIV": float(metrics.diversity(eye.states(of_class))),
    }


MEASURES = ("subject", "DINO", "PRES", "DIV", "class DIV")


def interval(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over subjects; `values` [subjects, seeds]."""
    picks = rng.integers(len(values), size=(10_000, len(values)))
    return tuple(np.quantile(values.mean(1)[picks].mean(1), (0.025, 0.975)))


def table(results: list[dict]) -> str:
    """Means with intervals per arm, then the paired differences to the first arm that each question asks about."""
    rng = np.random.default_rng(0)
    complete = [s for s in SUBJECTS if all(any(r["of"] == s and r["arm"] == a for r in results) for a in ARMS)]

    def of(arm: str, measure: str) -> np.ndarray:
        rows = {s: [r[measure] for r in results if r["of"] == s and r["arm"] == arm] for s in complete}
        fewest = min(map(len, rows.values()))
        return np.array([row[:fewest] for row in rows.values()])

    def cell(values: np.ndarray, sign: str = "") -> str:
        low, high = interval(values, rng)
        return f"{values.mean():{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"

    head = f"| {len(complete)} subjects | " + " | ".join(MEASURES) + " |\n|---|" + "---|" * len(MEASURES)
    lines = [f"| {arm} | " + " | ".join(cell(of(arm, m)) for m in MEASURES) + " |" for arm in ARMS]
    for arm, other in (
        ("no prior, right noun", "prior, right noun"),
        ("no prior, no noun", "no prior, right noun"),
        ("no prior, wrong noun", "no prior, right noun"),
    ):
        pairs = ((of(arm, m), of(other, m)) for m in MEASURES)
        cells = (cell(a.mean(1, keepdims=True) - b.mean(1, keepdims=True), "+") for a, b in pairs)
        lines.append(f"| {arm} - {other} | " + " | ".join(cells) + " |")
    return "\n".join([head, *lines])


def main() -> None:
    runtime.start()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--world", default="", help="folder with the three npm tarballs; default: they are fetched")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    options = parser.parse_args()
    runs = [(s, a, seed) for seed in range(options.seeds) for s in SUBJECTS for a in ARMS]
    eye, ruler = Eye(), Ruler(options.world)
    results = []
    for subject, arm, seed in tqdm(runs, desc="runs"):
        name = f"{subject}, {arm}, seed {seed}, {options.steps} steps"
        run = functools.partial(run_one, subject, arm, seed, options.steps, options.output, eye, ruler)
        results.append(kept(options.output / "results.jsonl", name, run))
    print(table(results))


if __name__ == "__main__":
    main()
