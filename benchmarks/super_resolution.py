"""What tuning the super-resolution stage buys, and the noise on its condition (arXiv 2208.12242, supplement): the
embedded cascade with its stage II untuned, and tuned with sr_noise = 1e-5 and 1e-3. An untuned stage is painted at its
usual level of noise, "uniform", and at that of 1e-5.

    python benchmarks/convert_weights.py lpips-alex
    python benchmarks/super_resolution.py     # half an hour on two cores; goes on where it was stopped

A stage I per subject serves all arms. Each arm enlarges (a) pictures of the subject in settings and places that no
photo shows, made small, where the truth is known, and (b) pictures that stage I paints in the same settings. Features
are those of the ViT beside the embedded base; crops are the four quarters of a picture and its middle. Intervals are
95 % bootstraps over subjects; the last rows are paired differences.
"""

import argparse
import dataclasses
import functools
import runpy
from pathlib import Path

import jax
import numpy as np
from ablation import PLACES, ROOT, SETTINGS, SUBJECTS, interval, units
from kept import kept
from ml_collections import ConfigDict
from PIL import Image
from quality import CACHE, psnr, sharpness_ratio
from tqdm import tqdm

from dreambooth_jax import train
from dreambooth_jax.data.low_resolution import shrink
from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.evaluation import metrics
from dreambooth_jax.evaluation.features import ImageFeatures, lpips_features, subject_features
from dreambooth_jax.files.hub import EMBEDDED_FOLDER
from dreambooth_jax.painting.cascade import Stage, paint_stages
from dreambooth_jax.painting.painter import Request
from dreambooth_jax.painting.sheets import contact_sheet, save_png
from dreambooth_jax.runs.cascade import open_stages
from dreambooth_jax.runs.stages import stage_configs
from dreambooth_jax.tiny.world import load_sprites

SIDE, FACTOR, TIMES = 64, 2, 4  # TIMES: pictures per setting
CLASS_PICTURES = 40  # the arms share those of stage I, and each enlarges them itself
# name -> (whether stage II is tuned, its sr_noise)
ARMS = {
    "untuned, uniform": (False, "uniform"),
    "untuned, 1e-5": (False, "1e-5"),
    "tuned, 1e-5": (True, "1e-5"),
    "tuned, 1e-3": (True, "1e-3"),
}
PAIRS = (("tuned, 1e-5", "untuned, 1e-5"), ("tuned, 1e-5", "untuned, uniform"), ("tuned, 1e-5", "tuned, 1e-3"))
MEASURES = ("LPIPS", "PSNR", "crops", "sharpness", "cascade DINO", "cascade crops", "cascade sharpness")


def held_out(draw: dict, sprites: list, subject: str) -> np.ndarray:
    """Pictures of the subject in the settings of the prompts, uint8[n 64 64 3]: TIMES of each, in other places of the
    picture than the photos'."""
    name, coat, _ = draw["SUBJECTS"][subject]
    frames = [sprite for sprite in sprites if sprite.individual == name]
    pictures = []
    for number in range(TIMES * len(PLACES)):
        rng = np.random.default_rng((7, number))
        frame = frames[number % len(frames)]
        sprite = dataclasses.replace(frame, rgba=coat(frame.rgba))
        stand = rng.uniform(0.5, 0.85), rng.uniform(0.38, 0.62), rng.uniform(-12, 12), bool(rng.integers(2))
        picture = draw["picture"](rng, sprite, PLACES[number // TIMES], *stand)
        pictures.append(np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.LANCZOS)))
    return np.stack(pictures)


