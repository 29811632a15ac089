"""The paper's four ablations on the embedded base: the prior, the class noun, the number of photos, the identifier
(arXiv 2208.12242, sections 3.2, 3.3 and 4.3), on twelve drawn subjects.

    python examples/subjects/draw.py --further --out runs/drawn
    python benchmarks/four_ablations.py         # an hour on two cores; goes on where it was stopped

An arm trains a LoRA of every subject, all in one program (configs/many.py). Its pictures, sixteen in four settings and
sixteen of the bare class, are scored by the models beside the base against all five photos of the subject. Results are
kept as one JSON line per arm; intervals are 95 % bootstraps over subjects. The prompts of an arm have its own noun and
identifier, CLIP-T always has the right noun. `benchmarks/ablation.py` asks the first two questions of full fine-tuning.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from kept import kept

from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.evaluation import metrics
from dreambooth_jax.evaluation.dataset import Subject, read_dataset, read_photos
from dreambooth_jax.evaluation.judge import Judge, embedded_judge
from dreambooth_jax.evaluation.scores import Painted, score
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.files.lora_read import read_adapters, with_adapters
from dreambooth_jax.painting.sheets import paint_rows, save_sheet
from dreambooth_jax.runs import config_file
from dreambooth_jax.runs.job import painter_of

ROOT = Path(__file__).parent.parent
SUBJECTS = tuple(name for noun in ("dog", "cat", "car", "backpack", "teapot", "robot") for name in (noun, f"{noun}_1"))
WRONG = {"dog": "can", "cat": "boot", "car": "clock", "backpack": "duck", "teapot": "sneaker", "robot": "bowl"}
SETTINGS = ("in the snow", "on the beach", "in front of a brick wall", "on a red background")
COUNT, CLASS_COUNT = 4, 16
MEASURES = ("DINO", "CLIP-T", "PRES", "DIV", "drift")


class Arm(NamedTuple):
    """What an arm changes.

    Attributes:
        fields: of the config.
        noun: "right", "none" or "wrong".
        photos: number of photos that train.
        identifier: in place of the rare token.
    """

    fields: tuple[tuple[str, object], ...] = ()
    noun: str = "right"
    photos: int = 5
    identifier: str = "sks"

    def noun_of(self, subject: Subject) -> str:
        return {"right": subject.class_noun, "none": "", "wrong": WRONG[subject.class_noun]}[self.noun]

    def phrase(self, subject: Subject) -> str:
        """The identifier and the noun of a subject, as they stand in prompts."""
        return f"{self.identifier} {self.noun_of(subject)}".rstrip()


WITHOUT = (("prior_preservation", False),)
# Question -> its arms; the first is the one that the others are compared with.
QUESTIONS = {
    "prior": {
        "prior of class images": Arm(),
        "no prior": Arm(WITHOUT),
        "prior of the base's predictions": Arm((("prior_target", "base"),)),
    },
    "class noun, no prior": {
        "right noun": Arm(WITHOUT),
        "no noun": Arm(WITHOUT, noun="none"),
        "wrong noun": Arm(WITHOUT, noun="wrong"),
    },
    "photos": {f"{n} photo{'s' * (n > 1)}": Arm(photos=n) for n in (5, 4, 3, 2, 1)},
    "identifier": {
        "rare token: sks": Arm(),
        "common word: brown": Arm(identifier="brown"),
        "random letters: xxy5syt00": Arm(identifier="xxy5syt00"),
    },
}


def key_of(arm: Arm) -> str:
    """Names an arm's row and folder: arms of two questions may be the same."""
    settings = "_".join(f"{name}={value}" for name, value in arm.fields) or "prior"
    return f"{settings}_{arm.noun}_{arm.photos}_{arm.identifier}"


def train(arm: Arm, subjects: list[Subject], folder: Path, classes: Path, steps: int) -> None:
    """The files folder/NAME.safetensors of all subjects; the command goes on where it was stopped."""
    table = folder / "subjects.csv"
    folder.mkdir(parents=True, exist_ok=True)
    if classes.exists() and not (folder / "classes").exists():
        shutil.copytree(classes, folder / "classes")  # class images of another arm, which are the same
    with table.open("w") as file:
        rows = csv.writer(file)
        rows.writerow(("name", "photos", "identifier", "class_noun"))
        for subject in subjects:
            photos = folder / "photos" / subject.name
            shutil.rmtree(photos, ignore_errors=True)
            photos.mkdir(parents=True)
            for path in sorted(subject.folder.glob("*.jpg"))[: arm.photos]:
                shutil.copy(path, photos)
            rows.writerow((subject.name, photos, arm.identifier, arm.noun_of(subject) or subject.class_noun))
    fields = dict(arm.fields) | {"subjects": table, "workdir": folder, "steps": steps}
    if arm.noun == "none":
        fields["instance_prompt"] = "a photo of {identifier}"
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, "-m", "dreambooth_jax.train", "--config", f"{ROOT}/configs/many.py", *flags]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


