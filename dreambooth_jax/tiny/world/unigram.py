"""A SentencePiece tokenizer of T5's kind for the vocabulary of this world, in tokenizer.json."""

import os
import pathlib
import string
from collections.abc import Sequence

from dreambooth_jax.tiny.world.tokenizer import rare_words

SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1 and 2, as T5 has them
MARK = "\u2581"  # begins a word
_WORD, _PIECE = -10.0, -100.0  # log probabilities: a whole word before any pieces


def write_unigram(folder: os.PathLike | str, words: Sequence[str], max_length: int = 77) -> pathlib.Path:
    """Writes the tokenizer that `transformers.T5Tokenizer.from_pretrained(folder)` reads.

    Every one of `words` is one token, other text falls back on its characters, and the last tokens are rare words
    (`rare_words`) that no caption contains, "sks" the last of all.

    Args:
        folder: where to; it is made.
        words: lower-case words of the captions.
        max_length: tokens of a prompt, its end included.
    """
    from transformers import T5Tokenizer  # takes seconds

    folder = pathlib.Path(folder)
    letters = string.ascii_lowercase + string.digits + string.punctuation
    known = sorted(set(words))
    pieces = [MARK, *letters, *(MARK + word for word in known)]
    pieces += [MARK + word for word in reversed(rare_words()) if word not in set(known)]
    scores = {piece: _PIECE if len(piece) == 1 else _WORD for piece in pieces}
    vocab = [(name, 0.0) for name in SPECIAL] + [(piece, scores[piece]) for piece in dict.fromkeys(pieces)]
    T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=max_length).save_pretrained(folder)
    return folder
