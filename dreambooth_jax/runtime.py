"""What every command does to JAX before its first computation."""

import os
from pathlib import Path

import jax
from absl import logging


def start(cache: str = "~/.cache/dreambooth_jax/xla") -> None:
    """Joins the other hosts of a pod, if there are any, and keeps compiled programs for the next run.

    The cache directory of the environment (JAX_COMPILATION_CACHE_DIR) comes before `cache`.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax tells its whole life otherwise
    if _on_pod():
        jax.distributed.initialize()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path(cache).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _on_pod() -> bool:
    """Whether the environment, a TPU VM's or a launcher's, says that this is one of several hosts."""
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return len(hosts) > 1 or "JAX_COORDINATOR_ADDRESS" in os.environ


def is_first_process() -> bool:
    """The one process that writes what a person reads."""
    return jax.process_index() == 0
