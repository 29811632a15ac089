"""Class images for prior preservation: the frozen base's pictures of "a [class noun]".

arXiv 2208.12242, section 3.3.
"""

import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from dreambooth_jax.data.buckets import Size
from dreambooth_jax.data.captions import fill, raise_listing
from dreambooth_jax.data.class_folders import MARK, class_folders
from dreambooth_jax.data.images import Examples, decode_image, is_plain, join, read_buckets
from dreambooth_jax.data.sources import list_images, list_source, report
from dreambooth_jax.devices import runtime
from dreambooth_jax.files.atomic import write_atomic
from dreambooth_jax.models.params import Params
from dreambooth_jax.painting.painter import Painter, Request
from dreambooth_jax.painting.sheets import save_png

MOST = 100_000  # class images
_OURS = re.compile(r"class_(\d{5})\.png")  # other names are a person's


def read_class_images(config: ConfigDict, size: Size | None = None) -> Examples:
    """All class images, own and painted, as examples; errors are those of `read_class_folder`.

    Args:
        size: height and width to which they are cropped; default: the square of the config's resolution.
    """
    folders = [folder for folder in class_folders(config) if list_images(folder)]
    examples = join([read_class_folder(folder, config, size) for folder in folders])
    if config.masked_loss:  # the whole picture counts
        examples = examples._replace(masks=np.full(examples.images.shape[:3], 255, np.uint8))
    return examples


def read_class_folder(folder: epath.Path, config: ConfigDict, size: Size | None = None) -> Examples:
    """The class images of one folder, with the class prompt where they have no captions; errors are `read_buckets`'s.

    Raises:
        ValueError: images of one colour, which a failed painting leaves; all of them are named.
    """
    (examples,) = read_buckets(
        folder,
        (size or (config.resolution, config.resolution),),
        template=config.class_prompt,
        identifier=config.identifier,
        class_noun=config.class_noun,
        captions=config.captions,
        crop=config.crop,
        flip=config.flip,
        seed=config.seed,
    )
    plain = {name: "one colour" for name, image in zip(examples.names, examples.images, strict=True) if is_plain(image)}
    if plain:
        raise_listing(f"{folder}: class images show nothing", plain, "Remove them.")
    return examples


def class_images_to_paint(config: ConfigDict, digest: str) -> list[int]:
    """Numbers of the pictures that are missing or damaged in the last of `class_folders`; own images are checked.

    Args:
        digest: of the base's weights (`weights_digest`).

    Raises:
        ValueError: see `class_folders`, `damaged_class_images` and `read_class_folder`.
    """
    *own, painted = class_folders(config)
    count = sum(len(read_class_folder(folder, config).images) for folder in own)
    prompt = fill(config.class_prompt, config.identifier, config.class_noun, "class_prompt")
    damaged = damaged_class_images(painted, prompt, digest)
    return sorted({*missing_class_images(painted, config.num_class_images - count), *damaged})


def describe_class_images(config: ConfigDict, to_paint: int) -> str:
    """A line for the plan: which class images there are and how many are to be painted."""
    *own, painted = class_folders(config)
    parts = [f"{len(list_images(folder))} images in {folder}" for folder in own]
    there = len(list_images(painted))
    if there or to_paint:
        parts.append(f"{max(there, to_paint)} images in {painted}, {to_paint} of them still to be painted")
    return "; ".join(parts)


def class_notes(config: ConfigDict) -> list[str]:
    """Lines for the plan: what the folders of class images hold that is not used, and where their captions are."""
    return [
        line
        for folder in class_folders(config)
        if list_images(folder)
        for line in report(list_source(folder, config.captions))
    ]


def missing_class_images(folder: str | os.PathLike, count: int) -> list[int]:
    """Which pictures are still to be painted so that `folder` holds `count` images.

    The user's own images, whatever their names, count; ours are numbered, so that an interrupted run paints only what
    is missing.
    """
    names = [path.name for path in list_images(folder)]
    ours = {int(match[1]) for name in names if (match := _OURS.fullmatch(name))}
    wanted = range(max(0, count - (len(names) - len(ours))))
    return [number for number in wanted if number not in ours]


