"""The cost of the paper's protocol on a slice, from shapes alone: the programs of a subject's run, or of a group's."""

import argparse

import jax.numpy as jnp
from ml_collections import ConfigDict

from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.devices.tpu import devices_of
from dreambooth_jax.families.frozen_text import with_cached_text
from dreambooth_jax.families.pipeline import describe_base
from dreambooth_jax.runs import protocol_cost, slices, together
from dreambooth_jax.runs.config import check_config
from dreambooth_jax.runs.job import make_job
from dreambooth_jax.runs.slices import GIB, Plan
from dreambooth_jax.runs.together import Together


def plan_protocol(config: ConfigDict, options: argparse.Namespace) -> str:
    """The cost of the protocol on a slice, as text.

    Raises:
        ConfigError: see `check_protocol`.
        ValueError: the training of a subject, or of a group, does not fit the slice.
    """
    scale, train = protocol_cost.scale_of(config), config.train
    quick, topology = not options.full, options.topology
    check_config(train)
    mesh = make_mesh(train.mesh_data, train.mesh_fsdp, devices_of(topology))
    found: Plan | Together
    if config.at_once > 1:
        found = together.together(train, topology, min(config.at_once, scale.subjects), quick=quick)
        groups = -(-scale.subjects // found.crowd.subjects)
        run = groups * train.steps * found.cost.seconds / scale.subjects if found.cost else 0.0
        excess = found.missing or found.painting_missing
    else:
        found = slices.plan(train, topology, quick=quick)
        run = train.steps * found.cost.seconds + found.sheet_batches * found.painting_seconds if found.cost else 0.0
        excess = found.excess
    if not found.fits:
        what = "a subject's training" if config.at_once == 1 else f"the training of {config.at_once} subjects at once"
        raise ValueError(
            f"{what} does not fit {topology}: {excess / GIB:.2f} GiB too much. Plan it alone for what to change, and "
            "give that as --config.train.FIELD=VALUE" + ", or lower --config.at_once" * (config.at_once > 1)
        )
    job = make_job(train, with_cached_text(describe_base(train.base, dtype=jnp.dtype(train.dtype)), mesh), mesh)
    batch = found.painting_seconds or slices.painting_cost(job, found.chip, quick=quick)[1]
    cost = protocol_cost.cost_of(
        scale,
        run=run,
        class_images=slices.painted_batches(job)[0] * found.class_seconds,
        picture=batch / job.config.class_batch_size,
        score=protocol_cost.scoring_seconds(config, mesh, found.chip, quick=quick),
        chips=found.devices // found.chip.devices,
    )
    return protocol_cost.describe(cost, scale, config, options.chip_hour_price)
