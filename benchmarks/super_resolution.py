"""What tuning the super-resolution stage on the subject's photos gives, and the noise on its condition (arXiv
2208.12242, supplement), on a cascade that `pretrain` has trained.

    python -m dreambooth_jax.pretrain --config configs/tiny_cascade.py
    python benchmarks/convert_weights.py lpips-alex
    python benchmarks/super_resolution.py --base runs/tiny_cascade/base    # goes on where it was stopped

Six subjects, one stage I each, and stage II untuned or tuned with each noise. Photos that no stage has seen, made
small, are enlarged again and compared with themselves: LPIPS, PSNR, and the cosine of crops in the ViT beside the
embedded base. Pictures of the whole cascade are compared with the photos. Intervals are 95 % bootstraps over subjects;
differences are paired.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from dreambooth_jax.data.low_resolution import shrink
from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.diffusion.low_resolution import UNIFORM
from dreambooth_jax.evaluation.dataset import read_photos
from dreambooth_jax.evaluation.features import lpips_features, subject_features
from dreambooth_jax.evaluation.metrics import Interval, bootstrap
from dreambooth_jax.evaluation.prompts import filled
from dreambooth_jax.evaluation.transforms import Picture
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.files.hub import EMBEDDED_FOLDER
from dreambooth_jax.painting.cascade import Stage, paint_stages
from dreambooth_jax.painting.painter import Request
from dreambooth_jax.painting.sheets import contact_sheet, save_png
from dreambooth_jax.runs.cascade import open_stages
from dreambooth_jax.runs.config import absolute_paths
from dreambooth_jax.runs.config_file import load
from dreambooth_jax.runs.job import painter_of, pictures_at_once
from dreambooth_jax.runs.stages import stage_configs
from dreambooth_jax.tiny.world import EXAMPLE_NOUNS

ROOT = Path(__file__).parent.parent
DOG = ROOT / "configs" / "dog.py"
LPIPS = Path("~/.cache/dreambooth_jax/lpips-alex").expanduser()
SETTINGS = ("in the snow", "on the beach", "in front of a brick wall", "on a red background")
COUNT = 4  # pictures per setting, and draws of noise per photo
MEASURES = ("LPIPS to the photo", "PSNR, dB", "ViT of crops", "painted: ViT to the photos", "painted: sharpness")


class Arm(NamedTuple):
    """A stage II: whether it is tuned, and the variance of the noise on its condition, in tuning and painting."""

    tuned: bool
    noise: str


ARMS = {
    "untuned, usual noise": Arm(False, UNIFORM),
    "untuned, 1e-5": Arm(False, "1e-5"),
    "tuned, 1e-5": Arm(True, "1e-5"),
    "tuned, 1e-3": Arm(True, "1e-3"),
    "tuned, any noise": Arm(True, UNIFORM),
}
DIFFERENCES = (
    ("tuned, 1e-5", "untuned, 1e-5"),
    ("tuned, 1e-5", "untuned, usual noise"),
    ("tuned, 1e-5", "tuned, 1e-3"),
    ("tuned, 1e-5", "tuned, any noise"),
)


class Place(NamedTuple):
    """Where everything lies: a folder for runs and sheets, and that of the base's stages; `steps` is for trials."""

    output: Path
    base: Path
    steps: int


def fields_of(place: Place, noun: str, noise: str) -> dict[str, Any]:
    """The fields of a subject's run with that noise."""
    return {
        "base": str(place.base / "stage1"),
        "stages": (str(place.base / "stage2"),),
        "stage_fields": ((("guidance_scale", 1.5),),),
        "instance_images": str(ROOT / "examples" / "subjects" / noun),
        "class_noun": noun,
        "workdir": str(place.output / noun / noise),
        "sr_noise": noise,
        "train_text_encoder": False,
        "sampler": "ddpm",
        "sampling_steps": 50,
        "steps": place.steps,
        "sample_every": place.steps,
        "save_every": place.steps,
    }


def config_of(place: Place, noun: str, noise: str) -> ConfigDict:
    """The cascade's run of a subject with that noise."""
    config = load(str(DOG))
    config.update(fields_of(place, noun, noise))
    return config


def train(place: Place, noun: str, noise: str) -> None:
    """Trains what is missing of a subject's run; the runs of all noises share a stage I."""
    fields = fields_of(place, noun, noise)
    command = [sys.executable, "-m", "dreambooth_jax.train", "--config", str(DOG)]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    first, shared = Path(fields["workdir"]) / "stage1", place.output / noun / "stage1"
    if not shared.exists():
        subprocess.run([*command, "--config.stage=1"], check=True)
        first.rename(shared)
    if not first.exists():
        first.symlink_to(shared)
    subprocess.run([*command, "--config.stage=2"], check=True)


def held_out_photos(place: Place, noun: str) -> list[Picture]:
    """Photos of the subject in other views, 64 pixels a side."""
    drawn = place.output / "drawn"
    if not drawn.exists():
        command = [sys.executable, str(ROOT / "examples" / "subjects" / "draw.py"), "--further", "--out", str(drawn)]
        subprocess.run(command, check=True)
    return _sized(read_photos(drawn / noun))


def _sized(photos: list[Picture]) -> list[Picture]:
    """As a run's examples are made."""
    fitted = (ImageOps.fit(Image.fromarray(photo), (64, 64), Image.Resampling.LANCZOS) for photo in photos)
    return [np.asarray(photo) for photo in fitted]


