"""Writes a trained run as a diffusers folder that StableDiffusionPipeline.from_pretrained opens.

python -m dreambooth_jax.export --workdir runs/dog --output runs/dog/model
"""

import sys

import numpy as np
from absl import app, flags

from dreambooth_jax import runtime
from dreambooth_jax.models.spec import UnsupportedConfig
from dreambooth_jax.pipeline import save_pipeline
from dreambooth_jax.sharding import make_mesh
from dreambooth_jax.trained import open_run
from dreambooth_jax.weights import WeightsError

_WORKDIR = flags.DEFINE_string("workdir", None, "of a training run", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "folder to write", required=True)
_STEP = flags.DEFINE_integer("step", None, "of the checkpoint; default: the newest")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "precision of the files")


def main(_) -> None:
    runtime.start()
    try:
        _, pipeline, params = open_run(_WORKDIR.value, make_mesh(), _STEP.value)
        save_pipeline(pipeline, params, _OUTPUT.value, dtype=np.dtype(_DTYPE.value))
    except (FileNotFoundError, UnsupportedConfig, WeightsError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f'{_OUTPUT.value}: open it with StableDiffusionPipeline.from_pretrained("{_OUTPUT.value}")')


if __name__ == "__main__":
    app.run(main)
