"""Flags that others make idle: an error, since they would be ignored in silence. Such flags have the default None, so
that a flag that was given is told from one that was not; `fill` puts the values in."""

import argparse
from collections.abc import Iterable, Mapping
from typing import Any


def refuse(options: argparse.Namespace, names: Iterable[str], remedy: str) -> None:
    """Refuses flags that were given.

    Args:
        names: of flags; a switch counts as given if it is on.
        remedy: what makes them idle, and what to do.

    Raises:
        ValueError: some of them were given; names these.
    """
    values = {name: getattr(options, name) for name in names}
    given = [f"--{name}" for name, value in values.items() if value is not None and value is not False and value != []]
    if given:
        raise ValueError(f"{', '.join(given)}: no effect {remedy}")


def fill(options: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Sets the flags that were not given."""
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
