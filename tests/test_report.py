"""Metrics: each step once, whatever was interrupted; what is not finite stops the run."""

import csv
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dreambooth_jax.diffusion.step import Metrics
from dreambooth_jax.runs.report import COLUMNS, NonFiniteLoss, Reporter, check_finite


def metrics(first: int, count: int, capacity: int = 4, **changed) -> Metrics:
    """Step n has the loss n, and zeros stand behind the last step."""
    n = np.where(np.arange(capacity) < count, first + 1.0 + np.arange(capacity), 0)
    return Metrics(**{"loss": n, "instance": n / 4, "prior": n / 8, "grad_norm": n * 10} | changed)


def rows(folder) -> list[list[float]]:
    with (folder / "metrics.csv").open() as file:
        header, *lines = csv.reader(file)
    assert tuple(header) == COLUMNS
    return [[float(value) for value in line] for line in lines]


def read_scalars(folder) -> dict[str, dict[int, float]]:
    """As TensorBoard shows the files: a session that starts at a step hides what earlier ones said from there on."""
    events = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
    shown = {}
    for event in events:
        if event.session_log.status == SessionLog.START:
            shown = {tag: {s: v for s, v in of.items() if s < event.step} for tag, of in shown.items()}
        for value in event.summary.value:
            assert event.step not in shown.setdefault(value.tag, {})
            shown[value.tag][event.step] = value.simple_value
    return shown


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    folder = epath.Path(tmp_path)
    first = Reporter(folder, first_step=0, steps=9)
    first.record(0, metrics(0, 4), 4)
    first.flush()
    first.record(4, metrics(4, 3), 3)
    assert [row[0] for row in rows(folder)] == [1, 2, 3, 4]
    first.close()
    assert [row[0] for row in rows(folder)] == [1, 2, 3, 4, 5, 6, 7]

    again = Reporter(folder, first_step=5, steps=9)
    again.record(5, metrics(5, 4, loss=np.full(4, 0.5)), 4)
    again.close()
    assert [row[:2] for row in rows(folder)] == [[n, n] for n in range(1, 6)] + [[n, 0.5] for n in range(6, 10)]
    assert rows(folder)[2] == [3, 3, 0.75, 0.375, 30]
    scalars = read_scalars(tmp_path / "tensorboard")
    assert scalars.keys() == {f"train/{name}" for name in COLUMNS[1:]}
    assert scalars["train/loss"] == {n: n if n < 6 else 0.5 for n in range(1, 10)}
    assert scalars["train/prior_loss"][3] == 0.375


@pytest.mark.parametrize(("field", "value"), [("loss", np.nan), ("loss", np.inf), ("grad_norm", np.nan)])
def test_a_loss_that_is_not_finite_stops_with_the_step_and_a_remedy(tmp_path, field, value):
    reporter = Reporter(epath.Path(tmp_path), first_step=10, steps=20)
    bad = getattr(metrics(10, 4), field)
    bad[2] = value
    with pytest.raises(NonFiniteLoss, match=r"step 13: loss .*learning_rate.*lr_warmup_steps"):
        reporter.record(10, metrics(10, 4, **{field: bad}), 4)
    assert [row[0] for row in rows(epath.Path(tmp_path))] == [11, 12]


def test_what_stands_behind_the_last_step_is_not_read(tmp_path):
    reporter = Reporter(epath.Path(tmp_path), first_step=0, steps=2)
    reporter.record(0, metrics(0, 2, loss=np.array([1, 2, np.nan, np.nan])), 2)
    reporter.close()
    assert [row[0] for row in rows(epath.Path(tmp_path))] == [1, 2]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_weights_that_ran_away_are_seen_before_the_next_loss(value):
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}
    check_finite(params, 7)
    with pytest.raises(NonFiniteLoss, match="step 7"):
        check_finite(params | {"b": jnp.array([0, value, 0])}, 7)


def test_lines_that_a_spreadsheet_leaves_do_not_end_a_resume(tmp_path, capsys):
    folder = epath.Path(tmp_path)
    first = Reporter(folder, first_step=0, steps=9)
    first.record(0, metrics(0, 4), 4)
    first.close()
    text = (tmp_path / "metrics.csv").read_text().splitlines()
    (tmp_path / "metrics.csv").write_text(
        "\r\n".join(["sep=,", *text[:3], "", ",,,,", "my own note", *text[3:], "2\0"])
    )
    data = (tmp_path / "metrics.csv").read_bytes()
    Reporter(folder, first_step=3, steps=9).close()
    assert [row[0] for row in rows(folder)] == [1, 2, 3]
    assert "kept in metrics_before_3.csv" in capsys.readouterr().out
    assert (tmp_path / "metrics_before_3.csv").read_bytes() == data


def test_lines_of_any_system_are_read_and_what_is_no_csv_is_named(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b"step,loss\r1,2,3,4,5\r2,3,4,5,6\r")
    Reporter(epath.Path(tmp_path), first_step=2, steps=9).close()
    assert [row[0] for row in rows(epath.Path(tmp_path))] == [1, 2]
    (tmp_path / "metrics.csv").write_text("1" * 200_000)
    with pytest.raises(ValueError, match=r"metrics\.csv, line 1: not readable as CSV"):
        Reporter(epath.Path(tmp_path), first_step=2, steps=9)


def test_blank_lines_are_no_reason_to_keep_a_second_file(tmp_path):
    (tmp_path / "metrics.csv").write_text("\ufeffstep,loss,instance_loss,prior_loss,grad_norm\n1,1,1,0,1\n,,,,\n\n")
    Reporter(epath.Path(tmp_path), first_step=1, steps=9).close()
    assert [row[0] for row in rows(tmp_path)] == [1] and len(list(tmp_path.glob("*.csv"))) == 1
