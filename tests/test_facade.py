"""`import dreambooth_jax` costs nothing, every public name is there, and --help needs no JAX."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import dreambooth_jax

HEAVY = {"jax", "torch", "transformers", "tensorboardX", "flax", "optax", "orbax", "tensorflow"}


def imported_by(code: str) -> set[str]:
    code = f"import sys\n{code}\nprint('MODULES', *{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.rsplit("MODULES", 1)[1].split())


def test_the_package_alone_imports_nothing_heavy():
    assert not imported_by("import dreambooth_jax; dreambooth_jax.__version__") & HEAVY


@pytest.mark.parametrize("command", ["train", "sample", "export", "evaluate", "plan", "identifier", "pretrain"])
def test_help_needs_nothing_heavy(command):
    code = f"""
import runpy
sys.argv = ["{command}", "--help"]
try:
    runpy.run_module("dreambooth_jax.{command}", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
"""
    assert not imported_by(code) & HEAVY


def test_the_version_is_that_of_the_newest_entry_of_the_changelog_and_of_the_citation():
    root = Path(dreambooth_jax.__file__).parent.parent
    changelog = re.search(r"^## (\S+)", (root / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    citation = re.search(r"^version: (\S+)", (root / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert dreambooth_jax.__version__ == citation == changelog


def test_every_public_name_is_there():
    for name in dreambooth_jax.__all__:
        assert getattr(dreambooth_jax, name) is not None
    assert set(dreambooth_jax.__all__) <= set(dir(dreambooth_jax))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dreambooth_jax.nothing  # noqa: B018


def test_training_imports_no_second_framework():
    """tensorboardX would import PyTorch where it is installed: 400 MB and seconds."""
    code = "import dreambooth_jax.runs.training, dreambooth_jax.sample, dreambooth_jax.families.pipeline"
    assert not imported_by(code) & {"torch", "tensorflow", "tensorboardX"}
