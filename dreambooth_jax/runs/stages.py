"""The configs of a cascade's stages, all of them checked before the first one trains."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dreambooth_jax.runs.config import ConfigError, absolute_paths, check_config
from dreambooth_jax.runs.config_file import stage_folder
from dreambooth_jax.runs.effects import check_effects

_OF_CASCADE = {"base", "stage", "workdir", "stages", "stage_fields", "subjects"}  # none is a stage's own


def stage_configs(config: ConfigDict) -> list[ConfigDict]:
    """The config of every stage's own run, with absolute paths; that of `config` itself where it names no further
    stages.

    Args:
        config: one that `check_config` accepts.

    Raises:
        ConfigError: there is no such stage, fields for more stages, or fields of a stage that are given twice, set by
            the cascade, wrong, or without effect.
    """
    if not config.stages:
        return [config]
    count = 1 + len(config.stages)
    if config.stage > count or len(config.stage_fields) > len(config.stages):
        raise ConfigError(
            f"stage = {config.stage}, {len(config.stage_fields)} entries of stage_fields: this cascade has {count} "
            "stages, and stage_fields holds one entry per stage after the first"
        )
    first = ConfigDict(dict(config) | {"stage": 1, "workdir": stage_folder(config.workdir, 1)})
    return [absolute_paths(first), *(_further(config, number) for number in range(2, count + 1))]


def chosen(config: ConfigDict, configs: list[ConfigDict]) -> list[tuple[int, ConfigDict]]:
    """(number, config) of the stages that `config.stage` names, all for 0; of a config without stages, its own."""
    return [(n, own) for n, own in enumerate(configs, 1) if config.stage in (0, n) or len(configs) == 1]


def _further(config: ConfigDict, number: int) -> ConfigDict:
    """The checked config of a stage after the first."""
    where = f"stage_fields of stage {number}"
    pairs = config.stage_fields[number - 2] if number - 2 < len(config.stage_fields) else ()
    names = Counter(name for name, _ in pairs)
    if twice := sorted(name for name, times in names.items() if times > 1):
        raise ConfigError(f"{where}: {', '.join(twice)}: given twice; leave one out")
    if idle := sorted(names.keys() & _OF_CASCADE):
        raise ConfigError(f"{where}: {', '.join(idle)}: the cascade sets it; leave it out")
    given: Mapping[str, Any] = dict(pairs)
    own = {"base": config.stages[number - 2], "stage": number, "workdir": stage_folder(config.workdir, number)}
    # Class images of its own size, or those that the stage before painted.
    stage = ConfigDict(dict(config) | {"class_images": "", **given, **own})
    try:
        check_config(stage)
        check_effects(stage, ConfigDict(dict(stage) | {name: config[name] for name in given}))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return absolute_paths(stage)
