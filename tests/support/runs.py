"""Training runs for tests: a base so small that a step takes milliseconds, the command in a subprocess, its states."""

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from support.flags import xla_flags
from support.torch_folders import write_folder

ROOT = Path(__file__).parent.parent.parent
UNET = {
    "sample_size": 8,
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 16,
}
# The one program of the runs that are compared bit by bit, so that it is compiled once.
SMALL = {
    "num_class_images": 10,
    "class_batch_size": 4,
    "steps": 60,
    "steps_per_call": 2,
    "batch_size": 1,
    "ema_decay": 0.9,
    "crop": "random",
    "flip": True,
    "views": 2,
    "save_every": 10,
    "keep_last": 1,
    "sample_every": 20,
    "sampling_steps": 4,
    "sample_prompts": ("a {identifier} {class_noun} in the snow", "a {class_noun}"),
    "sample_count": 2,
}


def write_micro(folder: Path):
    """A diffusers folder of pictures of 16x16; returns the PyTorch pipeline."""
    return write_folder(folder, unet=UNET, text=TEXT, vae=VAE)


def flags(**fields) -> list[str]:
    return [
        f"--config.{name}={value!r}" if not isinstance(value, str) else f"--config.{name}={value}"
        for name, value in fields.items()
    ]


get_config = runpy.run_path(str(ROOT / "configs" / "dog.py"))["get_config"]


def config_of(workdir: Path, **fields):
    """The config of configs/dog.py with `SMALL` and `fields` in their places."""
    config = get_config()
    config.update(SMALL | {"workdir": str(workdir), "instance_images": str(ROOT / config.instance_images)} | fields)
    return config


def start(workdir: Path, *, program=("-m", "dreambooth_jax.train"), devices=1, environment=(), log=None, **fields):
    """The train command in a process of its own; its output goes to `log`, or to `workdir`.log."""
    env = os.environ | {"XLA_FLAGS": xla_flags(devices), "PYTHONPATH": str(ROOT)} | dict(environment)
    command = [sys.executable, *program, "--config", "configs/dog.py", *flags(workdir=str(workdir), **SMALL | fields)]
    log_of(workdir).parent.mkdir(parents=True, exist_ok=True)
    with log_of(log or workdir).open("a") as output:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output)


def log_of(workdir: Path) -> Path:
    return workdir.with_name(workdir.name + ".log")


def finish(workdir: Path, code: int = 0, **fields) -> str:
    """Runs the command to its end; returns what it has printed."""
    process = start(workdir, **fields)
    assert wait(process) == code, log_of(workdir).read_text()
    return log_of(workdir).read_text()


def wait(process: subprocess.Popen, timeout: float = 300) -> int:
    try:
        return process.wait(timeout)
    finally:
        process.kill()


def kill_when(process: subprocess.Popen, happened, delay: float = 0.0) -> bool:
    """Sends SIGKILL `delay` seconds after `happened()`; whether the process was still running."""
    deadline = time.monotonic() + 300
    while not happened() and process.poll() is None:
        assert time.monotonic() < deadline, "what should happen before the kill never did"
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def checkpoints(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit())


def read_state(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Everything in a checkpoint, as it lies on the disk: trained weights, optimizer state, average."""
    folder = workdir / "checkpoints" / str(step)
    items = {path.name for path in folder.iterdir() if path.is_dir()}
    with ocp.CheckpointManager(folder.parent, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        found = manager.restore(step, args=ocp.args.Composite(**{name: ocp.args.StandardRestore() for name in items}))
    leaves = jax.tree_util.tree_leaves_with_path({name: found[name] for name in items})
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_state(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys() and len(one) > 10
    assert not [name for name in one if not np.array_equal(one[name], other[name])]


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def assert_same_run(one: Path, other: Path) -> None:
    """All that a run leaves behind is equal: states to the last bit, pictures, metrics of every step once."""
    assert checkpoints(one) == checkpoints(other)
    assert_same_state(read_state(one, checkpoints(one)[-1]), read_state(other, checkpoints(other)[-1]))
    for folder in ("class_images", "samples"):
        assert pictures(one / folder).keys() == pictures(other / folder).keys()
        assert pictures(one / folder) == pictures(other / folder)
    assert (one / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
