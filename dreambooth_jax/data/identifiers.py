"""Identifiers: rare tokens of a vocabulary (arXiv 2208.12242, section 3.2)."""

import numpy as np

from dreambooth_jax.files.tokenizer import Tokenizer

PAPER_RANKS = (5000, 10000)  # of T5's 32000, section 3.2


def default_ranks(tokenizer: Tokenizer) -> tuple[int, int]:
    """The vocabulary ranks [lo, hi) that identifiers are drawn from: the last fifth; for T5 the paper's 5000 to 10000.

    The rank is the token id. SentencePiece sorts a T5 vocabulary by frequency, so that 10000 to 32000 are rarer still,
    but they are long words and fragments of other languages. A byte-pair vocabulary (CLIP) holds the bytes, then one
    token per merge in the order of learning, the most frequent pair first, then the special tokens. Its last fifth,
    39525 to 49406 of CLIP's 49408, holds the merges learned last: the rarest words, with the customary `sks` (48136)
    among them. A share instead of fixed ranks also fits vocabularies of a few thousand tokens.
    """
    special = set(tokenizer.all_special_ids)
    hi = 1 + max(rank for rank in tokenizer.get_vocab().values() if rank not in special)
    if _is_sentencepiece(tokenizer) and hi >= PAPER_RANKS[1]:
        return PAPER_RANKS
    return hi - hi // 5, hi


def rare_tokens(tokenizer: Tokenizer, ranks: tuple[int, int], count: int, seed: int, max_chars: int = 3) -> list[str]:
    """Draws identifiers from the ranks [lo, hi): words that are exactly one token, in the order of the draw.

    A token qualifies if it decodes to at most `max_chars` Unicode characters, all of them letters (digits, punctuation
    and emoji have meanings of their own and fuse with their neighbours), and encodes back to exactly itself: it
    is then a whole word, not the inside of one.

    Returns:
      `count` identifiers, or fewer where the range holds no more.

    Raises:
      ValueError: the range is empty or outside of the vocabulary, or nothing in it qualifies.
    """
    lo, hi = ranks
    if not 0 <= lo < hi <= len(tokenizer):
        raise ValueError(f"ranks {lo}:{hi} must be a range within 0:{len(tokenizer)}, the tokenizer's vocabulary")
    special = set(tokenizer.all_special_ids)
    words: list[str] = []
    for rank in np.random.default_rng(seed).permutation(np.arange(lo, hi)).tolist():
        if len(words) == count:
            break
        word = tokenizer.decode([rank]).strip()
        if rank not in special and len(word) <= max_chars and word.isalpha() and _encode(tokenizer, word) == [rank]:
            words.append(word)
    if not words:
        raise ValueError(f"no token of the ranks {lo}:{hi} is a word of 1 to {max_chars} letters: widen the range")
    return words


def check_identifier(tokenizer: Tokenizer, identifier: str) -> list[str]:
    """What speaks against an identifier, as sentences for the person who chose it; empty if nothing does."""
    ranks, rare = _encode(tokenizer, identifier), default_ranks(tokenizer)[0]
    if not ranks:
        problem = "is empty to the tokenizer: the subject would have no name"
    elif tokenizer.unk_token_id in ranks:
        problem = "is not in the vocabulary: prompts could not tell it from other such words"
    elif len(ranks) > 1:
        pieces = " + ".join(repr(tokenizer.decode([rank]).strip()) for rank in ranks)
        problem = f"is {len(ranks)} tokens, {pieces}, each with its own meaning: prefer a single rare one"
    elif ranks[0] < rare:
        problem = (
            f"is a common word, rank {ranks[0]} where rare ones begin at {rare}: its meaning must be unlearned first"
        )
    else:
        return []
    return [f"the identifier {identifier!r} {problem}"]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _is_sentencepiece(tokenizer: Tokenizer) -> bool:
    return any(token.startswith("\u2581") for token in tokenizer.get_vocab())
