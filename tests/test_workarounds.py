"""The table of workarounds: every row is needed by a supported release, and its module is there."""

import dataclasses
import re
from pathlib import Path

import pytest

from dreambooth_jax.devices import workarounds
from dreambooth_jax.devices.workarounds import WORKAROUNDS, Workaround, applies, version_of, with_cpu_flags

ROOT = Path(__file__).parent.parent


def lowest_supported(package: str) -> tuple[int, ...]:
    """The lowest release that setup.py allows; jaxlib's are jax's."""
    name = "jax" if package == "jaxlib" else package
    found = re.search(rf'"{name}[>=]=([\d.]+)', (ROOT / "setup.py").read_text())
    return tuple(int(part) for part in found[1].strip(".").split(".")) if found else ()


@pytest.mark.parametrize("row", WORKAROUNDS, ids=lambda row: row.name)
def test_a_supported_release_needs_it(row):
    if row.before is not None:
        lowest = lowest_supported(row.package)
        assert lowest and lowest < row.before, f"no supported release of {row.package} needs {row.name!r}: remove it"
    assert (ROOT / "dreambooth_jax" / row.where).is_file()


def test_flags_are_given_to_releases_that_know_them(monkeypatch):
    row = next(row for row in WORKAROUNDS if row.xla_flag)
    for version, given in (((0, 9, 2), False), ((0, 10, 2), True), ((0, 12, 0), False)):
        monkeypatch.setattr(workarounds, "version_of", lambda package, version=version: version)
        assert applies(row) is given
        assert (row.xla_flag in with_cpu_flags("--xla_other=1")) is given
        assert with_cpu_flags("--xla_other=1").startswith("--xla_other=1")
        assert row.xla_flag + "x" not in with_cpu_flags("")
        own = row.xla_flag + "dot"
        assert with_cpu_flags(own) == own  # the user's choice stands


def test_versions():
    assert version_of("jax") >= (0, 10)
    newest = Workaround("", "", "jax", (0, 0), None, "", "")
    assert applies(newest) and not applies(dataclasses.replace(newest, before=(0, 1)))
