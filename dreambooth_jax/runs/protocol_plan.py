"""The cost of the paper's protocol on a slice, from shapes alone: the programs of a subject's run, or of a group's."""

import argparse
from typing import NamedTuple

from ml_collections import ConfigDict

from dreambooth_jax.devices.chips import Chip
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.devices.tpu import devices_of
from dreambooth_jax.runs import protocol_cost, slices, together
from dreambooth_jax.runs.config import check_config
from dreambooth_jax.runs.slices import GIB, Plan
from dreambooth_jax.runs.stages import stage_configs
from dreambooth_jax.runs.together import Together


class _Part(NamedTuple):
    """Seconds of a subject's run, or of one stage of it: its training with sheets, the class images of its noun, and
    one picture to be scored."""

    run: float
    class_images: float
    picture: float
    chip: Chip
    chips: int


def plan_protocol(config: ConfigDict, options: argparse.Namespace) -> str:
    """The cost of the protocol on a slice, as text; of a cascade, that of all stages.

    Raises:
        ConfigError: see `check_protocol`.
        ValueError: the training of a subject, or of a group, does not fit the slice.
    """
    scale, train = protocol_cost.scale_of(config), config.train
    quick, topology = not options.full, options.topology
    check_config(train)
    if config.at_once > 1:
        parts = [_group(train, topology, min(config.at_once, scale.subjects), scale.subjects, quick)]
    else:
        parts = [_subject(own, topology, quick) for own in stage_configs(train)]
    mesh = make_mesh(train.mesh_data, train.mesh_fsdp, devices_of(topology))
    cost = protocol_cost.cost_of(
        scale,
        run=sum(part.run for part in parts),
        class_images=sum(part.class_images for part in parts),
        picture=sum(part.picture for part in parts),
        score=protocol_cost.scoring_seconds(config, mesh, parts[0].chip, quick=quick),
        chips=parts[0].chips,
    )
    return protocol_cost.describe(cost, scale, config, options.chip_hour_price)


def _group(train: ConfigDict, topology: str, at_once: int, subjects: int, quick: bool) -> _Part:
    """The share of one of `subjects` in their groups."""
    found = together.together(train, topology, at_once, quick=quick)
    groups = -(-subjects // found.crowd.subjects)
    run = groups * train.steps * found.cost.seconds / subjects if found.cost else 0.0
    excess = found.missing or found.painting_missing
    _check_fits(found, topology, excess, f"the training of {at_once} subjects at once", ", or lower --config.at_once")
    return _part(train, topology, found, run, quick)


def _subject(train: ConfigDict, topology: str, quick: bool) -> _Part:
    """A subject's run, or a stage of it."""
    found = slices.plan(train, topology, quick=quick)
    run = train.steps * found.cost.seconds + found.sheet_batches * found.painting_seconds if found.cost else 0.0
    which = f"stage {train.stage} of a subject's training" if train.stage else "a subject's training"
    _check_fits(found, topology, found.excess, which)
    return _part(train, topology, found, run, quick)


def _check_fits(found: Plan | Together, topology: str, excess: int, what: str, other: str = "") -> None:
    if not found.fits:
        raise ValueError(
            f"{what} does not fit {topology}: {excess / GIB:.2f} GiB too much. Plan it alone for what to change, and "
            f"give that as --config.train.FIELD=VALUE{other}"
        )


def _part(train: ConfigDict, topology: str, found: Plan | Together, run: float, quick: bool) -> _Part:
    job = slices.job_on(train, slices.described(train), topology)
    batch = found.painting_seconds or slices.painting_cost(job, found.chip, quick=quick)[1]
    return _Part(
        run,
        class_images=slices.painted_batches(job)[0] * found.class_seconds,
        picture=batch / job.config.class_batch_size,
        chip=found.chip,
        chips=found.devices // found.chip.devices,
    )
