"""What every command does to JAX before its first computation, and what several processes of one run must agree on."""

import gc
import glob
import importlib.util
import os
from pathlib import Path

import jax
import jaxlib.version
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

# What XLA's CPU backend hands to the library YNNPACK: nothing. In jaxlib 0.10 some sums over a product come out wrong
# there (a sum of squares as -1e17), and differ from call to call; convolutions take longer, and so does compiling.
_NO_YNNPACK = "--xla_cpu_experimental_ynn_fusion_type="


def start(cache: str = "~/.cache/dreambooth_jax/xla") -> None:
    """Joins the other hosts of a pod, if there are any; keeps compiled programs for the next run; on CPU, keeps XLA
    from a library that gets sums wrong. Before the first computation.

    TPU VMs and GKE tell JAX who the others are. Elsewhere the environment does: JAX_COORDINATOR_ADDRESS (host:port of
    process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. The cache directory of the environment
    (JAX_COMPILATION_CACHE_DIR) comes before `cache`.
    """
    _avoid_ynnpack()
    gc.set_threshold(50_000)  # not 700: looking for garbage takes a quarter of the time of tracing
    logging.set_verbosity(logging.WARNING)  # Orbax tells its whole life otherwise
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
        jax.distributed.initialize(**{name: int(os.environ[key]) for name, key in names.items() if key in os.environ})
    elif _has_tpu():
        jax.distributed.initialize()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path(cache).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _avoid_ynnpack() -> None:
    """Through XLA_FLAGS: a TPU's compiler, and other releases, refuse flags that they do not know."""
    flags = os.environ.get("XLA_FLAGS", "")
    if jaxlib.version.__version__.startswith("0.10.") and not _has_tpu() and "ynn_fusion_type" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_NO_YNNPACK}".strip()


def _has_tpu() -> bool:
    """Whether this is a host with TPU chips that JAX is to use: of a slice, maybe, and JAX can find out."""
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    wanted = jax.config.jax_platforms is None or "tpu" in jax.config.jax_platforms
    return bool(chips) and wanted and importlib.util.find_spec("libtpu") is not None


def is_first_process() -> bool:
    """The one process that writes what a person reads."""
    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether the run is this one process."""
    return jax.process_count() == 1


def wait_for_all(what: str) -> None:
    """Returns once every process has come here."""
    if not is_alone():
        multihost_utils.sync_global_devices(what)


def as_first_process_has_it(value: np.ndarray) -> np.ndarray:
    """Process 0's `value`, in every process; shapes must agree."""
    return value if is_alone() else np.asarray(multihost_utils.broadcast_one_to_all(value))