def damaged_class_images(folder: str | os.PathLike, prompt: str, digest: str) -> list[int]:
    """Numbers of pictures that were painted here and are of one colour or cannot be decoded.

    Args:
        prompt, digest: class prompt, and digest of the base's weights, that they must have been painted with.

    Raises:
        ValueError: pictures of another prompt or of another base; all of them are named.
    """
    damaged: list[int] = []
    others: dict[str, str] = {}
    for path in list_images(folder):
        if not (match := _OURS.fullmatch(path.name)):
            continue
        data = path.read_bytes()
        about = _png_text(data)
        if about is None or ("prompt" in about and _is_plain_or_broken(data)):
            damaged.append(int(match[1]))
        elif about.get("prompt", prompt) != prompt:
            others.setdefault(f"of {about['prompt']!r}", path.name)
        elif about.get("model_digest", digest) != digest:  # versions without digests wrote none
            others.setdefault(f"of another base, {about.get('model', 'unknown')}", path.name)
    if others:
        found = ", ".join(f"{name} {what}" for what, name in others.items())
        raise ValueError(
            f"{folder} holds class images of another prompt than {prompt!r} or of other weights: {found}. Remove them, "
            "or give another --config.class_images or --config.workdir."
        )
    return damaged


def _png_text(data: bytes) -> dict[str, str] | None:
    """The text chunks of a PNG; None if it is no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return {name: text for name, text in image.info.items() if isinstance(text, str)}
    except Exception:  # the decoders' errors have no common type
        return None


def _is_plain_or_broken(data: bytes) -> bool:
    try:
        return is_plain(np.asarray(decode_image(data)))
    except Exception:  # as above
        return True


def paint_missing(
    config: ConfigDict,
    numbers: Sequence[int],
    paint: Painter,
    params: Params,
    digest: str,
    low: Callable[[int], np.ndarray | None] = lambda number: None,
) -> None:
    """Marks the last of `class_folders` as ours and paints class images into it.

    Args:
        numbers: see `class_images_to_paint`.
        params: of the frozen base.
        digest: of its weights.
        low: see `paint_class_images`.
    """
    folder = class_folders(config)[-1]
    prompt = fill(config.class_prompt, config.identifier, config.class_noun, "class_prompt")
    about = {
        "model": config.base,
        "model_digest": digest,
        "sampler": config.sampler,
        "steps": str(config.sampling_steps),
        "guidance": str(config.guidance_scale),
    }
    if runtime.is_first_process():
        write_atomic(folder / MARK, json.dumps({"class_images": {"prompt": prompt, **about}}, indent=2).encode())
    paint_class_images(
        folder,
        numbers,
        paint,
        params,
        prompt=prompt,
        seed=config.seed,
        batch_size=config.class_batch_size,
        metadata=about,
        low=low,
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
    low: Callable[[int], np.ndarray | None] = lambda number: None,
) -> None:
    """Paints the numbered class images, each from `fold_in(seed, number)` and written whole or not at all.

    Args:
        params: of the frozen base.
        prompt: "a photo of a dog"; the negative prompt is empty, so that the prior is the model's own.
        metadata: text chunks of every PNG; `model_digest` binds the picture to its base.
        batch_size: batch size of `paint`. Each number keeps its place in its batch, whatever else is missing, so that
            an interrupted run ends with the same pictures to the last bit.
        low: number -> the picture of the stage before, for a super-resolution stage.
    """
    key = jax.random.key(seed)
    starts = sorted({number - number % batch_size for number in numbers})
    painted = [number for start in starts for number in range(start, start + batch_size)]
    known = {number: low(number) for number in numbers}  # a place kept for another is filled with any of them
    lows = [known.get(number, known[numbers[0]]) for number in painted]
    requests = [
        Request(prompt, "", jax.random.fold_in(key, number), picture)
        for number, picture in zip(painted, lows, strict=True)
    ]
    with tqdm(total=len(numbers), desc="class images", unit="image", disable=not runtime.is_first_process()) as bar:
        for index, image in paint(params, requests, all_processes=False):
            number = painted[index]
            if number in numbers:
                if is_plain(image):
                    look = "of one colour" if image.any() else "black"
                    raise ValueError(
                        f"class image {number} is {look}: the base computes numbers that are not finite. Check its "
                        "weights with `python -m dreambooth_jax.sample`, or set dtype='float32'."
                    )
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


def agreed(numbers: list[int], count: int = MOST) -> list[int]:
    """`numbers` below `count` as the first process has them: one that looks later may already see new pictures."""
    chosen = np.zeros(count, bool)
    chosen[numbers] = True
    return np.flatnonzero(runtime.as_first_process_has_it(chosen)).tolist()
