"""XLA's flags for tests, and for the programs that they start. Imports nothing of JAX."""

from dreambooth_jax.devices import workarounds

# Compiling takes most of the tests' time: without optimisation, and with the older code generator, a quarter of it.
# Later releases of jaxlib do not know the older one and end the process over its flag.
_OLDER = "--xla_cpu_use_fusion_emitters=false" if workarounds.version_of("jaxlib") < (0, 11) else ""


def xla_flags(devices: int) -> str:
    """The flags for that number of devices."""
    fast = f"--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 {_OLDER}"
    return f"--xla_force_host_platform_device_count={devices} {fast}"
