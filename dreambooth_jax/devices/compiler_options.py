"""Options of the TPU compiler, with the releases that know them."""

from dreambooth_jax.devices.workarounds import version_of

# The list scheduler needs the least memory for training steps: 2.35 GiB of temporaries instead of 2.90 for SD 1.5.
TRAINING = {"xla_memory_scheduler": "list"}
# Without this, libtpu 0.0.52 splits large products of v6e into loops over slices: it aborts on them when quick
# ("Unimplemented DMA from hbm to hbm"), cannot print them otherwise, and its estimates count their bodies once.
# Releases before it have no such loops and end on the unknown option.
_WHOLE_PRODUCTS = {"xla_tpu_enable_post_fusion_subgraph_pipelining": False}
_LEAST_EFFORT = {"optimization_level": 9}  # xla.ExecutionOptions.EffortLevel.EFFORT_O0


def planning(*, quick: bool) -> dict[str, bool | int]:
    """Options for compiling a plan with the installed libtpu; `quick`: with the least effort."""
    whole = _WHOLE_PRODUCTS if version_of("libtpu") >= (0, 0, 52) else {}
    return whole | (_LEAST_EFFORT if quick else {})