def crops(images: np.ndarray) -> list[np.ndarray]:
    """Four quarters and the middle of each picture, picture by picture."""
    half = SIDE // 2
    corners = [(0, 0), (0, half), (half, 0), (half, half), (half // 2, half // 2)]
    return [image[top : top + half, left : left + half] for image in images for top, left in corners]


def folder_of(arm: str, folder: Path) -> Path:
    """The workdir of a subject's arm."""
    return folder / arm.replace(", ", "_").replace(" ", "_")


def settings(subject: str, folder: Path, arm: str, steps: int) -> ConfigDict:
    """The run of an arm, whose stage I is that of the subject."""
    config = runpy.run_path(str(ROOT / "configs" / "dog.py"))["get_config"]("tiny_cascade")
    (fields,) = config.stage_fields
    own = dict(fields) | {"steps": steps, "sr_noise": ARMS[arm][1]}
    config.update(
        workdir=str(folder_of(arm, folder)),
        instance_images=str(ROOT / "examples" / "subjects" / subject),
        class_noun=SUBJECTS[subject],
        num_class_images=CLASS_PICTURES,
        sample_prompts=(),
        stage_fields=(tuple(own.items()),),
    )
    shared, first = folder / "stage1", Path(config.workdir) / "stage1"
    if not first.exists():
        first.parent.mkdir(parents=True, exist_ok=True)
        shared.mkdir(exist_ok=True)
        first.symlink_to(shared)
    return config


def tune(config: ConfigDict, stage: int) -> None:
    """Trains one stage, or nothing where it is trained already."""
    train.run(ConfigDict(dict(config) | {"stage": stage}))


def first_pictures(config: ConfigDict, prompts: list[str]) -> list[np.ndarray]:
    """What the subject's stage I paints."""
    keys = jax.random.split(jax.random.key(1000), len(prompts))
    requests = [Request(prompt, "", key) for prompt, key in zip(prompts, keys, strict=True)]
    return paint_stages(open_stages(stage_configs(config)[:1], make_mesh()), requests)[0]


def second_stage(config: ConfigDict, tuned: bool) -> Stage:
    """Stage II of a trained arm, or the base."""
    (stage,) = open_stages(stage_configs(config)[1:], make_mesh(), bases=not tuned)
    return stage


def enlarge(stage: Stage, prompts: list[str], small: list[np.ndarray]) -> np.ndarray:
    keys = jax.random.split(jax.random.key(2000), len(prompts))
    requests = [Request(prompt, "", *pair) for prompt, pair in zip(prompts, zip(keys, small, strict=True), strict=True)]
    painted = dict(stage.paint(stage.params, requests))
    return np.stack([painted[number] for number in range(len(requests))])


def run_subject(
    subject: str, arm: str, steps: int, folder: Path, truth: np.ndarray, look: ImageFeatures, lpips: ImageFeatures
) -> dict:
    """Trains what the arm still lacks, enlarges and measures; its pictures lie in `folder`."""
    tuned, _ = ARMS[arm]
    config = settings(subject, folder, arm, steps)
    tune(config, 1)
    if tuned:
        tune(config, 2)
    prompts = [f"a {config.identifier} {SUBJECTS[subject]} {place}" for place in SETTINGS for _ in range(TIMES)]
    small = first_pictures(config, prompts)
    stage = second_stage(config, tuned)
    large, painted = enlarge(stage, prompts, list(shrink(truth, FACTOR))), enlarge(stage, prompts, small)
    np.savez(Path(config.workdir) / "pictures.npz", truth=truth, large=large, small=np.stack(small), painted=painted)
    photos = np.stack(
        [
            np.asarray(Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS))
            for path in sorted(Path(config.instance_images).glob("*.jpg"))
        ]
    )
    one, other = (lpips.of(list(images)) for images in (large, truth))
    ours, theirs = (units(look.of(crops(images))) for images in (large, truth))
    return {
        "of": subject,
        "arm": arm,
        "LPIPS": float(np.square(one - other).sum(-1).mean()),
        "PSNR": float(psnr(large, truth).mean()),
        "crops": float((ours * theirs).sum(-1).mean()),
        "sharpness": sharpness_ratio(large, truth),
        "cascade DINO": float(metrics.similarity(units(look.of(list(painted))), units(look.of(list(photos))))),
        "cascade crops": float(metrics.similarity(units(look.of(crops(painted))), units(look.of(crops(photos))))),
        "cascade sharpness": sharpness_ratio(painted, truth),
    }


def save_sheet(subject: str, folder: Path) -> None:
    """One picture per setting: the truth and what each arm makes of it; what stage I painted and what each arm makes of
    that."""
    found = {arm: np.load(folder_of(arm, folder) / "pictures.npz") for arm in ARMS}
    first = found[next(iter(ARMS))]

    def doubled(images: np.ndarray) -> list[np.ndarray]:
        return [np.asarray(Image.fromarray(x).resize((SIDE, SIDE), Image.Resampling.NEAREST)) for x in images]

    chosen = slice(0, None, TIMES)
    rows = [list(first["truth"][chosen]), doubled(shrink(first["truth"][chosen], FACTOR))]
    rows += [list(found[arm]["large"][chosen]) for arm in ARMS]
    rows += [doubled(first["small"][chosen])] + [list(found[arm]["painted"][chosen]) for arm in ARMS]
    labels = [f"{subject}, not in training", "made small", *ARMS, "stage I", *(f"cascade: {arm}" for arm in ARMS)]
    enlarged = [[image.repeat(2, 0).repeat(2, 1) for image in row] for row in rows]
    save_png(folder.parent / f"{subject}.png", contact_sheet(enlarged, labels, SETTINGS), {})


def table(results: list[dict]) -> str:
    """Means with intervals per arm, then paired differences."""
    rng = np.random.default_rng(0)
    rows = {(row["of"], row["arm"]): row for row in results}
    complete = [subject for subject in SUBJECTS if all((subject, arm) in rows for arm in ARMS)]

    def of(arm: str, measure: str) -> np.ndarray:
        return np.array([rows[subject, arm][measure] for subject in complete])

    def cell(values: np.ndarray, sign: str = "") -> str:
        low, high = interval(values[:, None], rng)
        return f"{values.mean():{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"

    lines = [f"| {len(complete)} subjects | " + " | ".join(MEASURES) + " |", "|---|" + "---|" * len(MEASURES)]
    lines += [f"| {arm} | " + " | ".join(cell(of(arm, m)) for m in MEASURES) + " |" for arm in ARMS]
    for one, other in PAIRS:
        differences = [cell(of(one, m) - of(other, m), "+") for m in MEASURES]
        lines.append(f"| ({one}) - ({other}) | " + " | ".join(differences) + " |")
    return "\n".join(lines)


def main() -> None:
    runtime.start()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="of stage II; stage I has those of its preset")
    parser.add_argument("--subjects", default=",".join(SUBJECTS))
    parser.add_argument("--world", default="", help="folder with the three npm tarballs; default: they are fetched")
    parser.add_argument("--output", type=Path, default=Path("runs/super_resolution"))
    options = parser.parse_args()
    mesh, output = make_mesh(), options.output.absolute()
    look = subject_features(EMBEDDED_FOLDER / "vit", mesh, transform="square")
    lpips = lpips_features(CACHE / "lpips-alex", "alex", mesh, size=SIDE)
    draw = runpy.run_path(str(ROOT / "examples" / "subjects" / "draw.py"))
    known = [load_sprites(options.world or None, longest=draw["SIZE"], held_out=kept_out) for kept_out in (True, False)]
    sprites = [sprite for part in known for sprite in part]
    results = []
    for subject in (progress := tqdm(options.subjects.split(","))):
        truth = held_out(draw, sprites, subject)
        for arm in ARMS:
            progress.set_description(f"{subject}, {arm}")
            name = f"{subject}, {arm}, {options.steps} steps"
            folder = output / subject
            run = functools.partial(run_subject, subject, arm, options.steps, folder, truth, look, lpips)
            results.append(kept(output / "results.jsonl", name, run))
        save_sheet(subject, folder)
    print(table(results))


if __name__ == "__main__":
    main()
