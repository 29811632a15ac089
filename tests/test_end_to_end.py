"""The train command as a person runs it: killed, stopped and started again, it ends where it would have ended."""

import csv
import random
import shutil
import signal
import time

import numpy as np
import pytest
from support.runs import (
    ROOT,
    assert_same_run,
    assert_same_state,
    checkpoints,
    finish,
    kill_when,
    log_of,
    pictures,
    read_state,
    start,
    wait,
)

pytestmark = pytest.mark.slow


def last_step(workdir) -> int:
    with (workdir / "metrics.csv").open() as file:
        return int(list(csv.reader(file))[-1][0])


def being_saved(workdir) -> bool:
    return any(".orbax-checkpoint-tmp" in path.name for path in (workdir / "checkpoints").glob("*"))


def test_a_run_says_what_it_does_and_leaves_all_of_it(finished):
    log = log_of(finished).read_text()
    for text in (
        "base: ",
        "(16x16, ",
        f"5 images in {ROOT}/examples/subjects/dog: 'a photo of sks dog'",
        "'a photo of dog', weight 1",
        "unet and text_encoder",
        "60 of 1 images",
        "data 1 x fsdp 1",
        "loss=",
        "step/s",
        f"{finished}/checkpoints/60",
        f"dreambooth_jax.sample --workdir {finished} --prompt 'a sks dog on a red background'",
    ):
        assert text in log, text
    assert checkpoints(finished) == [60]
    assert list(pictures(finished / "samples")) == ["step_000020.png", "step_000040.png", "step_000060.png"]
    assert len(pictures(finished / "class_images")) == 10
    with (finished / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 61))
    for row in rows:
        values = {name: float(value) for name, value in row.items()}
        assert values["loss"] == pytest.approx(values["instance_loss"] + values["prior_loss"], rel=1e-4)
    assert len({row["loss"] for row in rows}) == 60


def test_sigkill_at_any_moment_changes_nothing(finished, micro, tmp_path):
    workdir, moments = tmp_path / "killed", random.Random(0)
    reached, killed = [[]], 0

    def newer() -> bool:
        return checkpoints(workdir) > reached[-1]

    kills = [
        (lambda: len(pictures(workdir / "class_images")) >= 3, 0.0),
        (lambda: being_saved(workdir), 0.0),  # the first: nothing to fall back to
        (lambda: being_saved(workdir) and newer(), 0.0),  # the second of this start: one to fall back to
        (lambda: being_saved(workdir) and newer(), moments.uniform(0, 0.3)),  # commits, or deletes the one before
        (newer, moments.uniform(0, 1.0)),
    ]
    for happened, delay in kills:
        killed += kill_when(start(workdir, base=micro), happened, delay)
        assert checkpoints(workdir)[-1:] >= reached[-1][-1:]
        reached.append(checkpoints(workdir))
    print("checkpoints after each kill:", reached[1:])
    assert killed >= 4 and reached[1] == [] and reached[4]
    finish(workdir, base=micro)
    assert_same_run(workdir, finished)


def test_sigterm_saves_and_leaves_at_once_wherever_it_comes(finished, micro, tmp_path):
    workdir, saved = tmp_path / "stopped", []
    # Nothing is saved but because of the signal; what is compiled is not found in the cache.
    fields = {"base": micro, "save_every": 1000}
    for place in ("class images", "compile", "training", "sampling"):
        before = len(log_of(workdir).read_text()) if saved else 0
        uncached = {"JAX_ENABLE_COMPILATION_CACHE": str(place != "compile").lower()}
        process = start(workdir, program=("tests/support/stopped_train.py", place), environment=uncached, **fields)
        while "sending SIGTERM" not in log_of(workdir).read_text()[before:] and process.poll() is None:
            time.sleep(0.01)
        sent = time.monotonic()
        assert wait(process) == 143
        assert time.monotonic() - sent < 5
        saved.append(checkpoints(workdir))
        log = log_of(workdir).read_text()[before:]
        assert "exit code 143" in log and "not interrupted" not in log and "Traceback" not in log
        if place == "class images":
            assert 3 <= len(pictures(workdir / "class_images")) < 10
    print("checkpoints after each SIGTERM:", saved)
    (training,), (sampling,) = saved[2:]
    assert saved[:2] == [[], []] and 18 <= training < 30 and sampling % 20 == 0 and sampling > training
    assert last_step(workdir) == sampling and not (workdir / "samples" / f"step_{sampling:06d}.png").exists()
    finish(workdir, **fields)
    assert_same_run(workdir, finished)


def test_signals_that_come_early_and_often_do_no_harm(finished, micro, tmp_path):
    """SIGTERM in quick succession, from the moment that the plan is printed on."""
    process = start(tmp_path / "run", base=micro)
    while "workdir:" not in log_of(tmp_path / "run").read_text():
        time.sleep(0.01)
    for _ in range(50):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    assert wait(process, 20) == 143


def test_a_run_goes_on_upon_another_mesh_and_back(finished, micro, tmp_path):
    """Longer than the run was, and with one image for eight devices."""
    workdir = shutil.copytree(finished, tmp_path / "moved")
    fields = {"base": micro, "sample_prompts": (), "sample_count": 6, "keep_last": 3}
    log = finish(workdir, devices=8, mesh_data=4, mesh_fsdp=2, steps=64, remat="layers", **fields)
    assert "data 4 x fsdp 2" in log and "going on from step 60" in log
    assert "warning: 2 images at a time keep 2 of 8 devices busy" in log
    assert "going on from step 64" in finish(workdir, steps=66, **fields)
    assert checkpoints(workdir) == [60, 64, 66] and last_step(workdir) == 66
    assert_same_state(read_state(workdir, 60), read_state(finished, 60))
    # The same run on one device: rounded differently, and where a gradient is noise Adam makes a learning rate of it.
    alone = shutil.copytree(finished, tmp_path / "alone")
    finish(alone, steps=66, **fields)
    start, one, other = read_state(finished, 60), read_state(workdir, 66), read_state(alone, 66)
    trained = [name for name in one if "trainable" in name]
    apart = sum(np.abs(one[name] - other[name]).sum() for name in trained)
    moved = sum(np.abs(start[name] - other[name]).sum() for name in trained)
    assert apart < 0.02 * moved
