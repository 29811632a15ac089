"""What every command does before its first computation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# The norm of a UNet's gradients, alone and beside the gradients themselves: XLA compiles different programs for them.
NORMS = """
from dreambooth_jax.devices import runtime
runtime.start()
import jax, jax.numpy as jnp, optax
from support.tiny_unet import UNET, normal
from dreambooth_jax.models.unet import UNet2DConditionModel
from dreambooth_jax.models.params import functional

unet = functional(lambda rngs: UNet2DConditionModel(UNET, remat="layers", rngs=rngs))
params = unet.init(jax.random.key(0))
x, target, context = normal(1, 2, 4, 4, 4), normal(2, 2, 4, 4, 4), normal(3, 2, 3, 16)
gradient = jax.grad(lambda params: jnp.square(unet.apply(params, x, jnp.array([3, 500]), context) - target).mean())
alone = jax.jit(lambda params: optax.tree.norm(gradient(params)))
for _ in range(20):
    print(alone(params), optax.tree.norm(jax.jit(gradient)(params)))
"""


@pytest.mark.slow
def test_sums_over_products_are_right():
    """In a process of its own, as a command has it: without the flags of these tests."""
    here = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(here)
    out = subprocess.run(
        [sys.executable, "-c", NORMS], env=environment, capture_output=True, text=True, check=True
    ).stdout
    pairs = [tuple(map(float, line.split())) for line in out.splitlines()]
    assert len(pairs) == 20
    assert all(abs(alone - beside) < 1e-4 * beside for alone, beside in pairs), pairs


def test_a_machine_without_a_tpu_is_silent_about_it():
    """Also where libtpu is installed, which `plan` needs."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    program = "from dreambooth_jax.devices import runtime; runtime.start(); import jax; print(jax.device_count())"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ("evaluate", "export", "identifier", "plan", "pretrain", "sample", "train"))
def test_every_command_prepares_jax(name):
    """Without it a command computes wrong sums on CPU (see `test_sums_over_products_are_right`)."""
    source = (Path(__file__).parent.parent / "dreambooth_jax" / f"{name}.py").read_text()
    assert "runtime.start()" in source
