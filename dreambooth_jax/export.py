"""Writes a trained run as a file or folder that other tools open, and proves that it paints the same.

python -m dreambooth_jax.export --workdir runs/dog --output runs/dog/model             # a diffusers folder
python -m dreambooth_jax.export --workdir runs/dog --output dog.safetensors            # one file for A1111, ComfyUI
python -m dreambooth_jax.export --workdir runs/dog_lora --output sks_dog.safetensors   # a LoRA for all tools
python -m dreambooth_jax.export --workdir runs/dog --output dog.safetensors --rank 16  # a LoRA of a full fine-tuning
python -m dreambooth_jax.export --base BASE --lora dog.safetensors:0.8 --output merged # adapter files in a whole model
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from dreambooth_jax.files.layouts import SUFFIX, split_weight
from dreambooth_jax.runs.command import not_negative, one_line_errors, step_of
from dreambooth_jax.runs.config_file import read_config
from dreambooth_jax.runs.export_checks import (
    FORMATS,
    check_components,
    check_format,
    check_output,
    check_repository,
    default_formats,
    written_by,
)
from dreambooth_jax.runs.flags import fill, refuse
from dreambooth_jax.runs.places import check_base, check_files_given, check_writable


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dreambooth_jax.export", description=__doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="folder of a training run")
    source.add_argument("--base", help="base model that --lora is merged into")
    parser.add_argument("--output", required=True, help="folder, or .safetensors file, to write")
    parser.add_argument("--step", type=step_of, help="step of the checkpoint, or best; default: the newest")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="precision of the files"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="folder: diffusers; single: one LDM file; kohya: adapter for all tools; peft: adapter for diffusers; "
        "embedding: new token. Default: embedding for inversion, kohya for other adapters; else single for a "
        ".safetensors file, folder for a folder",
    )
    parser.add_argument("--rank", type=not_negative, help="make a LoRA of this rank of a full fine-tuning")
    parser.add_argument(
        "--variant", default="", help="of a folder's weight files: fp16 names them model.fp16.safetensors and alike"
    )
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="adapter file to merge into --base"
    )
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload it with a model card")
    options = parser.parse_args(arguments)
    options.output = os.path.expanduser(options.output)
    with one_line_errors():
        if options.base:
            refuse(options, ["step", "rank", "push_to_hub"], "with --base: they are for the run of a --workdir")
        else:
            refuse(options, ["lora"], "with --workdir: it is merged into a --base, and sample takes it")
        fill(options, {"rank": 0})
        check(options)
        print(_export(options))


def check(options: argparse.Namespace) -> None:
    """Checks that the run, or the base and the adapters, are there, that the format holds it, and that the export
    overwrites nothing that it reads.

    Raises:
        ValueError, OSError: a check fails; says what was expected.
    """
    path, kind = Path(options.output), options.format
    if options.workdir:
        options.workdir = os.path.expanduser(options.workdir)
        config = read_config(options.workdir)
        base, files = config.base, [file for file in (config.init_adapter, config.init_embedding) if file]
        check_format(config, path, kind, options.rank, options.variant)
        written = written_by(config, path, kind, options.rank)
        is_folder = (kind or default_formats(config, path, options.rank)[0]) == "folder"
    else:
        check_base(options.base)
        check_files_given(options.lora, ())
        base, files, written = options.base, [split_weight(entry)[0] for entry in options.lora], []
        is_folder = path.suffix != SUFFIX
    check_output(options.output, base, files, written)
    check_writable(epath.Path(path if path.suffix != SUFFIX else path.parent))
    if is_folder:
        check_components(path, base, options.variant)
    if options.push_to_hub:
        check_repository(options.push_to_hub)


def _export(options: argparse.Namespace) -> str:
    from dreambooth_jax.devices import runtime  # here, so that wrong options are refused without JAX

    runtime.start()
    import jax.numpy as jnp

    dtype, variant = jnp.dtype(options.dtype), options.variant
    if options.base:
        from dreambooth_jax.runs.merging import merge_files

        output = Path(options.output)
        return merge_files(options.base, options.lora, output, kind=options.format, dtype=dtype, variant=variant)
    from dreambooth_jax.runs.exports import export

    settings = {"step": options.step, "kind": options.format, "rank": options.rank, "hub": options.push_to_hub or ""}
    return export(options.workdir, options.output, dtype=dtype, variant=variant, **settings)


if __name__ == "__main__":
    main()
