"""The rows of a benchmark that takes hours, kept as they come: a stopped run goes on."""

import json
from collections.abc import Callable
from pathlib import Path


def kept(log: Path, name: str, make: Callable[[], dict]) -> dict:
    """The row `name` of a file of JSON lines; made, and added there, if it is not in it."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    found = next((row for row in rows if row["name"] == name), None)
    if found is None:
        found = {"name": name} | make()
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as lines:
            lines.write(json.dumps(found) + "\n")
    return found
