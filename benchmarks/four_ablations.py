"""Four ablations over twelve drawn subjects: the prior, the class noun, the number of photos, the identifier.

    python benchmarks/four_ablations.py             # two hours on two cores; goes on where it was stopped

Each arm is a protocol (configs/protocol.py) with LoRA, whose twelve subjects train in one program; those with
`prior_target = "base"` train one by one, as they must without class images. The class noun is ablated without the
prior, as in arXiv 2208.12242, table 4; its arms name no noun, or a wrong one, in training and in the prompts that are
scored. Intervals are 95 % bootstraps over subjects; differences are paired.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dreambooth_jax import evaluate
from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.evaluation.dataset import read_dataset
from dreambooth_jax.evaluation.metrics import Interval, bootstrap
from dreambooth_jax.evaluation.scores import Scores, read_scores
from dreambooth_jax.files.atomic import write_atomic
from dreambooth_jax.files.json_text import parse_json
from dreambooth_jax.runs import config_file, lease
from dreambooth_jax.runs.many import train_many
from dreambooth_jax.runs.preemption import Preemption
from dreambooth_jax.runs.protocol import groups_of, train_config
from dreambooth_jax.runs.scoring import OverBase, questions_of

ROOT = Path(__file__).parent.parent
SUBJECTS = tuple(f"{noun}{end}" for noun in ("dog", "cat", "car", "backpack", "teapot", "robot") for end in ("", "_1"))
WRONG = {"dog": "can", "cat": "boot", "car": "clock", "backpack": "duck", "teapot": "sneaker", "robot": "bowl"}
SETTINGS = ("in the snow", "on the beach", "in front of a brick wall", "on a red background")
PHOTOS = 5
MEASURES = ("DINO", "CLIP-I", "CLIP-T", "DIV", "PRES", "drift", "copy")


class Arm(NamedTuple):
    """One way of training. The scores of fewer photos are against all five.

    Attributes:
        train: fields of the training config.
        phrase: the subject's, in the photos' prompt and in those that are scored.
        photos: of each subject.
        wrong: whether the classes file names another noun.
        class_images: whether there are any.
        at_once: subjects in one program.
    """

    train: Mapping[str, Any] = {}
    phrase: str = "{identifier} {class_noun}"
    photos: int = PHOTOS
    wrong: bool = False
    class_images: bool = True
    at_once: int = len(SUBJECTS)


OFF, BASE = {"prior_preservation": False}, {"prior_target": "base"}
ARMS = {
    "prior": Arm(),
    "no prior": Arm(OFF),
    "prior_target = base": Arm(BASE, at_once=1),
    "prior_target = base, no class images": Arm(BASE, class_images=False, at_once=1),
    "no noun, no prior": Arm(OFF, phrase="{identifier}"),
    "wrong noun, no prior": Arm(OFF, wrong=True),
    **{f"{n} photo{'s' * (n > 1)}": Arm(photos=n) for n in range(1, PHOTOS)},
    "common word (brown)": Arm({"identifier": "brown"}),
    "random letters (xxy5syt00)": Arm({"identifier": "xxy5syt00"}),
}
# Question -> (its arms, the arm that they are compared with).
QUESTIONS = {
    "prior loss": (("no prior", "prior_target = base", "prior_target = base, no class images"), "prior"),
    "class noun": (("no noun, no prior", "wrong noun, no prior"), "no prior"),
    "photos": (tuple(f"{n} photo{'s' * (n > 1)}" for n in range(1, PHOTOS)), "prior"),
    "identifier": (("common word (brown)", "random letters (xxy5syt00)"), "prior"),
}


def dataset(output: Path, arm: Arm) -> Path:
    """The folder of an arm's photos, as many of each subject as it trains on."""
    drawn = output / "drawn"
    if not drawn.exists():
        command = [sys.executable, str(ROOT / "examples" / "subjects" / "draw.py"), "--further", "--out", str(drawn)]
        subprocess.run(command, check=True)
    folder = output / f"photos_{arm.photos}{'_wrong' * arm.wrong}"
    if not folder.exists():
        lines = ["subject_name,class"]
        for subject in SUBJECTS:
            noun = subject.partition("_")[0]
            lines.append(f"{subject},{WRONG[noun] if arm.wrong else noun}")
            (folder / subject).mkdir(parents=True)
            for photo in sorted((drawn / subject).iterdir())[: arm.photos]:
                shutil.copy(photo, folder / subject)
        (folder / "prompts_and_classes.txt").write_text("\n".join(lines) + "\n")
    return folder


