"""Scores while a run trains: held-out photos, the best checkpoint, the early end, all of them across restarts."""

import csv
import shutil

import numpy as np
import pytest
from etils import epath
from support.runs import ROOT, config_of

from dreambooth_jax import evaluate
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.evaluation.judge import embedded_judge
from dreambooth_jax.runs import watch
from dreambooth_jax.runs.best import best_step, folder_of, is_over
from dreambooth_jax.runs.command import step_of
from dreambooth_jax.runs.config import ConfigError, check_config
from dreambooth_jax.runs.held_out import divide
from dreambooth_jax.runs.places import check_places
from dreambooth_jax.runs.preemption import Preemption
from dreambooth_jax.runs.setup import claim, set_up
from dreambooth_jax.runs.training import train
from dreambooth_jax.runs.workdir import open_trained

ROWS = {
    0: {"DINO": 0.2, "CLIP-T": 0.30, "copy": 0.3},
    10: {"DINO": 0.5, "CLIP-T": 0.31, "copy": 0.6},
    20: {"DINO": 0.7, "CLIP-T": 0.29, "copy": 0.7},
    30: {"DINO": 0.8, "CLIP-T": 0.29, "copy": 0.95},
    40: {"DINO": 0.9, "CLIP-T": 0.25, "copy": 0.7},
}
FIELDS = {
    "steps": 8,
    "steps_per_call": 2,
    "sample_every": 2,
    "save_every": 4,
    "num_class_images": 2,
    "evaluate_every": 2,
    "held_out_images": "1",
    "keep_best": True,
    "best_max_prompt_loss": 1.0,
    "best_max_copy": 1.0,
    "keep_last": 2,
    "train_text_encoder": False,
}


@pytest.fixture(autouse=True)
def small_judge(monkeypatch):
    monkeypatch.setattr(watch, "published_judge", lambda mesh, **models: embedded_judge(mesh))


def go(workdir, micro, **fields):
    with Preemption() as guard:
        train(set_up(config_of(workdir, base=micro, **FIELDS | fields)), guard)


def table(workdir):
    return {int(row["step"]): row for row in csv.DictReader((workdir / "scores.csv").open())}


def test_the_best_step_keeps_the_bases_prompts_and_copies_nothing():
    limits = {"max_prompt_loss": 0.02, "max_copy": 0.9}
    assert best_step(ROWS, 40, **limits) == 20
    assert best_step(ROWS, 10, **limits) == 10
    assert best_step(ROWS, 40, max_prompt_loss=0.02, max_copy=1.0) == 30
    assert best_step(ROWS, 40, max_prompt_loss=0.1, max_copy=0.9) == 40
    assert best_step(ROWS, 40, max_prompt_loss=0.1, max_copy=0.1) is None
    odd = ROWS | {0: ROWS[0] | {"gap": 0.05}}  # photos that are less like the class noun themselves
    assert best_step(odd, 40, **limits) == 40


def test_patience_counts_the_scores_after_the_best(tmp_path):
    config = config_of(tmp_path, patience=2)
    rows = {step: {"best": min(step, 20)} for step in (0, 10, 20, 30, 40, 50)}
    assert [step for step in rows if is_over(config, rows, step)] == [40, 50]
    assert not is_over(config, rows, 45) and not is_over(config_of(tmp_path), rows, 50)
    assert is_over(config, {10: {"best": 0}, 20: {"best": 0}}, 20)


@pytest.fixture(scope="module")
def watched(micro, tmp_path_factory):
    """The workdir of a run with every score, and its plan."""
    workdir = tmp_path_factory.mktemp("watched") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "published_judge", lambda mesh, **models: embedded_judge(mesh))
        go(workdir, micro)
    return workdir


@pytest.mark.slow
def test_a_run_is_scored_beside_its_base(watched):
    rows = table(watched)
    assert list(rows) == [0, 2, 4, 6, 8]
    assert list(rows[8]) == ["step", *watch.SCORES, *watch.LOSSES, "gap", "best"]
    assert float(rows[0]["gap"]) >= 0 and not rows[8]["gap"]
    values = np.array([[float(row[name]) for name in (*watch.SCORES, *watch.LOSSES)] for row in rows.values()])
    assert np.isfinite(values).all() and (values[1:] != values[0]).any(0).all()  # each moves as the run trains
    kept = int(rows[8]["best"])
    assert kept == max((2, 4, 6, 8), key=lambda step: float(rows[step]["DINO"]))
    assert folder_of(watched, "best") == (watched / "best", kept)


def test_held_out_photos_do_not_train(micro, tmp_path):
    config = config_of(tmp_path / "run", base=micro, **FIELDS)
    run, whole = set_up(config), set_up(config_of(tmp_path / "whole", base=micro))
    photos = sorted(set(whole.examples[0].names))
    assert set(run.examples[0].names) == set(photos[:-1]) and [part.names for part in run.held_out] == [(photos[-1],)]
    assert run.examples[0].images.shape[0] == len(run.examples[0].captions) == 2 * len(photos[:-1])  # two views
    from dreambooth_jax.runs.plan_text import plan_text

    assert f"held out: {photos[-1]}" in plan_text(run, 0)
    with pytest.raises(ConfigError, match="leaves none of"):
        set_up(config_of(tmp_path / "none", base=micro, **FIELDS | {"held_out_images": "99"}))


