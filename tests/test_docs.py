"""The documentation's code runs as it stands, and its commands are ones that exist."""

import itertools
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from dreambooth_jax.runs.config import check_config
from dreambooth_jax.runs.config_file import load, override
from dreambooth_jax.runs.effects import check_effects

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(command, arguments) of every `python -m dreambooth_jax.COMMAND ...` in fenced or indented blocks, or in a line
    of text."""
    text = page.read_text()
    fenced = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
    indented = re.findall(r"(?:^ {4}.*\n)+", text, flags=re.MULTILINE)
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    lines = "\n".join([*fenced, *indented, *spans]).replace("\\\n", " ").splitlines()
    found = (re.search(r"python -m dreambooth_jax\.(\w+)(.*)", line) for line in lines)
    return [(match[1], shlex.split(match[2], comments=True)) for match in found if match]


def test_commands_are_found_wherever_they_stand():
    assert len(commands(DOCS / "adapters.md")) > 8 and len(commands(DOCS / "migrating.md")) > 3


@cache
def help_of(command: str) -> str:
    done = subprocess.run([sys.executable, "-m", f"dreambooth_jax.{command}", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_has_options_and_fields_that_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command, arguments in commands(page):
        options = [argument for argument in arguments if argument.startswith("--")]
        for option in (option.partition("=")[0] for option in options if not option.startswith("--config")):
            assert option in help_of(command), (command, option)
        files = [value for option, value in itertools.pairwise(arguments) if option == "--config"]
        fields = [option.removeprefix("--config.").partition("=") for option in options if "--config." in option]
        if files and command in ("train", "plan") and "--protocol" not in options:
            config = override(load(files[0]), [(name, value) for name, _, value in fields])
            check_config(config)
            check_effects(config, load(files[0]))


@pytest.mark.slow
def test_python_guide_runs_in_order():
    text = (DOCS / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == text.count("```python")
    scope: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/python.md, block {number}", "exec"), scope)
    losses = scope["metrics"].loss
    assert losses.shape == (20,)
    assert losses[-5:].mean() < losses[:5].mean()
    assert scope["pictures"].shape == (3, 8, 8, 3)
