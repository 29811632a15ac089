"""Writes a trained run as a folder that diffusers opens, or its LoRA alone.

python -m dreambooth_jax.export --workdir runs/dog --output runs/dog/model
python -m dreambooth_jax.export --workdir runs/dog --output runs/dog/lora --lora
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dreambooth_jax.runs.command import one_line_errors


def export_model(options: argparse.Namespace, dtype: np.dtype) -> str:
    """Writes the personalised model; returns how to open it."""
    from dreambooth_jax.adapters.factors import merge
    from dreambooth_jax.devices.sharding import make_mesh
    from dreambooth_jax.families.pipeline import save_pipeline
    from dreambooth_jax.runs.workdir import open_run

    _, pipeline, params = open_run(options.workdir, make_mesh(), options.step)
    save_pipeline(pipeline, merge(params), options.output, dtype=dtype)
    return f'{pipeline.family.name}.from_pretrained("{options.output}")'


def export_lora(options: argparse.Namespace, dtype: np.dtype) -> str:
    """Writes what the run has learnt beside its base; returns how to open it.

    Raises:
        ValueError: the run did not train a LoRA.
    """
    from dreambooth_jax.devices.sharding import make_mesh
    from dreambooth_jax.files.lora_peft import FILE, lora_for_files
    from dreambooth_jax.files.safetensors import save_tensors
    from dreambooth_jax.runs.workdir import open_trained

    config, pipeline, method, trainable = open_trained(options.workdir, make_mesh(), options.step)
    if config.method != "lora":
        raise ValueError(f"{options.workdir} was trained with method = {config.method!r}: leave out --lora")
    factors = lora_for_files(method.adapter(trainable))
    save_tensors(Path(options.output) / FILE, factors, dtype=dtype)
    return f'{pipeline.family.name}.from_pretrained("{config.base}").load_lora_weights("{options.output}")'


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dreambooth_jax.export", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, help="folder of a training run")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--step", type=int, help="step of the checkpoint; default: the newest")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="precision of the files")
    parser.add_argument("--lora", action="store_true", help="write only the LoRA of a run that trained one")
    options = parser.parse_args(arguments)
    with one_line_errors():
        from dreambooth_jax.devices import runtime  # here, so that --help needs no JAX

        runtime.start()
        opening = (export_lora if options.lora else export_model)(options, np.dtype(options.dtype))
        print(f"{options.output}: open it with {opening}")


if __name__ == "__main__":
    main()
