"""The package outside of a checkout: a wheel brings configs and example subjects and trains in an empty folder."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.flags import xla_flags

import dreambooth_jax

ROOT = Path(__file__).parent.parent
PARTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "dreambooth_jax", "configs", "examples")
SHORT = {"steps": 2, "num_class_images": 2, "class_batch_size": 2, "sample_count": 1, "sampling_steps": 2}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's contents, as pip installs them."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for part in PARTS:  # a copy: setuptools writes into the folder that it builds
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, source / part)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", source / "dist", source], check=True)
    (wheel,) = (source / "dist").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    return target


def run(installed: Path, folder: Path, *arguments: str) -> str:
    """Runs Python with the installed package in `folder`; returns its output."""
    environment = os.environ | {"PYTHONPATH": str(installed), "XLA_FLAGS": xla_flags(1)}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_trains_from_an_empty_folder(installed, tmp_path):
    fields = [f"--config.{name}={value}" for name, value in SHORT.items()]
    printed = run(installed, tmp_path, "-m", "dreambooth_jax.train", "--config", "dog.py", *fields)
    assert "5 images" in printed
    assert (tmp_path / "runs" / "dog" / "samples" / "step_000002.png").is_file()


def test_launch_copies_what_an_installation_needs():
    listed = re.search(r"PROJECT_FILES=\((.*?)\)", (ROOT / "launch" / "common.sh").read_text())[1].split()
    lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
    copied = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    assert set(listed) == set(copied) == set(PARTS)


def test_a_wheel_finds_its_configs_and_says_where_it_is(installed, tmp_path):
    program = (
        "import dreambooth_jax, os; from dreambooth_jax.runs.config_file import load; "
        "print(os.path.dirname(os.path.dirname(dreambooth_jax.__file__))); print(load('dog.py:sd15').base)"
    )
    found = run(installed, tmp_path, "-c", program)
    assert found.splitlines() == [str(installed), "stable-diffusion-v1-5/stable-diffusion-v1-5"]


def test_licence_and_version_are_in_the_wheel(installed):
    (licence,) = installed.glob(f"dreambooth_jax-{dreambooth_jax.__version__}.dist-info/licenses/LICENSE")
    assert "Apache License" in licence.read_text()
