"""The tokenizers of a pipeline folder."""

import copy
import importlib.util
import logging
import os
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from dreambooth_jax.files.json_text import parse_json
from dreambooth_jax.models.spec import UnsupportedConfig


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer of transformers, whose import takes seconds, or a `WithToken`."""

    def __call__(self, texts: str | Sequence[str], **settings: Any) -> Any: ...

    def __len__(self) -> int: ...

    if TYPE_CHECKING:  # further attributes, as transformers has them
        model_max_length: int

        def __getattr__(self, name: str) -> Any: ...


# tokenizer_config.json names a class; only these are looked up in transformers.
CLASSES = (
    "CLIPTokenizer",
    "CLIPTokenizerFast",
    "T5Tokenizer",
    "T5TokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
)


def load_tokenizer(
    base: str | os.PathLike, name: str = "tokenizer", max_length: int | None = None, vocab_size: int | None = None
) -> Tokenizer:
    """The transformers tokenizer in `<base>/<name>`, of the class that the folder names.

    Args:
        base: a pipeline folder.
        name: of the tokenizer's folder in it.
        max_length: positions of the text encoder; a tokenizer that allows more is limited to it.
        vocab_size: rows of the text encoder's embedding table.

    Raises:
        FileNotFoundError: the folder or its vocabulary is missing.
        ImportError: a SentencePiece vocabulary, without the optional package that reads it.
        UnsupportedConfig: the folder names another class, or its vocabulary is larger than the table.
    """
    folder = pathlib.Path(base) / name
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    is_clip = {"vocab.json", "merges.txt"} <= files
    if not (is_clip or files & {"tokenizer.json", "spiece.model"}):
        raise FileNotFoundError(
            f"No tokenizer in {folder}: it must hold vocab.json and merges.txt, or tokenizer.json, or spiece.model, "
            f"and holds {', '.join(sorted(files)) or 'nothing'}. Give a pipeline folder as diffusers saves it."
        )
    kind = _class_named(folder) or ("CLIPTokenizer" if is_clip else "PreTrainedTokenizerFast")
    if kind not in CLASSES:
        raise UnsupportedConfig(
            f"{folder}/tokenizer_config.json: tokenizer_class = {kind!r}; implemented: {', '.join(CLASSES)}"
        )
    if not is_clip and "tokenizer.json" not in files and importlib.util.find_spec("sentencepiece") is None:
        raise ImportError(
            f"{folder}: spiece.model is read by another package. Run: pip install sentencepiece (or "
            "'dreambooth-jax[t5]'), or put tokenizer.json of the same model beside it."
        )
    # transformers reports that PyTorch is absent or too old: it is not used here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("USE_TORCH", "0")
    import transformers  # takes seconds, which a wrong path need not

    try:
        tokenizer = getattr(transformers, kind).from_pretrained(str(folder), local_files_only=True)
    except OSError:
        raise
    except Exception as error:  # the Rust library's have no type
        raise UnsupportedConfig(f"{folder}: the tokenizer cannot be read ({error}). Download it again.") from error
    last = max(tokenizer.get_vocab().values(), default=-1)  # ids may leave gaps
    if vocab_size is not None and last >= vocab_size:
        raise UnsupportedConfig(
            f"{folder}: tokens have ids up to {last}, but the text encoder has embeddings for {vocab_size}: these "
            "folders do not belong together"
        )
    if max_length is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, max_length)
    return tokenizer


def _class_named(folder: pathlib.Path) -> str | None:
    """The class in tokenizer_config.json, which old folders lack. (AutoTokenizer would import PyTorch.)"""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        return parse_json(path.read_text(encoding="utf-8")).get("tokenizer_class")
    except (ValueError, AttributeError) as error:
        raise UnsupportedConfig(f"{path}: not readable JSON ({error}). Download the file again.") from error


def padded_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> Int[np.ndarray, "b l"]:
    """Token ids padded to the tokenizer's length; a text too long for it is cut, with a warning."""
    length = tokenizer.model_max_length
    for text in texts:
        if len(tokenizer(text).input_ids) > length:
            logging.warning("prompt cut to the %d tokens that the text encoder reads: %r", length, text)
    encoded = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)
    return np.asarray(encoded.input_ids, np.int32)


class WithToken:
    """A tokenizer with a new word: in every text the word becomes `count` new tokens, with ids from `vocab_size` on,
    or after those of the words that the tokenizer has been given before.

    Raises:
        ValueError: the word is a token already.
    """

    def __init__(self, tokenizer: Tokenizer, word: str, count: int, vocab_size: int):
        ids = tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) == 1 or min(ids, default=0) >= vocab_size:
            raise ValueError(
                f"identifier = {word!r} is a token of this base already, and a new one must not replace it; "
                f"give another, such as '<{word.strip('<>')}>'"
            )
        from tokenizers import AddedToken

        self._tokenizer = copy.deepcopy(tokenizer)
        self._names = [word, *(f"{word}_{i}" for i in range(1, count))]
        unused = [f"<unused_{i}>" for i in range(vocab_size - len(tokenizer))]  # rows that the base leaves free
        added = [AddedToken(name, normalized=False) for name in [*unused, *self._names]]
        self._tokenizer.add_tokens(added)
        self._tokenizer.model_max_length = tokenizer.model_max_length
        self._word = re.compile(re.escape(word) + r"(?!_\d)")

    def __call__(self, texts: str | Sequence[str], **settings: Any) -> Any:
        expand = lambda text: self._word.sub(lambda _: " ".join(self._names), text)  # noqa: E731
        return self._tokenizer(expand(texts) if isinstance(texts, str) else [expand(x) for x in texts], **settings)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        if name == "_tokenizer":  # asked for while a copy is made, which has nothing yet
            raise AttributeError(name)
        return getattr(self._tokenizer, name)
