"""One run over several processes, as on the hosts of a pod: on this machine, with CPU collectives."""

import csv
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.runs import ROOT, checkpoints, get_config, log_of, pictures, start, wait

from dreambooth_jax.files.hub import EMBEDDED_FOLDER

pytestmark = pytest.mark.slow

FIELDS = {"batch_size": 4, "steps": 12, "save_every": 4, "sample_every": 12, "num_class_images": 10, "mesh_fsdp": 2}
STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def none_left():
    """A test that fails leaves no process that trains on."""
    yield
    while STARTED:
        STARTED.pop().kill()


def start_all(workdir: Path, count: int, devices: int, workdirs=None, **fields):
    """`count` processes of one run, each with its own log `workdir.N.log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for number in range(count):
        environment = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(number),
        }
        folder = workdirs[number] if workdirs else workdir
        log = workdir.with_name(f"{workdir.name}.{number}")
        processes.append(start(folder, devices=devices, environment=environment, log=log, **FIELDS | fields))
    STARTED.extend(processes)
    return processes


def wait_all(workdir: Path, processes, codes) -> None:
    found = [wait(process) for process in processes]
    logs = [log_of(workdir.with_name(f"{workdir.name}.{number}")) for number in range(len(found))]
    assert found == codes, "\n".join(log.read_text()[-3000:] for log in logs)


def losses(workdir: Path) -> np.ndarray:
    rows = list(csv.reader((workdir / "metrics.csv").open()))[1:]
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    return np.array([[float(value) for value in row[1:]] for row in rows])


def until(happened, processes) -> None:
    deadline = time.monotonic() + 300
    while not happened():
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def one(micro, tmp_path_factory):
    """The run as one process of eight devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    assert wait(start(workdir, devices=8, base=micro, **FIELDS)) == 0, log_of(workdir).read_text()
    return workdir


@pytest.fixture(scope="module")
def four(micro, tmp_path_factory):
    """The same as four processes of two devices each."""
    workdir = tmp_path_factory.mktemp("four") / "run"
    wait_all(workdir, start_all(workdir, 4, 2, base=micro, mesh_fsdp=4), [0] * 4)
    return workdir


def test_four_processes_are_one_process_with_all_devices(one, four):
    np.testing.assert_allclose(losses(four), losses(one), rtol=1e-5, atol=1e-5)
    assert pictures(four / "class_images").keys() == pictures(one / "class_images").keys()
    assert len(pictures(four / "class_images")) == 10
    assert pictures(four / "samples").keys() == pictures(one / "samples").keys()
    assert checkpoints(four) == checkpoints(one)


def test_one_process_speaks_for_all(four):
    first, *others = [log_of(four.with_name(f"{four.name}.{number}")).read_text() for number in range(4)]
    assert "Done. Checkpoint" in first and "training:" in first
    for log in others:
        assert "Done. Checkpoint" not in log and "training:" not in log and "class images:" not in log
    assert len(list((four / "tensorboard").glob("events*"))) == 1


def test_two_processes_train_a_subject_each(micro, tmp_path):
    """The files are those of one process with two devices; the processes paint one set of class images."""
    photos = ROOT / "examples" / "subjects" / "dog"
    (tmp_path / "table.csv").write_text(f"name,photos,steps\nrex,{photos},2\ntom,{photos},4\n")
    fields = {"subjects": str(tmp_path / "table.csv"), "method": "lora", "lora_rank": 2, "mesh_fsdp": 1}
    fields |= {"steps": 4, "sample_every": get_config().sample_every, "batch_size": 1, "num_class_images": 4}
    alone, workdir = tmp_path / "one", tmp_path / "two"
    assert wait(start(alone, devices=2, base=micro, **FIELDS | fields)) == 0, log_of(alone).read_text()
    wait_all(workdir, start_all(workdir, 2, 1, base=micro, **fields), [0, 0])
    for name in ("rex", "tom"):
        found, wanted = (load_file(folder / f"{name}.safetensors") for folder in (workdir, alone))
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-3, atol=1e-5, err_msg=key)
    assert pictures(workdir / "samples").keys() == pictures(alone / "samples").keys()
    said = log_of(tmp_path / "two.0").read_text(), log_of(tmp_path / "two.1").read_text()
    assert "tom: 4 steps" in said[0] and "tom: 4 steps" not in said[1]


