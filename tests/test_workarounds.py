"""The table of workarounds: every row is needed by a supported release, and its module and its test are there."""

import dataclasses
import gc
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from support.tiny_unet import UNET, normal

from dreambooth_jax.devices import workarounds
from dreambooth_jax.devices.workarounds import WORKAROUNDS, Workaround, applies, version_of, with_cpu_flags
from dreambooth_jax.diffusion.schedulers import process_from_scheduler
from dreambooth_jax.diffusion.step import make_step
from dreambooth_jax.models.layers import Linear
from dreambooth_jax.models.params import _OneKey, functional
from dreambooth_jax.models.unet import UNet2DConditionModel
from dreambooth_jax.ops import channels, convolve

ROOT = Path(__file__).parent.parent


def lowest_supported(package: str) -> tuple[int, ...]:
    """The lowest release that setup.py allows; jaxlib's are jax's."""
    name = "jax" if package == "jaxlib" else package
    found = re.search(rf'"{name}[>=]=([\d.]+)', (ROOT / "setup.py").read_text())
    return tuple(int(part) for part in found[1].strip(".").split(".")) if found else ()


@pytest.mark.parametrize("row", WORKAROUNDS, ids=lambda row: row.name)
def test_a_supported_release_needs_it(row):
    if row.before is not None:
        lowest = lowest_supported(row.package)
        assert lowest and lowest < row.before, f"no supported release of {row.package} needs {row.name!r}: remove it"
    assert (ROOT / "dreambooth_jax" / row.where).is_file()
    if row.test:
        file, _, test = row.test.partition("::")
        assert f"def {test}(" in (ROOT / "tests" / file).read_text()


def test_flags_are_given_to_releases_that_know_them(monkeypatch):
    row = next(row for row in WORKAROUNDS if row.xla_flag)
    for version, given in (((0, 9, 2), False), ((0, 10, 2), True), ((0, 12, 0), False)):
        monkeypatch.setattr(workarounds, "version_of", lambda package, version=version: version)
        assert applies(row) is given
        assert (row.xla_flag in with_cpu_flags("--xla_other=1")) is given
        assert with_cpu_flags("--xla_other=1").startswith("--xla_other=1")
        assert row.xla_flag + "x" not in with_cpu_flags("")
        own = row.xla_flag + "dot"
        assert with_cpu_flags(own) == own  # the user's choice stands


def test_a_step_warns_where_the_flags_are_absent(monkeypatch, caplog):
    process = process_from_scheduler({"beta_schedule": "linear"})
    build = lambda: make_step(lambda params, x, t, cond: x, optax.sgd(1.0), process, batch_size=1)  # noqa: E731
    build()
    assert not caplog.records
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")
    build()
    assert len(caplog.records) == any(row.xla_flag and applies(row) for row in WORKAROUNDS)


def test_versions():
    assert version_of("jax") >= (0, 10)
    newest = Workaround("", "", "jax", (0, 0), None, "", "", "")
    assert applies(newest) and not applies(dataclasses.replace(newest, before=(0, 1)))


def test_collections_take_time_from_tracing():
    """Python's own threshold of 700 objects makes the collector run all the time, even for a small model."""
    unet = functional(lambda rngs: UNet2DConditionModel(UNET, rngs=rngs))
    inputs = normal(0, 1, 8, 8, 4), jnp.ones(1), normal(1, 1, 3, 16)
    phases, own = [], gc.get_threshold()

    def collections() -> int:
        phases.clear()
        jax.clear_caches()
        jax.make_jaxpr(jax.grad(lambda params: unet.apply(params, *inputs).sum()))(unet.shapes)
        return phases.count("start")

    def note(phase: str, info: dict) -> None:
        phases.append(phase)

    gc.callbacks.append(note)
    try:
        gc.set_threshold(700)
        default = collections()
        gc.set_threshold(50_000)
        raised = collections()
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*own)
    assert default > 20 and default > 10 * raised


def least_seconds(function, argument, *, tries: int) -> float:
    """Of the compiled function, the best of some tries."""
    run = jax.jit(function)
    jax.block_until_ready(run(argument))
    times = []
    for _ in range(tries):
        started = time.perf_counter()
        jax.block_until_ready(run(argument))
        times.append(time.perf_counter() - started)
    return min(times)


def test_xla_s_gradients_of_convolutions_are_slow_on_cpu():
    """Inside a loop, the best of a few tries."""
    kernel, x = normal(0, 3, 3, 32, 32), normal(1, 2, 32, 32, 32)

    def seconds(conv) -> float:
        def step(kernel, _):
            loss = lambda kernel: jnp.square(conv(jnp.tanh(conv(x, kernel, 1, 1)), kernel, 2, 1)).sum()  # noqa: E731
            return kernel - 1e-9 * jax.grad(loss)(kernel), None

        return least_seconds(lambda kernel: jax.lax.scan(step, kernel, length=2)[0], kernel, tries=3)

    assert seconds(convolve._convolve) > 2 * seconds(convolve.convolve)


def test_xla_s_sums_over_rows_are_slow_on_cpu():
    """The best of a few tries."""
    x = normal(0, 1 << 16, 64)

    assert least_seconds(lambda x: x.sum(0), x, tries=5) > 1.5 * least_seconds(channels.row_sums, x, tries=5)


class Chain(nnx.Module):
    """Many small layers."""

    def __init__(self, count, rngs):
        self.layers = nnx.List([Linear(2, 2, dtype=jnp.float32, rngs=rngs) for _ in range(count)])


def test_counting_keys_takes_time_from_tracing():
    def seconds(rngs) -> float:
        started = time.perf_counter()
        nnx.eval_shape(lambda: Chain(300, rngs()))
        return time.perf_counter() - started

    def one_key() -> nnx.Rngs:
        rngs = nnx.Rngs(params=0)
        rngs.params = _OneKey(0, tag="params")
        return rngs

    seconds(one_key)
    assert seconds(lambda: nnx.Rngs(0)) > 1.5 * seconds(one_key)


def test_libtpu_ends_the_process_over_flags_of_the_cpu():
    """Releases that the table names do, and others do not."""
    program = """
import jax
from jax.experimental import topologies

jax.devices()
device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices[0]
x = jax.ShapeDtypeStruct((8, 128), "float32", sharding=jax.sharding.SingleDeviceSharding(device))
jax.jit(lambda x: x + 1).lower(x).compile()
print("it goes on")
"""
    (row,) = (row for row in WORKAROUNDS if row.name == "XLA_FLAGS and libtpu")
    environment = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    ends = re.search("Unknown flags? in XLA_FLAGS", done.stderr) is not None
    assert ends == (done.returncode != 0) == applies(row), done.stderr
