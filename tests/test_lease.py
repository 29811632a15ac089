"""One run per workdir: the second is refused at once, a stale lease is taken over."""

import json
import subprocess
import sys
import threading
import time

import pytest

from dreambooth_jax.runs import lease

HOLD = """
import sys, time
from dreambooth_jax.runs import lease
held = lease.take(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def hold(folder) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_run_is_refused_and_told_who_holds_it(tmp_path):
    process = hold(tmp_path / "run")
    try:
        with pytest.raises(lease.Held, match=rf"process {process.pid} on .*--config\.workdir"):
            lease.take(tmp_path / "run")
    finally:
        process.kill()
        process.wait()
    lease.take(tmp_path / "run").release()  # of a process that is gone: at once


def test_a_lease_that_is_given_back_leaves_nothing(tmp_path):
    held = lease.take(tmp_path)
    assert json.loads((tmp_path / "lease.json").read_text())["pid"] > 0
    held.release()
    held.release()
    assert not list(tmp_path.iterdir())


def elsewhere(folder, age: float) -> None:
    sign = {"token": "x", "pid": 1, "host": "far", "machine": "far", "started": "1", "time": time.time() - age}
    (folder / "lease.json").write_text(json.dumps(sign))


def test_another_machine_holds_it_until_its_signs_end(tmp_path):
    elsewhere(tmp_path, age=30)
    with pytest.raises(lease.Held, match="process 1 on far"):
        lease.take(tmp_path)
    elsewhere(tmp_path, age=lease.STALE_SECONDS + 1)
    lease.take(tmp_path).release()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": 1}'])
def test_a_lease_that_is_no_lease_holds_nothing(tmp_path, text):
    (tmp_path / "lease.json").write_text(text)
    lease.take(tmp_path).release()


def test_signs_go_on_and_a_lost_lease_is_noticed(tmp_path):
    lost, done = [], threading.Event()
    held = lease.take(tmp_path, sign_seconds=0.05, lost=lambda reason: (lost.append(reason), done.set()))
    first = json.loads((tmp_path / "lease.json").read_text())["time"]
    time.sleep(0.3)
    assert json.loads((tmp_path / "lease.json").read_text())["time"] > first
    elsewhere(tmp_path, age=0)
    assert done.wait(5) and "another run, process 1 on far" in lost[0]
    held.release()
    assert json.loads((tmp_path / "lease.json").read_text())["host"] == "far"  # not ours to remove


def test_of_many_at_once_one_wins(tmp_path):
    code = HOLD.replace('print("held", flush=True)\ntime.sleep(60)', "time.sleep(2)")
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL) for _ in range(4)
    ]
    assert sorted(process.wait(60) for process in processes) == [0, 1, 1, 1]
