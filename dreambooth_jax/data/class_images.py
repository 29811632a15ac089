"""Class images for prior preservation: what the frozen base paints for "a [class noun]".

arXiv 2208.12242, section 3.3.
"""

import io
import os
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from dreambooth_jax.data.images import Examples, read_examples
from dreambooth_jax.data.sources import list_images
from dreambooth_jax.devices import runtime
from dreambooth_jax.models.params import Params
from dreambooth_jax.painting.painter import Painter, Request
from dreambooth_jax.painting.sheets import save_png

_OURS = re.compile(r"class_(\d{5,})\.png")


def class_folder(config: ConfigDict) -> epath.Path:
    return epath.Path(config.class_images or f"{config.workdir}/class_images")


def read_class_images(config: ConfigDict) -> Examples:
    return read_examples(
        class_folder(config), config.resolution, template=config.class_prompt, identifier=config.identifier,
        class_noun=config.class_noun, captions=config.captions, crop=config.crop, flip=config.flip, seed=config.seed,
    )  # fmt: skip


def missing_class_images(folder: str | os.PathLike, count: int) -> list[int]:
    """Which pictures are still to be painted so that `folder` holds `count` images.

    The user's own images, whatever their names, count; ours are numbered, so that an interrupted run paints only what
    is missing.
    """
    names = [path.name for path in list_images(folder)]
    ours = {int(match[1]) for name in names if (match := _OURS.fullmatch(name))}
    wanted = range(max(0, count - (len(names) - len(ours))))
    return [number for number in wanted if number not in ours]


def check_class_images(folder: str | os.PathLike, prompt: str) -> None:
    """Raises ValueError if `folder` holds class images that were painted here for another prompt."""
    others = {}
    for path in list_images(folder):
        if _OURS.fullmatch(path.name):
            with Image.open(io.BytesIO(path.read_bytes())) as image:
                others.setdefault(image.info.get("prompt", prompt), path.name)
    if others.keys() - {prompt}:
        found = ", ".join(f"{name} of {other!r}" for other, name in others.items() if other != prompt)
        raise ValueError(
            f"{folder} holds class images of another prompt than {prompt!r}: {found}. Remove them, or give another "
            "--config.class_images or --config.workdir."
        )


def paint_class_images(
    folder: str | os.PathLike,
    numbers: Sequence[int],
    paint: Painter,
    params: Params,
    *,
    prompt: str,
    seed: int,
    batch_size: int,
    metadata: Mapping[str, str],
) -> None:
    """Paints the numbered class images, each from `fold_in(seed, number)` and written whole or not at all.

    Args:
        params: of the frozen base.
        prompt: "a photo of a dog"; the negative prompt is empty, so that the prior is the model's own.
        batch_size: of `paint`. Each number keeps its place in its batch, whatever else is missing, so that an
            interrupted run ends with the same pictures to the last bit.
    """
    key = jax.random.key(seed)
    starts = sorted({number - number % batch_size for number in numbers})
    painted = [number for start in starts for number in range(start, start + batch_size)]
    requests = [Request(prompt, "", jax.random.fold_in(key, number)) for number in painted]
    with tqdm(total=len(numbers), desc="class images", unit="image", disable=not runtime.is_first_process()) as bar:
        for index, image in paint(params, requests, everywhere=False):
            number = painted[index]
            if number in numbers:
                about = {"prompt": prompt, "seed": f"fold_in({seed}, {number})", **metadata}
                save_png(epath.Path(folder) / f"class_{number:05d}.png", image, about)
                bar.update()
    runtime.wait_for_all("class images")
    absent = set(numbers) & set(missing_class_images(folder, max(numbers) + 1))
    if absent:
        raise OSError(
            f"{folder}: {len(absent)} class images that other hosts have painted are not seen from this one. The "
            "workdir (or class_images) of a run on several hosts must be one folder for all: gs://bucket/..., or a "
            "shared disk."
        )


def agreed(numbers: list[int], count: int) -> list[int]:
    """`numbers` below `count` as the first process has them: one that looks later may already see new pictures."""
    chosen = np.zeros(count, bool)
    chosen[numbers] = True
    return np.flatnonzero(runtime.as_first_process_has_it(chosen)).tolist()
