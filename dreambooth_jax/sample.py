"""Paints prompts with a trained run or a base model.

python -m dreambooth_jax.sample --workdir runs/dog --prompt "a sks dog on a red background"
python -m dreambooth_jax.sample --base tiny --lora dog.safetensors:0.8 --prompt "a sks dog in the snow"
python -m dreambooth_jax.sample --base tiny --prompt "a dog in the snow" --prompt "a cat in the snow"

The workdir of a cascade paints with all its stages, each with the sampler, steps and guidance of its run.
"""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from dreambooth_jax.data.captions import is_text
from dreambooth_jax.runs.command import finite, one_line_errors, positive, seed_of, step_of
from dreambooth_jax.runs.config import SAMPLERS
from dreambooth_jax.runs.config_file import stage_folders
from dreambooth_jax.runs.flags import fill, refuse
from dreambooth_jax.runs.places import check_base, check_files_given, check_run, check_writable

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from dreambooth_jax.families.pipeline import Pipeline
    from dreambooth_jax.models.params import Params

DEFAULTS = {"sampler": "dpm++", "steps": 25, "reuse_features": 1, "batch_size": 8}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dreambooth_jax.sample", description=__doc__.split("\n")[0])
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", help="folder of a training run")
    model.add_argument("--base", help="base model: 'tiny', a diffusers folder or a hub name")
    parser.add_argument("--step", type=step_of, help="step of the run's checkpoint, or best; default: the newest")
    parser.add_argument(
        "--prompt", action="append", type=_text, required=True, help="prompt; may be given several times"
    )
    parser.add_argument("--negative_prompt", type=_text, default="", help="prompt of what to keep away from")
    parser.add_argument("--count", type=positive, default=4, help="pictures per prompt (default: 4)")
    parser.add_argument(
        "--seed", type=seed_of, default=0, help="seed of the first picture; the next have the numbers after it"
    )
    parser.add_argument("--sampler", choices=SAMPLERS, help="solver (default: dpm++)")
    parser.add_argument("--steps", type=positive, help="steps of the sampler (default: 25)")
    parser.add_argument(
        "--reuse_features",
        type=positive,
        help="number of steps that share deep features: faster, and not quite the same pictures (default: 1)",
    )
    parser.add_argument(
        "--guidance", type=finite, help="classifier-free guidance scale; default: the run's, or the base's"
    )
    parser.add_argument("--resolution", type=positive, help="pixels; default: the run's, or the base's")
    parser.add_argument("--batch_size", type=positive, help="pictures at a time, over all devices (default: 8)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="dtype of the computation; default: the run's")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="adapter file of any tool (kohya, PEFT, LyCORIS), and its weight (default: 1); may be given several times",
    )
    parser.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="WORD=FILE",
        help="textual inversion of any tool and the new word for it in prompts; may be given several times",
    )
    parser.add_argument("--output", help="folder of the pictures; default: workdir/pictures or ./pictures")
    return parser.parse_args(arguments)


def _text(text: str) -> str:
    if not is_text(text):
        raise argparse.ArgumentTypeError(f"{text!a}: expected text in UTF-8 without null characters")
    return text


def check(options: argparse.Namespace) -> None:
    """Checks that the run or the base, adapters and embeddings are there, and fills the options that were not given.

    Raises:
        ValueError, OSError: they are not, or options have no effect; says what was expected.
    """
    options.workdir = options.workdir and os.path.expanduser(options.workdir)
    if options.workdir:
        check_run(options.workdir)
    else:
        check_base(options.base)
    check_files_given(options.lora, options.embedding)
    check_writable(output_of(options))
    if options.base:
        refuse(options, ["step"], "with --base: it is of the checkpoints of a run, --workdir")
    elif folders := stage_folders(options.workdir):
        idle = ("step", "guidance", "resolution", "lora", "embedding", *DEFAULTS, "dtype")
        refuse(options, idle, f"on a cascade, each stage has its run's own: give --workdir {folders[0]} for one stage")
    if options.guidance == 1 and options.negative_prompt:
        raise ValueError("--negative_prompt: no effect with --guidance 1, which does not move away from it")
    fill(options, DEFAULTS)
    if options.reuse_features > options.steps:
        raise ValueError(f"--reuse_features {options.reuse_features}: expected no more than --steps, {options.steps}")


def _describe(options: argparse.Namespace) -> "tuple[Pipeline, dict[str, Any]]":
    """(pipeline without weights, settings of its painter but for the batch size)."""
    from dreambooth_jax.families.pipeline import load_pipeline
    from dreambooth_jax.runs.config_file import read_config
    from dreambooth_jax.runs.job import open_base

    own: dict[str, Any] = {}
    if options.workdir:
        config = read_config(options.workdir)
        pipeline = open_base(config)
        resolution, guidance = config.resolution or pipeline.resolution, config.guidance_scale
        own = {"trained": True, "sr_noise": config.sr_noise}
    else:
        pipeline = load_pipeline(options.base)
        resolution, guidance = pipeline.resolution, pipeline.guidance
    return pipeline, own | {
        "resolution": options.resolution or resolution,
        "sampler": options.sampler,
        "steps": options.steps,
        "reuse_features": options.reuse_features,
        "guidance": guidance if options.guidance is None else options.guidance,
    }


def _open(options: argparse.Namespace, mesh: "Mesh") -> "tuple[Pipeline, Params]":
    import jax.numpy as jnp

    from dreambooth_jax.families.frozen_text import with_cached_text
    from dreambooth_jax.families.pipeline import load_pipeline, read_params
    from dreambooth_jax.runs.workdir import open_run

    if options.workdir:
        return open_run(options.workdir, mesh, options.step, dtype=options.dtype)[1:]
    pipeline = with_cached_text(load_pipeline(options.base, dtype=jnp.dtype(options.dtype or "float32")), mesh)
    return pipeline, read_params(pipeline, mesh)


