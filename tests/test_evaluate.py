"""The evaluate command on a finished run: a table, JSON, pictures, and a page that needs no network."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
from etils import epath
from support.runs import config_of

from dreambooth_jax import evaluate
from dreambooth_jax.evaluation.judge import embedded_judge
from dreambooth_jax.evaluation.scores import MEASURES
from dreambooth_jax.runs import scoring, watch
from dreambooth_jax.runs.config import ConfigError, check_config
from dreambooth_jax.runs.preemption import Preemption
from dreambooth_jax.runs.scoring import read_section, weights_of_step
from dreambooth_jax.runs.setup import set_up
from dreambooth_jax.runs.training import train


@pytest.fixture(scope="module")
def scored(finished, tmp_path_factory):
    """A copy of the finished run after `evaluate`, and what was printed."""
    workdir, printed = tmp_path_factory.mktemp("scored") / "run", io.StringIO()
    shutil.copytree(finished, workdir)
    with contextlib.redirect_stdout(printed):
        evaluate.main(arguments(workdir))
    return workdir, printed.getvalue()


def arguments(workdir, *more):
    return ["--workdir", str(workdir), "--judge", "embedded", "--count", "2", "--class_count", "2", *more]


@pytest.mark.slow
def test_it_scores_every_kept_checkpoint(scored):
    workdir, printed = scored
    assert "| step 60 |" in printed and "beside the embedded base" in printed
    folder = workdir / "evaluation"
    assert {path.name for path in folder.iterdir()} == {
        "index.html",
        "table.md",
        "table.json",
        "step_000060.json",
        "step_000060.png",
        "step_000060_copies.png",
    }
    row = json.loads((folder / "table.json").read_text())["rows"][0]
    assert row["label"] == "step 60" and row["values"].keys() == MEASURES.keys()
    numbers = json.loads((folder / "step_000060.json").read_text())
    assert "ViT" in numbers["protocol"] or "vit@" in numbers["protocol"]
    page = (folder / "index.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import|<script""", page)
    assert page.count("data:image/jpeg;base64,") == 2
    assert "num_class_images" in page and "dreambooth_jax.evaluate" in page


@pytest.mark.slow
def test_what_is_scored_is_not_painted_again(scored, capsys, monkeypatch):
    workdir, _ = scored
    monkeypatch.setattr(scoring, "open_run", lambda *_: pytest.fail("painted again"))
    evaluate.main(arguments(workdir))
    assert "| step 60 |" in capsys.readouterr().out


def test_kept_scores_are_of_the_weights_that_are_there(finished, tmp_path):
    """A run that was trained anew has checkpoints of the same steps."""
    run = shutil.copytree(finished, tmp_path / "run")
    weights = weights_of_step(run, 60)
    assert weights and weights == weights_of_step(finished, 60) and weights_of_step(run, 61) == ""
    folder = epath.Path(tmp_path / "evaluation")
    folder.mkdir()
    (folder / "step_000060.json").write_text(json.dumps({"protocol": "p", "weights": "others"}))
    assert read_section(folder, 60, "p", weights) is None


@pytest.mark.slow
def test_what_cannot_be_scored_says_why(tmp_path, finished):
    with pytest.raises(SystemExit, match="Give the --workdir of a run"):
        evaluate.main(arguments(tmp_path))
    with pytest.raises(SystemExit, match="no such folder"):
        evaluate.main(["--workdir", str(finished), "--judge", "published", "--dino", str(tmp_path / "none")])
    shutil.copytree(finished, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(sorted(Path(config["instance_images"]).glob("*.jpg"))[0], photos)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"instance_images": str(photos)}))
    with pytest.raises(SystemExit, match="photos: scores need two photos or more, found 1"):
        evaluate.main(arguments(tmp_path / "run"))


@pytest.mark.slow
def test_sample_pictures_are_scored_while_a_run_trains(micro, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "published_judge", lambda mesh, **models: embedded_judge(mesh))
    fields = {"steps": 4, "sample_every": 2, "save_every": 2, "num_class_images": 2, "train_text_encoder": False}
    config = config_of(tmp_path / "run", base=micro, evaluate_every=2, **fields)
    with Preemption() as guard:
        train(set_up(config), guard)
    lines = (tmp_path / "run" / "scores.csv").read_text().splitlines()
    assert lines[0] == "step,DINO,CLIP-I,CLIP-T,copy"
    assert [line.split(",")[0] for line in lines[1:]] == ["0", "2", "4"]
    assert all(-1 <= float(value) <= 1.0001 for line in lines[1:] for value in line.split(",")[1:])


@pytest.mark.parametrize("text", ["", '{"protocol": "a"}', '{"protocol": "a", "values": 3}', "[]", '{"proto'])
def test_half_a_file_of_scores_counts_as_none(tmp_path, text):
    (tmp_path / "step_000060.json").write_text(text)
    assert scoring.read_section(epath.Path(tmp_path), 60, "a") is None


def test_scores_need_pictures_to_score(tmp_path):
    with pytest.raises(ConfigError, match="no multiple of sample_every"):
        check_config(config_of(tmp_path, evaluate_every=30))
    with pytest.raises(ConfigError, match="nothing to score"):
        check_config(config_of(tmp_path, evaluate_every=20, sample_prompts=("a {class_noun}",)))
