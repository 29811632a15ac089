"""What the person sees while a model trains: a progress bar, metrics.csv, TensorBoard events."""

import csv
import io
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from dreambooth_jax.devices import runtime
from dreambooth_jax.diffusion.step import Metrics
from dreambooth_jax.models.params import Params

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


def write_whole(path: epath.Path, text: str) -> None:
    """Replaces the text of a file at once: a killed run leaves the old one or the new one."""
    partial = path.parent / f".{path.name}.partial"
    partial.write_text(text)
    partial.replace(path)


class Reporter:
    """Writes the metrics of training steps; of a resumed run it first forgets what came after the checkpoint."""

    def __init__(self, workdir: epath.Path, *, first_step: int, steps: int) -> None:
        self._path = workdir / "metrics.csv"
        rows = [row for row in _read_rows(self._path) if int(row[0]) <= first_step]
        # Rewritten whole after every call: gs:// files cannot be appended to.
        self._rows: list[Sequence] = rows
        first = runtime.is_first_process()
        folder, suffix = str(workdir / "tensorboard"), f".{first_step}"  # a quick restart must not share a file
        self._events = SummaryWriter(folder, purge_step=first_step + 1, filename_suffix=suffix, write_to_disk=first)
        self._bar = tqdm(
            total=steps, initial=first_step, desc="training", unit="step", mininterval=1.0, disable=not first
        )

    def record(self, first_step: int, metrics: Metrics, count: int) -> None:
        """Writes the first `count` steps of a call; waits until they are computed.

        Args:
            first_step: number of steps before the call.
            metrics: stacked [capacity] each.

        Raises:
            NonFiniteLoss: naming the first step whose loss or gradient is not finite, and what to try.
        """
        columns = [np.asarray(column)[:count] for column in metrics]
        for offset, row in enumerate(zip(*columns, strict=True)):
            step = first_step + offset + 1
            if not all(map(math.isfinite, row)):
                self.close()
                raise NonFiniteLoss(f"step {step}: loss {row[0]}, gradient norm {row[3]}")
            self._rows.append((step, *(f"{value:.6g}" for value in row)))
            for name, value in zip(COLUMNS[1:], row, strict=True):
                self._events.add_scalar(f"train/{name}", float(value), step)
        means = [column.mean() for column in columns]
        self._bar.set_postfix(
            loss=f"{means[0]:.4f}", instance=f"{means[1]:.4f}", prior=f"{means[2]:.4f}", refresh=False
        )
        self._bar.update(count)

    def flush(self) -> None:
        """Brings everything recorded so far to the disk."""
        if runtime.is_first_process():
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([COLUMNS, *self._rows])
            write_whole(self._path, text.getvalue())
        self._events.flush()

    def close(self) -> None:
        self.flush()
        self._events.close()
        self._bar.close()


def _read_rows(path: epath.Path) -> list[list[str]]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.reader(file))[1:]
