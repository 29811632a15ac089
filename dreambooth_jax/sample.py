"""Paints prompts with a trained run or a base model.

python -m dreambooth_jax.sample --workdir runs/dog --prompt "a sks dog on a red background"
python -m dreambooth_jax.sample --base tiny --prompt "a dog in the snow" --prompt "a cat in the snow"
"""

import argparse
import functools
import os
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from etils import epath

from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.sharding import make_mesh, param_sharding
from dreambooth_jax.diffusion.sampler import SAMPLERS
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.painting.painter import Request, make_painter, save_sheet
from dreambooth_jax.painting.sheets import file_names, save_png
from dreambooth_jax.runs.workdir import open_run


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dreambooth_jax.sample", description=__doc__.split("\n")[0])
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", help="of a training run")
    model.add_argument("--base", help="a base model: 'tiny', a diffusers folder or a hub name")
    parser.add_argument("--step", type=int, help="of the run's checkpoint; default: the newest")
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument("--negative_prompt", default="", help="what to keep away from")
    parser.add_argument("--count", type=_positive, default=4, help="pictures per prompt (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next have the numbers after it")
    parser.add_argument(
        "--sampler", choices=SAMPLERS, default="dpm++", help="how the noise is removed (default: dpm++)"
    )
    parser.add_argument("--steps", type=_positive, default=25, help="of the sampler (default: 25)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale; default: the run's, or 7.5")
    parser.add_argument("--resolution", type=_positive, help="pixels; default: the run's, or the base's")
    parser.add_argument("--batch_size", type=_positive, default=8, help="pictures at a time, over all devices")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the computation; default: the run's")
    parser.add_argument("--output", help="folder; default: workdir/pictures or ./pictures")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number above 0")
    return int(text)


def _open(options: argparse.Namespace, mesh):
    """(name of the model, pipeline, params, resolution, guidance) of what the options name."""
    if options.workdir:
        config, pipeline, params = open_run(options.workdir, mesh, options.step, dtype=options.dtype)
        return options.workdir, pipeline, params, config.resolution, config.guidance_scale
    pipeline = load_pipeline(options.base, dtype=jnp.dtype(options.dtype or "float32"))
    params = read_params(pipeline, functools.partial(param_sharding, mesh))
    return options.base, pipeline, params, pipeline.resolution, 7.5


def paint(options: argparse.Namespace) -> epath.Path:
    """Paints what the options ask for; returns the folder of the pictures."""
    mesh = make_mesh()
    model, pipeline, params, resolution, guidance = _open(options, mesh)
    guidance = guidance if options.guidance is None else options.guidance
    folder = epath.Path(options.output or os.path.join(options.workdir or ".", "pictures"))
    prompts = list(dict.fromkeys(options.prompt))
    seeds = range(options.seed, options.seed + options.count)
    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    requests = [Request(prompt, options.negative_prompt, jax.random.key(seed)) for prompt, seed in wanted]
    painter = make_painter(
        pipeline, mesh, resolution=options.resolution or resolution, batch_size=min(options.batch_size, len(requests)),
        sampler=options.sampler, steps=options.steps, guidance=guidance,
    )  # fmt: skip
    about = {
        "model": model, "negative_prompt": options.negative_prompt, "sampler": options.sampler,
        "steps": str(options.steps), "guidance": str(guidance),
    }  # fmt: skip
    names, painted = file_names(prompts), {}
    for number, image in painter(params, requests):
        prompt, seed = wanted[number]
        if runtime.is_first_process():
            save_png(folder / f"{names[prompt]}_{seed}.png", image, {"prompt": prompt, "seed": str(seed), **about})
        painted[number] = image
    if runtime.is_first_process():
        rows = [[painted[i] for i in range(start, start + len(seeds))] for start in range(0, len(wanted), len(seeds))]
        save_sheet(folder / "sheet.png", rows, prompts, about, columns=[f"seed {seed}" for seed in seeds])
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    runtime.start()
    try:
        print(f"pictures and sheet.png are in {paint(options)}")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