def test_two_processes_score_and_keep_the_best_of_one(micro, tmp_path):
    clip = tmp_path / "clip"  # as published CLIPs are: with the tokenizer's files
    shutil.copytree(EMBEDDED_FOLDER / "clip", clip)
    shutil.copytree(EMBEDDED_FOLDER / "tokenizer", clip, dirs_exist_ok=True)
    judges = {"judge_dino": str(EMBEDDED_FOLDER / "vit"), "judge_clip": str(clip)}
    fields = {"steps": 8, "sample_every": 4, "evaluate_every": 4, "keep_best": True, "held_out_images": "1"}
    fields |= judges | {"best_max_prompt_loss": 1.0, "best_max_copy": 1.0}
    alone, workdir = tmp_path / "one", tmp_path / "two"
    assert wait(start(alone, devices=2, base=micro, **FIELDS | fields)) == 0, log_of(alone).read_text()
    wait_all(workdir, start_all(workdir, 2, 1, base=micro, **fields), [0, 0])
    tables = [list(csv.DictReader((folder / "scores.csv").open())) for folder in (alone, workdir)]
    assert [row["step"] for row in tables[0]] == ["0", "4", "8"]
    for ours, theirs in zip(*tables, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(float(ours[name] or 0), float(value or 0), rtol=1e-3, atol=1e-4, err_msg=name)
    kept = [sorted(int(path.name) for path in (folder / "best").glob("[0-9]*")) for folder in (alone, workdir)]
    assert kept[0] == kept[1] == [int(tables[0][-1]["best"])]


def train_on(workdir: Path, one: Path, micro: str, **fields) -> list[subprocess.Popen]:
    """Two processes of four devices each, with the class images of the run `one`, that paint no sheets."""
    fields |= {"sample_every": 4000, "class_images": str(one / "class_images")}
    return start_all(workdir, 2, 4, base=micro, **fields)


def test_sigterm_to_one_is_a_save_of_all(one, micro, tmp_path):
    workdir = tmp_path / "run"
    processes = train_on(workdir, one, micro, steps=4000, save_every=12)
    until(lambda: checkpoints(workdir), processes)  # both are in the loop then
    processes[1].send_signal(signal.SIGTERM)
    wait_all(workdir, processes, [143, 143])
    (saved,) = checkpoints(workdir)
    assert 0 < saved < 4000
    wait_all(workdir, train_on(workdir, one, micro, steps=saved + 4), [0, 0])
    found = losses(workdir)
    assert len(found) == saved + 4
    steps = min(len(found), len(losses(one)))
    np.testing.assert_allclose(found[:steps], losses(one)[:steps], rtol=1e-5, atol=1e-5)


def kill_one(workdir: Path, one: Path, micro: str, killed: int) -> None:
    """Kills one of two processes that train; the other one says why it ends."""
    processes = train_on(workdir, one, micro, steps=4000, save_every=4)
    until(lambda: checkpoints(workdir), processes)
    processes[killed].send_signal(signal.SIGKILL)
    other = processes[1 - killed]
    assert wait(other, timeout=150) not in (0, -signal.SIGKILL)
    log = log_of(workdir.with_name(f"run.{1 - killed}")).read_text()
    assert (
        "cannot go on without the others" in log or "another task died" in log or "coordination service" in log.lower()
    )
    processes[killed].wait()


def test_when_the_second_is_killed_the_first_says_so(one, micro, tmp_path):
    kill_one(tmp_path / "run", one, micro, 1)


def test_when_the_first_is_killed_the_second_says_so_and_the_restart_goes_on(one, micro, tmp_path):
    workdir = tmp_path / "run"
    kill_one(workdir, one, micro, 0)
    saved = checkpoints(workdir)[-1]
    wait_all(workdir, train_on(workdir, one, micro, steps=saved + 4), [0, 0])
    found = losses(workdir)
    assert len(found) == saved + 4
    np.testing.assert_allclose(found[:12], losses(one)[: len(found)], rtol=1e-5, atol=1e-5)


def test_hosts_that_share_no_folder_are_told(micro, tmp_path):
    workdirs = [tmp_path / "here" / "run", tmp_path / "there" / "run"]
    workdir = tmp_path / "run"
    processes = start_all(workdir, 2, 4, workdirs=workdirs, base=micro)
    assert wait(processes[0]) != 0 and wait(processes[1]) != 0
    assert "must be one folder for all" in log_of(workdir.with_name("run.0")).read_text()