class Studio:
    """Paints with the base and with adapters."""

    def __init__(self):
        self.config, self.mesh = config_file.load(str(ROOT / "configs" / "many.py")), make_mesh()
        self.pipeline = load_pipeline(self.config.base)
        self.base = read_params(self.pipeline, self.mesh)
        self.paint = painter_of(self.config, self.pipeline, self.mesh, batch_size=CLASS_COUNT)
        self.of_class: dict[str, list] = {}

    def painted(self, arm: Arm, subject: Subject, adapter: Path) -> Painted:
        """The pictures of a subject."""
        noun = subject.class_noun
        if noun not in self.of_class:
            self.of_class[noun] = paint_rows(self.paint, self.base, [f"a {noun}"], range(CLASS_COUNT))[0]
        own = with_adapters(self.base, read_adapters([str(adapter)], self.pipeline.shapes))
        prompts = [f"a {arm.phrase(subject)} {place}" for place in SETTINGS]
        rows = paint_rows(self.paint, own, prompts, range(COUNT))
        (of_class,) = paint_rows(self.paint, own, [f"a {noun}"], range(CLASS_COUNT))
        texts = [f"a {noun} {place}" for place in SETTINGS]
        return Painted(read_photos(str(subject.folder)), rows, texts, of_class, self.of_class[noun], f"a {noun}")


def run_arm(arm: Arm, subjects: list[Subject], output: Path, steps: int, studio: Studio, judge: Judge) -> dict:
    """The scores of every subject; a sheet with a row per subject lies beside the arm's folder."""
    folder = output / key_of(arm)
    train(arm, subjects, folder, output / key_of(Arm()) / "classes", steps)
    found, rows, labels = {}, [], []
    for subject in subjects:
        painted = studio.painted(arm, subject, folder / f"{subject.name}.safetensors")
        values = score(judge, painted).values
        found[subject.name] = {name: values[name].mean for name in MEASURES}
        rows.append([picture for row in painted.rows for picture in row[:2]] + list(painted.of_class[:4]))
        labels.append(f"{subject.name}: {', '.join(SETTINGS)}; a {subject.class_noun}")
    save_sheet(output / f"{folder.name}.png", rows, labels, {"protocol": judge.protocol})
    return {"subjects": found}


def tables(rows: dict[str, dict]) -> str:
    """A table per question whose arms are all there: means with intervals, then differences to the first arm."""

    def cell(values: list[float], sign: str = "") -> str:
        found = metrics.bootstrap(values)
        return f"{found.mean:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"

    def line(name: str, values: dict[str, list[float]], sign: str = "") -> str:
        return f"| {name} | " + " | ".join(cell(values[measure], sign) for measure in MEASURES) + " |"

    def of(arm: Arm) -> dict[str, list[float]]:
        subjects = rows[key_of(arm)]["subjects"].values()
        return {measure: [values[measure] for values in subjects] for measure in MEASURES}

    lines = []
    for question, arms in QUESTIONS.items():
        if not all(key_of(arm) in rows for arm in arms.values()):
            continue
        (first, reference), *others = arms.items()
        base = of(reference)
        lines += [f"| {question} | {' | '.join(MEASURES)} |", "|---" * (1 + len(MEASURES)) + "|"]
        lines += [line(name, of(arm)) for name, arm in arms.items()]
        for name, arm in others:
            differences = {m: [a - b for a, b in zip(of(arm)[m], base[m], strict=True)] for m in MEASURES}
            lines.append(line(f"{name} - {first}", differences, "+"))
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", type=Path, default=Path("runs/drawn"))
    parser.add_argument("--output", type=Path, default=Path("runs/four_ablations"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    options = parser.parse_args()
    runtime.start()
    output = options.output.resolve()
    subjects = [subject for subject in read_dataset(options.dataset.resolve()) if subject.name in options.subjects]
    studio, rows = Studio(), {}
    judge = embedded_judge(studio.mesh)
    for arms in QUESTIONS.values():
        for arm in arms.values():
            make = lambda arm=arm: run_arm(arm, subjects, output, options.steps, studio, judge)  # noqa: E731
            rows[key_of(arm)] = kept(output / "results.jsonl", key_of(arm), make)
            print(tables(rows), flush=True)


if __name__ == "__main__":
    main()
