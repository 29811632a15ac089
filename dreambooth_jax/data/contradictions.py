"""Settings that contradict each other: sentences for the plan, printed before anything slow."""

import os
import re
from collections.abc import Sequence

from etils import epath
from ml_collections import ConfigDict

from dreambooth_jax.data.captions import fill
from dreambooth_jax.data.class_folders import class_folders
from dreambooth_jax.files.tokenizer import Tokenizer


def contradictions(config: ConfigDict, captions: Sequence[str]) -> list[str]:
    """What in prompts, captions and folders defeats the training, as sentences; empty if nothing does.

    Args:
        config: of the run.
        captions: of the subject's examples, filled.
    """
    identifier, noun, found = config.identifier, config.class_noun, []
    if not any(_holds(text, identifier) for text in captions):
        found.append(
            f"no caption holds the identifier {identifier!r} (the first is {captions[0]!r}): the subject gets no name. "
            "Write {identifier} into instance_prompt and the captions, or set captions='template'"
        )
    prompt = fill(config.instance_prompt, identifier, noun, "instance_prompt")
    if not _holds(prompt, noun):
        found.append(f"instance_prompt {prompt!r} does not hold the class noun {noun!r}, whose prior is to be kept")
    if config.prior_preservation:
        prior = fill(config.class_prompt, identifier, noun, "class_prompt")
        if _holds(prior, identifier):
            found.append(
                f"class_prompt {prior!r} holds the identifier {identifier!r}: the class images would teach that the "
                "identifier is any member of the class"
            )
        if not _holds(prior, noun):
            found.append(f"class_prompt {prior!r} does not hold the class noun {noun!r}")
        if any(_same_folder(config.instance_images, folder) for folder in class_folders(config)):
            found.append(
                f"class_images and instance_images are one folder, {config.instance_images}: the photos of the subject "
                "would be the class"
            )
    return found


def too_long(captions: Sequence[str], identifier: str, tokenizer: Tokenizer) -> list[str]:
    """Captions of more tokens than the text encoder reads, each with its lost end, as sentences."""
    limit, found = tokenizer.model_max_length, []
    for text in dict.fromkeys(captions):
        if len(tokenizer(text).input_ids) <= limit:
            continue
        read = _read_part(text, tokenizer, limit)
        lost = text[len(read) :].strip()
        gone = _holds(text, identifier) and not _holds(read, identifier)
        found.append(
            f"a caption is longer than the {limit} tokens that the text encoder reads; lost: {lost!r}"
            + (f", and with it the identifier {identifier!r}: put it first" if gone else "")
        )
    return found


def _read_part(text: str, tokenizer: Tokenizer, limit: int) -> str:
    """The longest run of leading words that fits."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    low, high = 0, len(ends)
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(tokenizer(text[: ends[middle - 1]]).input_ids) <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    return text[: ends[low - 1]] if low else ""


def _holds(text: str, word: str) -> bool:
    """Whether `word` stands in `text` as a whole word, in any case."""
    return re.search(rf"(?<!\w){re.escape(word.strip())}(?!\w)", text, re.IGNORECASE) is not None


def _same_folder(one: str, other: str | os.PathLike) -> bool:
    if one.startswith(("hub:", "tfds:")):
        return False
    return epath.Path(one).expanduser().resolve() == epath.Path(other).expanduser().resolve()
