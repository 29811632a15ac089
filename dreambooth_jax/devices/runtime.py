"""What every command does to JAX before its first computation, and what several processes of one run must agree on."""

import gc
import glob
import importlib.metadata
import importlib.util
import os

import fsspec.config
import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from dreambooth_jax.devices import workarounds


def start(cache: str = "~/.cache/dreambooth_jax/xla") -> None:
    """Joins the hosts of a pod, opens the cache of compiled programs, turns the caches of listings of buckets off and
    applies `workarounds`. Call before the first computation; a second call changes nothing.

    On TPU VMs and GKE, JAX finds the other hosts. Elsewhere the environment names them: JAX_COORDINATOR_ADDRESS
    (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
        cache: directory of compiled programs, and of those alone that take half a second or more to compile;
            JAX_COMPILATION_CACHE_DIR and JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS in the environment take precedence.
    """
    if not _has_tpu():
        os.environ["XLA_FLAGS"] = workarounds.with_cpu_flags(os.environ.get("XLA_FLAGS", ""))
        if _platforms() is None and not importlib.metadata.entry_points(group="jax_plugins"):
            jax.config.update("jax_platforms", "cpu")  # libtpu, which `plan` needs, prints errors where it finds no TPU
    for bucket in ("gcs", "s3", "az"):  # other hosts write there too
        fsspec.config.conf.setdefault(bucket, {})["use_listings_cache"] = False
    gc.set_threshold(50_000)
    logging.set_verbosity(logging.WARNING)  # Orbax logs every save at INFO
    if not jax.distributed.is_initialized():
        _join_hosts()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _join_hosts() -> None:
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
        jax.distributed.initialize(**{name: int(os.environ[key]) for name, key in names.items() if key in os.environ})
    elif _has_tpu():
        jax.distributed.initialize()


def _platforms() -> str | None:
    return jax.config.jax_platforms  # type: ignore[attr-defined]


def _has_tpu() -> bool:
    """Whether this host has TPU chips and JAX may use them."""
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    wanted = "tpu" in (_platforms() or "tpu")
    return bool(chips) and wanted and importlib.util.find_spec("libtpu") is not None


def warn_unless_started() -> None:
    """Warns of a CPU whose programs are compiled without the flags of `workarounds`: their numbers may be wrong."""
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if jax.default_backend() == "cpu" and workarounds.with_cpu_flags(flags) != flags:
        logging.warning(
            "this release of jaxlib computes some sums wrongly on CPU unless dreambooth_jax.start() is called before "
            "the first computation"
        )


def is_first_process() -> bool:
    """Whether this is process 0, which writes logs and files."""
    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether the run has a single process."""
    return jax.process_count() == 1


def wait_for_all(what: str) -> None:
    """Returns once every process has called it. `what` names the barrier."""
    if not is_alone():
        multihost_utils.sync_global_devices(what)


def all_have(flags: np.ndarray) -> np.ndarray:
    """Where `flags` are true in every process; all shapes must be equal."""
    return flags if is_alone() else np.all(multihost_utils.process_allgather(flags), axis=0)


def as_first_process_has_it(value: np.ndarray) -> np.ndarray:
    """Process 0's `value`, in every process; all shapes must be equal."""
    return value if is_alone() else np.asarray(multihost_utils.broadcast_one_to_all(value))