def protocol(output: Path, name: str, steps: int) -> ConfigDict:
    """The protocol of an arm."""
    arm = ARMS[name]
    config = config_file.load(f"{ROOT / 'configs' / 'protocol.py'}:tiny,lora")
    config.dataset, config.workdir = str(dataset(output, arm)), str(output / name.replace(" ", "_"))
    config.prompts, config.count, config.class_count, config.at_once = "run", 4, 16, arm.at_once
    train = config.train
    train.steps, train.batch_size, train.sample_every, train.sample_count = steps, 1, steps, 1
    train.instance_prompt = f"a photo of {arm.phrase}"
    train.sample_prompts = tuple(f"a {arm.phrase} {setting}" for setting in SETTINGS)
    train.class_images = str(output / "class_images" / "{class_noun}") if arm.class_images else ""
    train.update(arm.train)
    return config


def few_photos(config: ConfigDict, whole: Path) -> None:
    """Trains on the photos of `config`'s data set and scores against those of the data set `whole`."""
    mesh = make_mesh()
    judge = evaluate.make_judge(config, config.train.base, mesh)
    group = groups_of(config, read_dataset(config.dataset))[0]
    write_atomic(epath.Path(group.config.subjects), group.table)
    with Preemption() as guard, lease.holding(group.config.workdir, guard.at_exit):
        train_many(group.config, guard)
    base = OverBase(group.config, judge, mesh)
    for subject in read_dataset(whole):
        own, file = train_config(config, subject), Path(group.config.workdir) / f"{subject.name}.safetensors"
        base.score(own, epath.Path(file), questions_of(own, config.prompts, config.count, config.class_count))


def is_scored(config: ConfigDict) -> bool:
    """Whether the last subject's scores are there."""
    return scores_path(config, SUBJECTS[-1]).exists()


def scores_path(config: ConfigDict, subject: str) -> Path:
    return Path(config.workdir) / subject / "evaluation" / f"step_{config.train.steps:06d}.json"


def scores_of(config: ConfigDict) -> dict[str, Scores]:
    """Subject -> scores that a protocol has kept."""
    found = {}
    for subject in SUBJECTS:
        content = parse_json(scores_path(config, subject).read_bytes())
        found[subject] = read_scores({name: content[name] for name in Scores._fields})
    return found


def table(results: Mapping[str, Mapping[str, Scores]]) -> str:
    """A row per arm, then the differences that answer each question."""

    def values(arm: str, measure: str) -> np.ndarray:
        return np.asarray([results[arm][subject].values[measure].mean for subject in SUBJECTS])

    lines = [f"| {len(SUBJECTS)} subjects | {' | '.join(MEASURES)} |", "|---|" + "---|" * len(MEASURES)]
    for arm in results:
        lines.append(f"| {arm} | {' | '.join(_cell(bootstrap(values(arm, name))) for name in MEASURES)} |")
    for question, (arms, other) in QUESTIONS.items():
        for arm in arms:
            differences = (bootstrap(values(arm, name) - values(other, name)) for name in MEASURES)
            lines.append(f"| {question}: {arm} - {other} | {' | '.join(_cell(x, '+') for x in differences)} |")
    return "\n".join(lines)


def _cell(found: Interval, sign: str = "") -> str:
    return f"{found.mean:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/four_ablations"))
    options = parser.parse_args()
    runtime.start()
    results, output = {}, options.output.absolute()
    for name in ARMS:
        config = protocol(output, name, options.steps)
        print(f"== {name}", flush=True)
        if ARMS[name].photos == PHOTOS:
            evaluate.evaluate_protocol(config, "python benchmarks/four_ablations.py")
        elif not is_scored(config):
            few_photos(config, dataset(output, ARMS["prior"]))
        results[name] = scores_of(config)
    print(table(results))


if __name__ == "__main__":
    main()
