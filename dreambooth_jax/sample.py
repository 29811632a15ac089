"""Paints prompts with a trained run or a base model.

python -m dreambooth_jax.sample --workdir runs/dog --prompt "a sks dog on a red background"
python -m dreambooth_jax.sample --base tiny --prompt "a dog in the snow" --prompt "a cat in the snow"
"""

import functools
import os
import re
import sys

import jax
import jax.numpy as jnp
from absl import app, flags
from etils import epath

from dreambooth_jax import runtime
from dreambooth_jax.models.spec import UnsupportedConfig
from dreambooth_jax.paint import Request, make_painter, save_sheet
from dreambooth_jax.pictures import save_png
from dreambooth_jax.pipeline import load_pipeline, read_params
from dreambooth_jax.sampler import METHODS
from dreambooth_jax.sharding import make_mesh, param_sharding
from dreambooth_jax.trained import open_run
from dreambooth_jax.weights import WeightsError

_WORKDIR = flags.DEFINE_string("workdir", None, "of a training run; this or --base")
_BASE = flags.DEFINE_string("base", None, "a base model: 'tiny', a diffusers folder or a hub name")
_STEP = flags.DEFINE_integer("step", None, "of the checkpoint; default: the newest")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "may be given several times")
_NEGATIVE = flags.DEFINE_string("negative_prompt", "", "what to keep away from")
_COUNT = flags.DEFINE_integer("count", 4, "pictures per prompt", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of the first picture; the next have the numbers after it", lower_bound=0)
_SAMPLER = flags.DEFINE_enum("sampler", "dpm++", METHODS, "how the noise is removed")
_STEPS = flags.DEFINE_integer("steps", 25, "of the sampler", lower_bound=1)
_GUIDANCE = flags.DEFINE_float("guidance", None, "classifier-free guidance scale; default: the run's, or 7.5")
_RESOLUTION = flags.DEFINE_integer("resolution", None, "pixels; default: the run's, or the base's")
_BATCH = flags.DEFINE_integer("batch_size", 8, "pictures at a time, over all devices", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "of the computation of a base; default float32")
_OUTPUT = flags.DEFINE_string("output", None, "folder; default: workdir/pictures or ./pictures")


def _open(mesh):
    """(name of the model, pipeline, params, resolution, guidance) of what the flags name."""
    if _WORKDIR.value:
        config, pipeline, params = open_run(_WORKDIR.value, mesh, _STEP.value)
        return _WORKDIR.value, pipeline, params, config.resolution, config.guidance_scale
    pipeline = load_pipeline(_BASE.value, dtype=jnp.dtype(_DTYPE.value or "float32"))
    params = read_params(pipeline, functools.partial(param_sharding, mesh))
    return _BASE.value, pipeline, params, pipeline.resolution, 7.5


def paint() -> epath.Path:
    """Paints what the flags ask for; returns the folder of the pictures."""
    if bool(_WORKDIR.value) == bool(_BASE.value):
        raise ValueError("give either --workdir of a training run or --base")
    if not _PROMPT.value:
        raise ValueError('give at least one --prompt, such as --prompt "a sks dog in the snow"')
    mesh = make_mesh()
    model, pipeline, params, resolution, guidance = _open(mesh)
    guidance = guidance if _GUIDANCE.value is None else _GUIDANCE.value
    painter = make_painter(
        pipeline, mesh, resolution=_RESOLUTION.value or resolution, batch_size=_BATCH.value,
        method=_SAMPLER.value, steps=_STEPS.value, guidance=guidance,
    )  # fmt: skip
    folder = epath.Path(_OUTPUT.value or os.path.join(_WORKDIR.value or ".", "pictures"))
    seeds = range(_SEED.value, _SEED.value + _COUNT.value)
    wanted = [(prompt, seed) for prompt in _PROMPT.value for seed in seeds]
    requests = [Request(prompt, _NEGATIVE.value, jax.random.key(seed)) for prompt, seed in wanted]
    about = {
        "model": model, "negative_prompt": _NEGATIVE.value, "sampler": _SAMPLER.value,
        "steps": str(_STEPS.value), "guidance": str(guidance),
    }  # fmt: skip
    painted = {}
    for number, image in painter(params, requests):
        prompt, seed = wanted[number]
        save_png(folder / f"{_slug(prompt)}_{seed}.png", image, {"prompt": prompt, "seed": str(seed), **about})
        painted[number] = image
    if len(painted) == len(wanted):
        rows = [[painted[i] for i in range(start, start + len(seeds))] for start in range(0, len(wanted), len(seeds))]
        save_sheet(folder / "sheet.png", rows, _PROMPT.value, about, columns=[f"seed {seed}" for seed in seeds])
    return folder


def _slug(prompt: str) -> str:
    """A file name that a person recognises the prompt in."""
    return re.sub(r"[^\w]+", "_", prompt.lower()).strip("_")[:80] or "prompt"


def main(_) -> None:
    runtime.start()
    try:
        print(f"pictures and sheet.png are in {paint()}")
    except (FileNotFoundError, UnsupportedConfig, WeightsError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
