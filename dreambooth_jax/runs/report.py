"""What the person sees while a model trains: a progress bar, metrics.csv, TensorBoard events."""

import csv
import io
import math
import os
import socket
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from tqdm import tqdm

from dreambooth_jax.devices import runtime
from dreambooth_jax.diffusion.step import Metrics
from dreambooth_jax.files.atomic import write_atomic
from dreambooth_jax.files.tables import read_lines
from dreambooth_jax.models.params import Params
from dreambooth_jax.runs.events import Events

COLUMNS = ("step", "loss", "instance_loss", "prior_loss", "grad_norm")


class NonFiniteLoss(FloatingPointError):
    """The loss, its gradient or the weights became NaN or infinite."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}. What was saved is from before it. Try a lower learning_rate, a longer lr_warmup_steps, "
            "clip_norm=1.0, or dtype='float32'."
        )


@jax.jit
def _norm(params: Params) -> jax.Array:
    return optax.tree.norm(params)


def check_finite(params: Params, step: int) -> None:
    """Raises NonFiniteLoss if the weights after `step`, whose loss says nothing of them yet, are not finite."""
    if not jnp.isfinite(_norm(params)):
        raise NonFiniteLoss(f"step {step}: its update made the weights infinite or NaN")


class Reporter:
    """Writes the metrics of training steps. On resume, rows after the checkpoint are dropped.

    Args:
        first_step: number of steps that the checkpoint has.
        steps: number of steps of the whole run.
    """

    def __init__(self, workdir: epath.Path, *, first_step: int, steps: int) -> None:
        self._path = workdir / "metrics.csv"
        # Rewritten whole at every save: gs:// files cannot be appended to.
        self._rows = _read_rows(self._path, first_step)
        first = runtime.is_first_process()
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{first_step}"
        self._events = Events(workdir / "tensorboard" / name, first_step=first_step + 1) if first else None
        self._bar = tqdm(
            total=steps, initial=first_step, desc="training", unit="step", mininterval=1.0, disable=not first
        )

    def record(self, first_step: int, metrics: Metrics, count: int) -> None:
        """Records the first `count` steps of a call; waits until they are computed.

        Args:
            first_step: number of steps before the call.
            metrics: stacked [capacity] each.

        Raises:
            NonFiniteLoss: naming the first step whose loss or gradient is not finite, and what to try.
        """
        columns = Metrics(*(np.asarray(column)[:count] for column in metrics))
        for offset, values in enumerate(zip(*columns, strict=True)):
            step, row = first_step + offset + 1, Metrics(*map(float, values))
            if not all(map(math.isfinite, row)):
                self.close()
                raise NonFiniteLoss(f"step {step}: loss {row.loss}, gradient norm {row.grad_norm}")
            self._rows.append((str(step), *(f"{value:.6g}" for value in row)))
            if self._events:
                names = (f"train/{name}" for name in COLUMNS[1:])
                self._events.add(step, dict(zip(names, row, strict=True)))
        self._bar.set_postfix(
            loss=f"{columns.loss.mean():.4f}",
            instance=f"{columns.instance.mean():.4f}",
            prior=f"{columns.prior.mean():.4f}",
            refresh=False,
        )
        self._bar.update(count)

    def flush(self) -> None:
        """Brings everything recorded so far to the disk."""
        if self._events:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([COLUMNS, *self._rows])
            write_atomic(self._path, text.getvalue().encode())
            self._events.flush()

    def close(self) -> None:
        """Writes everything and ends the progress bar."""
        self.flush()
        self._bar.close()


def _read_rows(path: epath.Path, last_step: int) -> list[tuple[str, ...]]:
    """The rows of steps up to `last_step`. A file with other lines, such as a spreadsheet's with semicolons, is kept
    under another name, since it is written anew; blank lines are left out.

    Raises:
        ValueError: it is no CSV; see `read_lines`.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    lines = [row for row in read_lines(data.decode("utf-8-sig", errors="replace"), path).values() if any(row)]
    rows = [tuple(row) for row in lines if _is_row(row)]
    if len(rows) < len([row for row in lines if tuple(row) != COLUMNS]) and runtime.is_first_process():
        kept = path.with_name(f"metrics_before_{last_step}.csv")
        write_atomic(kept, data)
        print(f"note: {path} holds lines that are no metrics; they are left out, and kept in {kept.name}", flush=True)
    return [row for row in rows if int(row[0]) <= last_step]


def _is_row(row: Sequence[str]) -> bool:
    try:
        return len(row) == len(COLUMNS) and int(row[0]) > 0 and all(math.isfinite(float(text)) for text in row[1:])
    except ValueError:
        return False