def _read_files(
    options: argparse.Namespace, pipeline: "Pipeline"
) -> "tuple[list[tuple[dict[str, np.ndarray], float]], list[tuple[str, dict[str, np.ndarray]]]]":
    """(adapters and their weights, new words and their rows) of the options' files.

    Raises:
        ValueError: a file does not fit the model, or a word is a token already.
    """
    if not (options.lora or options.embedding):
        return [], []
    from dreambooth_jax.adapters.inversion import widths
    from dreambooth_jax.files.embeddings import read_embeddings
    from dreambooth_jax.files.lora_read import read_adapters

    width, tokens = widths(pipeline.shapes), []
    for entry in options.embedding:
        word, _, path = entry.partition("=")
        rows = dict(zip(width, read_embeddings(path, list(width.values())), strict=True))
        pipeline = pipeline.with_token(word, len(next(iter(rows.values()))))
        tokens.append((word, rows))
    return read_adapters(options.lora, pipeline.shapes), tokens


def paint_cascade(options: argparse.Namespace, folders: Sequence[str]) -> epath.Path:
    """Paints with the stages in `folders`; returns the folder of the last one's pictures and the sheet of all."""
    import jax

    from dreambooth_jax.devices import runtime
    from dreambooth_jax.devices.sharding import make_mesh
    from dreambooth_jax.painting.cascade import paint_stages
    from dreambooth_jax.painting.painter import Request
    from dreambooth_jax.painting.sheets import file_names, save_png, save_sheet
    from dreambooth_jax.runs.cascade import open_stages
    from dreambooth_jax.runs.config_file import read_config

    prompts = list(dict.fromkeys(options.prompt))
    wanted = [(prompt, options.seed + i) for prompt in prompts for i in range(options.count)]
    requests = [Request(prompt, options.negative_prompt, jax.random.key(seed)) for prompt, seed in wanted]
    pictures = paint_stages(open_stages([read_config(folder) for folder in folders], make_mesh()), requests)
    folder = output_of(options)
    if runtime.is_first_process():
        names, about = file_names(prompts), {"model": options.workdir, "negative_prompt": options.negative_prompt}
        for (prompt, seed), image in zip(wanted, pictures[-1], strict=True):
            save_png(folder / f"{names[prompt]}_{seed}.png", image, {"prompt": prompt, "seed": str(seed), **about})
        side = len(pictures[-1][0])
        rows, labels = [], []
        for number, prompt in enumerate(prompts):
            for stage, painted in enumerate(pictures, 1):
                row = painted[number * options.count : (number + 1) * options.count]
                rows.append([image.repeat(side // len(image), 0).repeat(side // len(image), 1) for image in row])
                labels.append(f"{prompt}: stage {stage}")
        save_sheet(folder / "sheet.png", rows, labels, about)
    return folder


def output_of(options: argparse.Namespace) -> epath.Path:
    """The folder of the pictures."""
    return epath.Path(os.path.expanduser(options.output or os.path.join(options.workdir or ".", "pictures")))


def paint(options: argparse.Namespace) -> epath.Path:
    """Paints what the options ask for; returns the folder of the pictures."""
    if options.workdir and (folders := stage_folders(options.workdir)):
        return paint_cascade(options, folders)

    from dreambooth_jax.adapters.inversion import with_rows
    from dreambooth_jax.devices import runtime
    from dreambooth_jax.devices.sharding import make_mesh
    from dreambooth_jax.files.lora_read import with_adapters
    from dreambooth_jax.painting.painter import batch_for, make_painter
    from dreambooth_jax.painting.sheets import file_names, paint_rows, save_png, save_sheet

    mesh, folder = make_mesh(), output_of(options)
    prompts = list(dict.fromkeys(options.prompt))
    seeds = [seed % 2**32 for seed in range(options.seed, options.seed + options.count)]
    described, settings = _describe(options)
    settings["batch_size"] = batch_for([len(prompts) * len(seeds)], options.batch_size, mesh.size)
    make_painter(described, mesh, **settings)  # wrong settings are an error now, not after the weights are read
    adapters, tokens = _read_files(options, described)
    pipeline, params = _open(options, mesh)
    params = with_adapters(params, adapters)
    for word, rows in tokens:
        pipeline = pipeline.with_token(word, len(next(iter(rows.values()))))
        params = with_rows(params, rows)
    painter = make_painter(pipeline, mesh, **settings)
    about = {
        "model": options.workdir or options.base,
        "negative_prompt": options.negative_prompt,
        "sampler": options.sampler,
        "steps": str(options.steps),
        "reuse_features": str(options.reuse_features),
        "guidance": str(settings["guidance"]),
        **({"adapters": ", ".join(options.lora)} if options.lora else {}),
    }
    names = file_names(prompts)

    def save(prompt: str, seed: int, image: np.ndarray) -> None:
        if runtime.is_first_process():
            save_png(folder / f"{names[prompt]}_{seed}.png", image, {"prompt": prompt, "seed": str(seed), **about})

    rows = paint_rows(painter, params, prompts, seeds, negative=options.negative_prompt, each=save)
    if runtime.is_first_process():
        save_sheet(folder / "sheet.png", rows, prompts, about, columns=[f"seed {seed}" for seed in seeds])
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    with one_line_errors():
        check(options)
        from dreambooth_jax.devices import runtime  # here, so that wrong options are refused without JAX

        runtime.start()
        print(f"pictures and sheet.png are in {paint(options)}")


if __name__ == "__main__":
    main()
