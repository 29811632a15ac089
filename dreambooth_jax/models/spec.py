"""Reading a model's config.json into a frozen spec, refusing whatever is not implemented."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

Spec = TypeVar("Spec")


class UnsupportedConfig(ValueError):
    """A config.json asks for something that this library does not implement."""


def read_spec(cls: type[Spec], config: Mapping[str, Any], neutral: Mapping[str, tuple]) -> Spec:
    """Builds `cls` from a config.json.

    Args:
        cls: a frozen dataclass; its fields are the implemented config fields, with the reference's defaults.
        config: the parsed config.json. Names starting with "_" are bookkeeping and pass.
        neutral: fields of the format that are not implemented -> the values at which they do nothing.

    Raises:
        UnsupportedConfig: naming every unknown field and every field set to an unimplemented value.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    problems = []
    for name, value in config.items():
        if name in known or name.startswith("_"):
            continue
        if name not in neutral:
            problems.append(f"{name} = {value!r} (unknown field)")
        elif value not in neutral[name]:
            problems.append(f"{name} = {value!r} (implemented: {' or '.join(map(repr, neutral[name]))})")
    if problems:
        kind = config.get("_class_name", config.get("architectures", cls.__name__))
        raise UnsupportedConfig(f"{kind}: this config is not supported: " + "; ".join(problems))
    values = {name: _frozen(config[name]) for name in known & config.keys()}
    return cls(**values)


def _frozen(value):
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def per_block(value, count: int, name: str) -> tuple:
    """A config value given once or per block, as a tuple of `count`."""
    if not isinstance(value, tuple):
        return (value,) * count
    if len(value) != count:
        raise UnsupportedConfig(f"{name} has {len(value)} entries for {count} blocks: {value!r}")
    return value
