"""The protocol over a small data set: trained, scored, resumed, its table beside the paper's quoted rows."""

import json
import shutil
from pathlib import Path

import pytest
from support.runs import SMALL

from dreambooth_jax import evaluate
from dreambooth_jax.runs import config_file, scoring, training
from dreambooth_jax.runs.config import ConfigError, absolute_paths
from dreambooth_jax.runs.protocol import check_groups, check_protocol, check_training, groups_of, train_config
from dreambooth_jax.runs.subjects import read_subjects


def overrides(workdir, dataset, base, **fields):
    train = SMALL | {"steps": 2, "num_class_images": 2, "base": base, "train_text_encoder": False}
    named = {"workdir": workdir, "dataset": dataset, "judge": "embedded", "count": 2, "class_count": 2}
    named |= {f"train.{name}": value for name, value in train.items()} | {"prompts": "run"}
    named |= fields
    return [f"--config.{name}={value}" for name, value in named.items()]


@pytest.fixture(scope="module")
def command(micro, tmp_path_factory):
    """The workdir and the arguments of a protocol of two subjects of one class."""
    folder = tmp_path_factory.mktemp("protocol")
    for name in ("dog", "cat"):
        shutil.copytree(f"examples/subjects/{name}", folder / "photos" / name)
    (folder / "photos" / "prompts_and_classes.txt").write_text("subject_name,class\ncat,pet\ndog,pet\n")
    return folder / "run", ["--config", "configs/protocol.py", *overrides(folder / "run", folder / "photos", micro)]


@pytest.fixture(scope="module")
def scored(command):
    """`command` after it has trained and scored both subjects."""
    evaluate.main(command[1])
    return command


@pytest.mark.slow
def test_every_subject_is_trained_and_scored(scored):
    workdir, _ = scored
    table = json.loads((workdir / "table.json").read_text())
    labels = [row["label"] for row in table["rows"]]
    assert labels[0] == "Real images (2 subjects)" and labels[1].endswith("ours (2 subjects)")
    assert labels[2:] == ["cat", "dog"]
    values = [row["values"]["DINO"]["mean"] for row in table["rows"]]
    assert values[1] == pytest.approx((values[2] + values[3]) / 2)
    assert table["quoted"]["rows"]["DreamBooth (Imagen)"]["DINO"] == 0.696
    assert len(list((workdir / "class_images" / "pet").glob("*.png"))) == 2
    assert (workdir / "index.html").read_text().count("<h2>") == 4  # two subjects, config, command


@pytest.mark.slow
def test_scored_subjects_are_neither_trained_nor_painted_again(scored, monkeypatch):
    workdir, arguments = scored
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(scoring, "open_run", lambda *_: pytest.fail("painted again"))
    before = (workdir / "table.md").read_text()
    evaluate.main([*arguments, "--config.keep_checkpoints=False"])
    assert (workdir / "table.md").read_text() == before
    assert not (workdir / "dog" / "checkpoints").exists()


GROUPED = {"method": "lora", "lora_rank": 2, "learning_rate": 0.002, "ema_decay": 0.0, "steps": 12, "save_every": 12}


@pytest.mark.slow
def test_a_group_has_the_scores_of_subjects_alone(command, micro, tmp_path):
    """Stopped with one subject scored, the same command goes on; test_many kills the training of a group."""
    photos = command[0].parent / "photos"

    def arguments(workdir, at_once):
        fields = {f"train.{name}": value for name, value in GROUPED.items()}
        fields |= {"train.class_images": tmp_path / "classes" / "{class_noun}", "at_once": at_once}
        return ["--config", "configs/protocol.py", *overrides(workdir, photos, micro, **fields)]

    workdir = tmp_path / "group"
    group = workdir / "groups" / "01"
    evaluate.main(arguments(workdir, 2))
    assert sorted(path.name for path in group.glob("*.safetensors")) == ["cat.safetensors", "dog.safetensors"]
    evaluate.main(arguments(tmp_path / "alone", 1))
    grouped, alone = (json.loads((folder / "table.json").read_text()) for folder in (workdir, tmp_path / "alone"))
    assert grouped["protocol"] == alone["protocol"]
    for ours, theirs in zip(grouped["rows"], alone["rows"], strict=True):
        assert ours["label"] == theirs["label"]
        for name, value in theirs["values"].items():
            assert ours["values"][name]["mean"] == pytest.approx(value["mean"], abs=1e-4), (ours["label"], name)
    assert len(list((tmp_path / "classes" / "pet").glob("*.png"))) == 2

    kept = workdir / "cat" / "evaluation" / "step_000012.json"
    before = kept.stat().st_mtime_ns
    shutil.rmtree(workdir / "dog" / "evaluation")
    evaluate.main([*arguments(workdir, 2), "--config.keep_checkpoints=False"])
    assert json.loads((workdir / "table.json").read_text()) == grouped
    assert kept.stat().st_mtime_ns == before and not (group / "checkpoints").exists()
    with pytest.raises(SystemExit, match=r"learning_rate: 0\.002 in the checkpoint, 0\.1 now"):
        evaluate.main([*arguments(workdir, 2), "--config.train.learning_rate=0.1"])


