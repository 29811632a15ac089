"""The state of a run in a bucket, which has neither locks nor renames: lease, config, metrics, record."""

import contextlib
import json
import threading
import time

import numpy as np
import pytest
from etils import epath
from support import bucket
from support.runs import config_of

from dreambooth_jax.diffusion.step import Metrics
from dreambooth_jax.runs import checkpoint, lease
from dreambooth_jax.runs.config import ConfigError
from dreambooth_jax.runs.report import Reporter
from dreambooth_jax.runs.setup import claim

RUN = epath.Path("gs://bucket/runs/dog")


@pytest.fixture(autouse=True)
def objects(monkeypatch):
    return bucket.mount(monkeypatch)


def elsewhere(age: float, token: str = "x") -> None:
    sign = {"token": token, "pid": 1, "host": "far", "machine": "far", "started": "1", "time": time.time() - age}
    (RUN / "lease.json").write_bytes(json.dumps(sign).encode())


def test_one_run_at_a_time():
    held = lease.take(RUN)
    with pytest.raises(lease.Held, match=r"is held by process \d+ on .*--config\.workdir"):
        lease.take(RUN)
    held.release()
    assert not (RUN / "lease.json").exists()


@pytest.mark.parametrize("state", ["absent", "stale", "no lease"])
def test_a_lease_that_nobody_holds_is_taken(state):
    if state == "stale":
        elsewhere(age=lease.STALE_SECONDS + 1)
    elif state == "no lease":
        (RUN / "lease.json").write_bytes(b"{")
    held = lease.take(RUN)
    assert json.loads((RUN / "lease.json").read_bytes())["host"] != "far"
    held.release()


def test_another_machine_holds_it_until_its_signs_end():
    elsewhere(age=30)
    with pytest.raises(lease.Held, match="process 1 on far"):
        lease.take(RUN)


@pytest.mark.parametrize("stale", [False, True])
def test_of_two_at_the_same_moment_one_wins(objects, monkeypatch, stale):
    """The other one's lease appears between our look and our writing."""
    if stale:
        elsewhere(age=lease.STALE_SECONDS + 1)

    def first(path):
        monkeypatch.setattr(objects, "on_write", staticmethod(lambda path: None))
        elsewhere(age=0, token="first")

    monkeypatch.setattr(objects, "on_write", staticmethod(first))
    with pytest.raises(lease.Held, match="at the same moment"):
        lease.take(RUN)
    assert json.loads((RUN / "lease.json").read_bytes())["token"] == "first"


def test_a_network_that_comes_back_and_a_lease_that_is_lost(objects, monkeypatch):
    lost, done, refused = [], threading.Event(), threading.Event()
    held = lease.take(RUN, sign_seconds=0.02, lost=lambda reason: (lost.append(reason), done.set()))

    def refuse(path):
        refused.set()
        raise RuntimeError("503")  # libraries of buckets have errors of their own

    monkeypatch.setattr(objects, "on_write", staticmethod(refuse))
    assert refused.wait(5)
    monkeypatch.setattr(objects, "on_write", staticmethod(lambda path: None))
    before = json.loads((RUN / "lease.json").read_bytes())["time"]
    time.sleep(0.2)
    assert json.loads((RUN / "lease.json").read_bytes())["time"] > before
    for _ in range(3):  # our sign may come after it once
        elsewhere(age=0)
        if done.wait(1):
            break
    assert "another run, process 1 on far" in lost[0]
    held.release()
    assert json.loads((RUN / "lease.json").read_bytes())["host"] == "far"


def test_a_bucket_that_cannot_be_written_is_one_line(objects, monkeypatch):
    def refuse(path):
        raise RuntimeError("Forbidden")

    monkeypatch.setattr(objects, "on_write", staticmethod(refuse))
    with pytest.raises(
        OSError, match=r"workdir = 'gs://bucket/runs/dog' cannot be written \(Forbidden\); give another"
    ):
        lease.take(str(RUN))


def report(first: int, losses: list[float]) -> None:
    values = np.array(losses)
    reporter = Reporter(RUN, first_step=first, steps=9)
    with contextlib.closing(reporter):
        reporter.record(first, Metrics(values, values, values, values), len(values))


def test_metrics_go_on_after_the_checkpoint():
    report(0, [1.0, 2.0, 3.0])
    report(2, [5.0, 6.0])  # from a checkpoint of step 2
    rows = [line.split(",")[:2] for line in (RUN / "metrics.csv").read_text().splitlines()[1:]]
    assert rows == [["1", "1"], ["2", "2"], ["3", "5"], ["4", "6"]]
    assert len(list((RUN / "tensorboard").iterdir())) == 2


def test_the_config_of_the_newest_complete_checkpoint_is_compared():
    """One that was being written when its process ended has a number for its name and no mark of its end."""
    config = config_of(RUN, base="tiny")
    assert claim(RUN, config) == []
    assert json.loads((RUN / "config.json").read_bytes())["workdir"] == str(RUN)
    record = {"digests": {}, "config": json.loads(config.to_json()) | {"seed": 7}}
    (RUN / "checkpoints" / "4" / checkpoint.RECORD).write_bytes(json.dumps(record).encode())
    (RUN / "checkpoints" / "8" / "trainable" / "data").write_bytes(b"half")
    assert checkpoint.steps_of(RUN / "checkpoints") == []
    (RUN / "checkpoints" / "4" / "commit_success.txt").write_bytes(b"")
    assert checkpoint.steps_of(RUN / "checkpoints") == [4]
    with pytest.raises(ConfigError, match="seed: 7 in the checkpoint, 0 now"):
        claim(RUN, config)
