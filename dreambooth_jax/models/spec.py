"""Reading a model's config.json into a frozen spec, refusing whatever is not implemented."""

import dataclasses
import logging
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

Spec = TypeVar("Spec")  # a frozen dataclass
Value = TypeVar("Value")


class UnsupportedConfig(ValueError):
    """A config.json asks for something that this library does not implement."""


def read_spec(
    cls: type[Spec],
    config: Mapping[str, Any],
    neutral: Mapping[str, tuple[Any, ...]],
    problems_of: Callable[[Spec], list[str]] = lambda spec: [],
    ignored: Collection[str] = (),
) -> Spec:
    """Builds `cls` from a config.json.

    Args:
        cls: a frozen dataclass; its fields are the implemented config fields, with the reference's defaults.
        config: the parsed config.json. Names starting with "_" are bookkeeping and pass.
        neutral: fields of the format that are not implemented -> the values at which they do nothing.
        problems_of: lists what is wrong with the values of implemented fields.
        ignored: fields that training does not read, whatever their values; a warning names those that are there.

    Raises:
        UnsupportedConfig: naming every unknown field and every field set to an unimplemented value.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    values, problems = {}, []
    for name, value in config.items():
        if name in defaults and (value is not None or not defaults[name]):
            values[name] = defaults[name] if value is None else _frozen(value)
        elif name in defaults:
            problems.append(f"{name} = None (it needs a value)")
        elif name.startswith("_") or name in ignored:
            continue
        elif name not in neutral:
            problems.append(f"{name} = {value!r} (unknown field)")
        elif value not in neutral[name]:
            problems.append(f"{name} = {value!r} (implemented: {' or '.join(map(repr, neutral[name]))})")
    kinds = typing.get_type_hints(cls)
    wrong = [
        f"{name} = {value!r} (expected {_expected(kinds[name])})"
        for name, value in values.items()
        if not _is_of_kind(value, kinds[name])
    ]
    if not wrong:
        spec = cls(**values)
        wrong = problems_of(spec)
    problems += wrong
    if problems:
        kind = config.get("_class_name", config.get("architectures", cls.__name__))
        raise UnsupportedConfig(f"{kind}: this config is not supported: " + "; ".join(problems))
    if spare := sorted(config.keys() & set(ignored)):
        logging.warning("%s: fields ignored, training does not read them: %s", cls.__name__, ", ".join(spare))
    return spec


def _is_list(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


def _is_of_kind(value: Any, kind: Any) -> bool:
    """Whether the value is of the annotated type; an integer is a float too, true and false are no numbers."""
    if alternatives := _alternatives(kind):
        return any(_is_of_kind(value, one) for one in alternatives)
    if _is_list(kind):
        kinds = typing.get_args(kind)
        kinds = kinds[:1] * len(value) if isinstance(value, tuple) and kinds[-1] is ... else kinds
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is_of_kind, value, kinds))
    accepted = (int, float) if kind is float else kind
    return isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The types of a union; () if the annotation is none."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else ()


def _expected(kind: Any) -> str:
    if alternatives := _alternatives(kind):
        return " or ".join(_expected(one) for one in alternatives if one is not types.NoneType)
    if _is_list(kind):
        return f"a list of {_expected(typing.get_args(kind)[0])}"
    return {str: "text", bool: "true or false", int: "whole numbers", float: "numbers"}[kind]


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def not_among(spec: Spec, allowed: Mapping[str, Sequence[str | None]]) -> list[str]:
    """A problem for each field whose value, or an entry of it, is not one of those `allowed` by name."""
    problems = []
    for name, choices in allowed.items():
        value = getattr(spec, name)
        if not set(value if isinstance(value, tuple) else (value,)) <= set(choices):
            problems.append(f"{name} = {value!r} (implemented: {' or '.join(map(repr, choices))})")
    return problems


def not_per_block(spec: Spec, names: Sequence[str], blocks: int) -> list[str]:
    """A problem for each field among `names` that lists another number of values than there are blocks."""
    values = {name: getattr(spec, name) for name in names}
    wrong = {name: v for name, v in values.items() if isinstance(v, tuple) and len(v) != blocks}
    return [f"{name} = {value!r} ({len(value)} entries for {blocks} blocks)" for name, value in wrong.items()]


def per_block(value: Value | tuple[Value, ...], blocks: int) -> tuple[Value, ...]:
    """A config value given once or per block, as a tuple of `blocks`."""
    return value if isinstance(value, tuple) else (value,) * blocks
