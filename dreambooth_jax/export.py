"""Writes a trained run as a diffusers folder that StableDiffusionPipeline.from_pretrained opens.

python -m dreambooth_jax.export --workdir runs/dog --output runs/dog/model
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from dreambooth_jax import runtime
from dreambooth_jax.pipeline import save_pipeline
from dreambooth_jax.sharding import make_mesh
from dreambooth_jax.trained import open_run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dreambooth_jax.export", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, help="of a training run")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="precision of the files")
    options = parser.parse_args(arguments)
    runtime.start()
    try:
        _, pipeline, params = open_run(options.workdir, make_mesh(), options.step)
        save_pipeline(pipeline, params, options.output, dtype=np.dtype(options.dtype))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f'{options.output}: open it with StableDiffusionPipeline.from_pretrained("{options.output}")')


if __name__ == "__main__":
    main()