def test_groups_are_subjects_in_their_order(tmp_path):
    config = config_file.load("configs/protocol.py:tiny,lora")
    config.update(workdir=str(tmp_path), at_once=4)
    subjects = check_protocol(config)
    first, second = groups_of(config, subjects)
    assert (len(first.subjects), len(second.subjects)) == (4, 2)
    assert [*first.subjects, *second.subjects] == subjects
    for group in (first, second):
        Path(group.config.subjects).parent.mkdir(exist_ok=True)
        Path(group.config.subjects).write_bytes(group.table)
        found = read_subjects(absolute_paths(group.config))
        assert [(one.name, one.class_noun) for one in found] == [(one.name, one.class_noun) for one in group.subjects]
        assert all(Path(one.photos).is_dir() for one in found)
    config.train.prior_target = "base"
    assert not train_config(config, subjects[0]).class_images  # it needs none
    with pytest.raises(ConfigError, match=r'(?s)at_once = 4: .*prior_target = "base" without class_images'):
        check_protocol(config)
    config.train.prior_target = "noise"
    config.at_once = 3
    with pytest.raises(ConfigError, match=r"01\.csv names other subjects than this config"):
        check_groups(groups_of(config, subjects))
    config.at_once = 0
    with pytest.raises(ConfigError, match="at_once = 0: expected the number of subjects in one program"):
        check_protocol(config)
    config.update(at_once=2, train=config_file.load("configs/protocol.py").train)
    with pytest.raises(ConfigError, match=r"(?s)at_once = 2: .*many subjects share a frozen base"):
        check_protocol(config)


def test_scores_of_another_training_are_not_shown(tmp_path, command):
    """The pictures are of the same prompts, and the weights of another rate."""
    config = config_file.load("configs/protocol.py")
    config.update(workdir=str(tmp_path), dataset=str(command[0].parent / "photos"))
    (subject, _) = check_protocol(config)
    own = absolute_paths(train_config(config, subject))
    Path(own.workdir).mkdir()
    (Path(own.workdir) / "config.json").write_text(own.to_json())
    check_training(own)
    config.train.learning_rate = 3e-4
    with pytest.raises(ConfigError, match=r"learning_rate: 0\.0002 in the checkpoint, 0\.0003 now"):
        check_training(train_config(config, subject))


def test_mistakes_are_named_before_anything_is_trained(command, tmp_path):
    _, arguments = command
    photos = shutil.copytree(command[0].parent / "photos", tmp_path / "photos")
    for path in sorted((photos / "cat").glob("*.*"))[1:]:
        path.unlink()
    with pytest.raises(SystemExit, match=r"cat: scores need two photos or more, found 1"):
        evaluate.main([*arguments, f"--config.dataset={photos}"])
    with pytest.raises(SystemExit, match=r"subjects: rex not in .*; there are cat, dog"):
        evaluate.main([*arguments, '--config.subjects=("rex",)'])
    config = evaluate.read_protocol(arguments[1], arguments[2:])
    subjects = check_protocol(config)
    assert train_config(config, subjects[1]).class_noun == "pet"
    config.count = 1
    with pytest.raises(ConfigError, match="two pictures or more"):
        check_protocol(config)
    config.prompts = "world3"
    with pytest.raises(ConfigError, match="expected one of run, paper, world"):
        check_protocol(config)
    del config.count
    with pytest.raises(ConfigError, match="count: missing"):
        check_protocol(config)
    with pytest.raises(ConfigError, match=r"configs/none\.py"):
        evaluate.read_protocol("configs/none.py", [])