def stages_of(place: Place, noun: str, arm: Arm, mesh: Mesh) -> list[Stage]:
    """Stage I as it is tuned, and the arm's stage II."""
    config = config_of(place, noun, arm.noise if arm.tuned else "1e-5")
    configs = stage_configs(absolute_paths(config))
    first, second = open_stages(configs, mesh)
    if arm.tuned:
        return [first, second]
    own = ConfigDict(configs[1])
    own.sr_noise = arm.noise
    pipeline = load_pipeline(own.base)
    paint = painter_of(own, pipeline, mesh, batch_size=pictures_at_once(own, mesh), trained=False)
    return [first, Stage(paint, read_params(pipeline, mesh))]


def crops(picture: Picture) -> list[Picture]:
    """The four quarters and the middle."""
    half = picture.shape[0] // 2
    places = [(0, 0), (0, half), (half, 0), (half, half), (half // 2, half // 2)]
    return [picture[top : top + half, left : left + half] for top, left in places]


def sharpness(pictures: list[Picture]) -> float:
    """Mean variance of the Laplacian."""
    grey = np.stack(pictures).astype(float).mean(-1)
    around = sum(np.roll(grey, shift, axis) for shift in (1, -1) for axis in (1, 2))
    return float((4 * grey - around)[:, 1:-1, 1:-1].var((1, 2)).mean())


class Ruler:
    """The measures of an arm's pictures."""

    def __init__(self, mesh: Mesh):
        self._vit = subject_features(EMBEDDED_FOLDER / "vit", mesh, transform="square").of
        self._lpips = lpips_features(LPIPS, "alex", mesh, size=64).of

    def measure(
        self, photos: list[Picture], unseen: list[Picture], enlarged: list[Picture], painted: list[Picture]
    ) -> dict[str, float]:
        """
        Args:
            photos: of the training.
            unseen, enlarged: photos, and the same made small and enlarged.
            painted: pictures of the whole cascade.
        """
        distance = np.square(self._lpips(enlarged) - self._lpips(unseen)).sum(-1).mean()
        errors = [np.square(a.astype(float) - b).mean() for a, b in zip(enlarged, unseen, strict=True)]
        ours, theirs = (self._vit([c for p in pictures for c in crops(p)]) for pictures in (enlarged, unseen))
        pairs = _units(self._vit(painted)) @ _units(self._vit(photos)).T
        values = (
            float(distance),
            float(np.mean(10 * np.log10(255**2 / np.array(errors)))),
            float((_units(ours) * _units(theirs)).sum(-1).mean()),
            float(pairs.mean()),
            sharpness(painted) / sharpness(photos),
        )
        return dict(zip(MEASURES, values, strict=True))


def _units(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def run_arm(place: Place, noun: str, name: str, mesh: Mesh, ruler: Ruler) -> tuple[dict[str, float], list[list]]:
    """The measures of an arm for a subject, and rows of pictures: photos, small, enlarged, painted by each stage."""
    config = config_of(place, noun, "1e-5")
    stages = stages_of(place, noun, ARMS[name], mesh)
    photos, unseen = _sized(read_photos(config.instance_images)), held_out_photos(place, noun)
    small = shrink(np.stack(unseen), 2)
    prompt = filled(config.instance_prompt, config.identifier, noun)
    requests = [Request(prompt, "", jax.random.key(seed), low) for seed in range(COUNT) for low in small]
    enlarged = [picture for _, picture in sorted(dict(stages[1].paint(stages[1].params, requests)).items())]
    prompts = [filled(f"a {{identifier}} {{class_noun}} {place}", config.identifier, noun) for place in SETTINGS]
    first, second = paint_stages(stages, [Request(p, "", jax.random.key(s)) for p in prompts for s in range(COUNT)])
    found = ruler.measure(photos, unseen * COUNT, enlarged, second)
    coarse = [[picture.repeat(2, 0).repeat(2, 1) for picture in row] for row in (small, first[::COUNT])]
    return found, [unseen, coarse[0], enlarged[: len(unseen)], coarse[1], second[::COUNT]]


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """A row per arm, then the differences."""

    def values(arm: str, measure: str) -> np.ndarray:
        return np.array([found[measure] for found in results[arm].values()])

    lines = [f"| {len(EXAMPLE_NOUNS)} subjects | {' | '.join(MEASURES)} |", "|---|" + "---|" * len(MEASURES)]
    lines += [f"| {arm} | {' | '.join(_cell(bootstrap(values(arm, name))) for name in MEASURES)} |" for arm in results]
    for arm, other in DIFFERENCES:
        found = [bootstrap(values(arm, name) - values(other, name)) for name in MEASURES]
        lines.append(f"| {arm} - {other} | {' | '.join(_cell(x, '+') for x in found)} |")
    return "\n".join(lines)


def _cell(found: Interval, sign: str = "") -> str:
    return f"{found.mean:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/tiny_cascade/base"), help="folder of stage1 and stage2")
    parser.add_argument("--output", type=Path, default=Path("runs/super_resolution"))
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    place = Place(options.output.absolute(), options.base.absolute(), options.steps)
    runtime.start()
    for noun in EXAMPLE_NOUNS:
        for arm in ARMS.values():
            if arm.tuned:
                train(place, noun, arm.noise)
    mesh = make_mesh()
    ruler = Ruler(mesh)
    results: dict[str, dict[str, dict[str, float]]] = {name: {} for name in ARMS}
    for noun in EXAMPLE_NOUNS:
        for number, name in enumerate(ARMS):
            results[name][noun], rows = run_arm(place, noun, name, mesh, ruler)
            labels = ["photos of no training", "made small", f"stage II, {name}", "stage I", f"stage II, {name}"]
            save_png(place.output / f"{noun}_{number}.png", contact_sheet(rows, labels), {})
    print(table(results))


if __name__ == "__main__":
    main()
