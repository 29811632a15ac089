"""A byte-level BPE tokenizer in CLIP's file format, for the vocabulary of this world.

The layout is CLIP's own: 256 byte symbols, the same 256 with `</w>`, one token per merge in order of rank, then
`<|startoftext|>` and `<|endoftext|>`. Every word of the captions is one token, other text falls back on pieces and
bytes, and the last merges make rare words that no caption contains: the identifiers that DreamBooth binds a subject to
(section 3.2 of the paper takes them from the rare end of its tokenizer in the same way).
"""

import itertools
import json
import os
import pathlib
from collections import Counter
from typing import Any

START, END, SUFFIX = "<|startoftext|>", "<|endoftext|>", "</w>"
Merge = tuple[str, str]


def byte_symbols() -> list[str]:
    """The character that stands for each byte, in CLIP's order of ids: printable Latin-1 first, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def rare_words() -> list[str]:
    """Three-letter words without meaning, "sks" first.

    They have no vowel, so no language that a prompt is likely to be written in has them as words.
    """
    pairs = ["xv", "qw", "zw", "vq", "kt", "zx", "qx", "vj", "xk", "jq", "wz", "kz"]
    made = ["".join(word) for word in itertools.product(pairs, "bcdfghjklmnpqrstvwxz")]
    return ["sks", "xvz", "qwp", *(word for word in made if word not in ("xvz", "qwp"))]


def _split(word: str, ranks: dict[Merge, int]) -> list[str]:
    """What BPE makes of an ASCII word: the pair of the best rank is merged until no pair has one."""
    pieces = [*word[:-1], word[-1] + SUFFIX]
    while len(pieces) > 1:
        i = min(range(len(pieces) - 1), key=lambda i: ranks.get((pieces[i], pieces[i + 1]), len(ranks)))
        if (pieces[i], pieces[i + 1]) not in ranks:
            break
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def _shared_merges(words: list[str], limit: int) -> list[Merge]:
    """Up to `limit` merges of a BPE trained on `words`, each counted once: the pieces that the words share.

    Of equally common pairs the first in the alphabet goes first: libraries leave such ties to the order of a hash
    table, and a tokenizer that differs from run to run is worthless to the text tower that was trained with it.
    """
    pieces = [[*word[:-1], word[-1] + SUFFIX] for word in words]
    counts = Counter(pair for word in pieces for pair in itertools.pairwise(word))
    merges: list[Merge] = []
    while len(merges) < limit and counts:
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[best] < 2:
            break
        merges.append(best)
        for word in pieces:
            if best in itertools.pairwise(word):
                counts.subtract(itertools.pairwise(word))
                _merge(word, best)
                counts.update(itertools.pairwise(word))
    return merges


def _merge(word: list[str], pair: Merge) -> None:
    """Joins every `pair` in `word`, in place, from the left."""
    i = 0
    while i < len(word) - 1:
        if (word[i], word[i + 1]) == pair:
            word[i : i + 2] = ["".join(pair)]
        i += 1


def learn_merges(words: list[str], rare: list[str], shared: int = 1024) -> list[Merge]:
    """Merges, best rank first, under which each of `words` and then each of `rare` is one token.

    A merge ranked below all others acts only where none of them applies, so it cannot split a word that is whole. The
    merges that complete `rare` come last, in its order.

    Raises:
      ValueError: two words would need different merges that make the same token.
    """
    ranks = {merge: rank for rank, merge in enumerate(_shared_merges(words, shared))}
    stems = [pieces[:2] for word in rare if len(pieces := _split(word, ranks)) > 2]

    def add(merge: Merge) -> None:
        ranks.setdefault(merge, len(ranks))

    for word in words:
        while len(pieces := _split(word, ranks)) > 1:
            add((pieces[0], pieces[1]))
    for first, second in stems:
        add((first, second))
    for word in rare:
        while len(pieces := _split(word, ranks)) > 1:
            add((pieces[0], pieces[1]))
    made = ["".join(merge) for merge in ranks]
    if repeated := {token for token in made if made.count(token) > 1}:
        raise ValueError(f"several merges make the same token: {sorted(repeated)}; leave out one of the words")
    return list(ranks)


def write_tokenizer(folder: os.PathLike | str, words: list[str], max_length: int = 24) -> pathlib.Path:
    """Makes the tokenizer of a world and writes it as a CLIP tokenizer folder.

    Writes vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json, which
    `transformers.CLIPTokenizer.from_pretrained(folder)` reads.

    Args:
      folder: where to; it is made.
      words: lower-case ASCII words that are to be one token each (`captions.words`).
      max_length: tokens of a prompt, start and end included (`model_max_length`).

    Returns:
      The folder.

    Raises:
      ValueError: a word is not lower-case ASCII letters or a digit.
    """
    bad = [word for word in words if not (word.isascii() and word.isalnum() and word == word.lower())]
    if bad:
        raise ValueError(f"words must be lower-case ASCII letters or digits: {bad[:10]}")
    rare = [word for word in rare_words() if word not in set(words)]
    merges = learn_merges([word for word in words if len(word) > 1], rare)
    alphabet = byte_symbols()
    tokens = [*alphabet, *(symbol + SUFFIX for symbol in alphabet), *("".join(m) for m in merges), START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = special | {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)}, indent=None)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", special)
    return folder


def _write_json(path: pathlib.Path, value: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