def test_photos_that_train_are_not_held_out(tmp_path):
    photos = ROOT / "examples" / "subjects" / "dog"
    mine = shutil.copytree(photos, tmp_path / "mine")
    (mine / "00.jpg").rename(mine / "other name.jpg")
    config = config_of(tmp_path / "run", held_out_images=str(mine))
    with pytest.raises(ConfigError, match=r"01\.jpg, .*other name\.jpg lie in .* too, and train"):
        divide((), config, ())
    config.held_out_images = str(tmp_path / "mistyped")
    with pytest.raises(FileNotFoundError, match="mistyped"):
        check_places(config)


def test_the_best_of_a_run_without_checkpoints_is_set_aside(tmp_path):
    """Its checkpoints were lost or deleted: the run begins anew, and what it had kept is not deleted."""
    (tmp_path / "best" / "20").mkdir(parents=True)
    config = config_of(tmp_path)
    (note,) = claim(epath.Path(tmp_path), config)
    assert "damaged_checkpoints/best; the run begins anew" in note and not (tmp_path / "best").exists()
    assert (tmp_path / "damaged_checkpoints" / "best" / "20").is_dir() and claim(epath.Path(tmp_path), config) == []


def test_scores_that_a_spreadsheet_has_saved_are_read_or_named(tmp_path):
    (tmp_path / watch.FILE).write_bytes("\ufeffstep,DINO\r\n0,0.5\r\n,\r\n\r\n2,0.75\r\n4,1\r\n".encode())
    assert watch.read_rows(epath.Path(tmp_path), 3) == {0: {"DINO": 0.5}, 2: {"DINO": 0.75}}
    (tmp_path / watch.FILE).write_bytes(b"step,DINO\r0,0.5\r2,0.75\r")
    assert watch.read_rows(epath.Path(tmp_path), 3) == {0: {"DINO": 0.5}, 2: {"DINO": 0.75}}
    for text in (
        "step;DINO\n0;0,5\n",
        "step,DINO\n0,0.5,7\n",
        "step,DINO\nmy own note,\n",
        f"step,DINO\n0,{'1' * 200_000}\n",
    ):
        (tmp_path / watch.FILE).write_text(text)
        with pytest.raises(ConfigError, match=r"scores\.csv, line 2: .* remove it"):
            watch.read_rows(epath.Path(tmp_path), 3)


@pytest.mark.slow
def test_the_best_outlives_a_kill_and_a_restart(micro, watched, tmp_path, monkeypatch):
    """Killed after the weights were kept, before anything says so, the run goes on to the same end."""
    workdir = tmp_path / "run"
    real = watch.record

    def killed(seen, step, values):
        if step == 6:
            raise KeyboardInterrupt
        real(seen, step, values)

    monkeypatch.setattr(watch, "record", killed)
    with pytest.raises(KeyboardInterrupt):
        go(workdir, micro)
    assert list(table(workdir)) == [0, 2, 4]
    monkeypatch.setattr(watch, "record", real)
    monkeypatch.setattr(watch, "look_at_base", lambda *_: pytest.fail("the base's scores were there"))
    go(workdir, micro)
    assert (workdir / "scores.csv").read_text() == (watched / "scores.csv").read_text()
    one, other = (open_trained(folder, make_mesh(), "best").trainable for folder in (workdir, watched))
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_keep_last_leaves_the_best(watched, tmp_path):
    """The best is opened by name, and by its number when no newer checkpoint has that."""
    kept = folder_of(watched, "best")[1]
    if kept in (4, 8):
        shutil.rmtree(watched / "checkpoints" / str(kept))
    by_name, by_number = (open_trained(watched, make_mesh(), step).trainable for step in (step_of("best"), kept))
    assert all(np.array_equal(by_name[name], by_number[name]) for name in by_name)
    with pytest.raises(FileNotFoundError, match="keep_best=True"):
        folder_of(tmp_path, "best")


@pytest.mark.slow
def test_a_run_without_a_better_score_ends_and_stays_ended(micro, tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "run"
    go(workdir, micro, patience=2, best_max_copy=0.001, held_out_images="")  # nothing is good enough
    assert list(table(workdir)) == [0, 2, 4]
    printed = capsys.readouterr().out
    assert "checkpoints/4" in printed and "Best: none" in printed
    monkeypatch.setattr(watch, "make_watch", lambda *_: pytest.fail("went on"))
    go(workdir, micro, patience=2, best_max_copy=0.001, held_out_images="")
    assert list(table(workdir)) == [0, 2, 4]


@pytest.mark.slow
def test_losses_need_no_judge(micro, tmp_path, capsys):
    """With held-out photos alone no picture is scored, for a token method too."""
    more = {"keep_best": False, "sample_prompts": (), "steps": 4, "best_max_copy": 0.0, "method": "pivotal"}
    go(tmp_path / "run", micro, **FIELDS | more | {"identifier": "<sks>", "templates": "object"})
    rows = table(tmp_path / "run")
    assert list(rows) == [0, 2, 4] and list(rows[0]) == ["step", *watch.LOSSES]
    scored = ["--judge", "embedded", "--prompts", "world", "--count", "2", "--class_count", "2"]
    evaluate.main(["--workdir", str(tmp_path / "run"), *scored])
    assert "| step 4 |" in capsys.readouterr().out


def test_fields_that_contradict_each_other(tmp_path):
    def refuses(message, **fields):
        with pytest.raises(ConfigError, match=message):
            check_config(config_of(tmp_path, **fields))

    refuses("keep_best needs the scores", keep_best=True)
    refuses("patience = 2 counts scores", patience=2)
    refuses("held_out_images: their loss", held_out_images="1")
    refuses("not implemented for a cascade", keep_best=True, evaluate_every=20, stages=("x",))
    refuses("evaluate_every: not implemented for many", subjects="x", method="lora", evaluate_every=20)
