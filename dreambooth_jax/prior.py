"""Class images for prior preservation: what the frozen base paints for "a [class noun]" (arXiv 2208.12242, section 3.3)."""

import os
import re
from collections.abc import Mapping

import jax
from etils import epath
from tqdm import tqdm

from dreambooth_jax.images import list_images
from dreambooth_jax.paint import Painter, Request
from dreambooth_jax.params import Params
from dreambooth_jax.pictures import save_png

_OURS = re.compile(r"class_(\d{5,})\.png")


def missing_class_images(folder: str | os.PathLike, count: int) -> list[int]:
    """Which pictures are still to be painted so that `folder` holds `count` images.

    The user's own images, whatever their names, count; ours are numbered, so that an interrupted run paints only what
    is missing.
    """
    names = [path.name for path in list_images(folder)]
    ours = {int(match[1]) for name in names if (match := _OURS.fullmatch(name))}
    wanted = range(max(0, count - (len(names) - len(ours))))
    return [number for number in wanted if number not in ours]


def paint_class_images(
    folder: str | os.PathLike,
    numbers: list[int],
    paint: Painter,
    params: Params,
    *,
    prompt: str,
    seed: int,
    metadata: Mapping[str, str],
) -> None:
    """Paints the numbered class images into `folder`, each from `fold_in(seed, number)` and written whole or not at all.

    Args:
        params: of the frozen base.
        prompt: "a photo of a dog"; the negative prompt is empty, so that the prior is the model's own.
    """
    key = jax.random.key(seed)
    requests = [Request(prompt, "", jax.random.fold_in(key, number)) for number in numbers]
    for index, image in tqdm(paint(params, requests), total=len(numbers), desc="class images", unit="image"):
        number = numbers[index]
        about = {"prompt": prompt, "seed": f"fold_in({seed}, {number})", **metadata}
        save_png(epath.Path(folder) / f"class_{number:05d}.png", image, about)
