"""Rare tokens to name a subject with.

    python -m dreambooth_jax.identifier --base path/to/stable-diffusion-v1-5

DreamBooth binds a subject to an identifier that the base model knows little about (arXiv 2208.12242, section 3.2):
draw tokens without replacement from the rare end of the tokenizer's vocabulary, decode them, and keep the short ones
without spaces. A word that the model knows has to be unlearned first, and a random string of letters falls apart into
several well-known tokens.
"""

import argparse

import numpy as np

from dreambooth_jax.files.tokenizer import load_tokenizer

PAPER_RANKS = (5000, 10000)  # of T5's 32000, section 3.2


def default_ranks(tokenizer) -> tuple[int, int]:
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


def rare_tokens(tokenizer, ranks: tuple[int, int], count: int, seed: int, max_chars: int = 3) -> list[str]:
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
    special, words = set(tokenizer.all_special_ids), []
    for rank in np.random.default_rng(seed).permutation(np.arange(lo, hi)).tolist():
        if len(words) == count:
            break
        word = tokenizer.decode([rank]).strip()
        if rank not in special and len(word) <= max_chars and word.isalpha() and _encode(tokenizer, word) == [rank]:
            words.append(word)
    if not words:
        raise ValueError(f"no token of the ranks {lo}:{hi} is a word of 1 to {max_chars} letters: widen the range")
    return words


def check_identifier(tokenizer, identifier: str) -> list[str]:
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


def _encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _is_sentencepiece(tokenizer) -> bool:
    return any(token.startswith("\u2581") for token in tokenizer.get_vocab())


def _parse_ranks(text: str) -> tuple[int, int]:
    lo, hi = text.split(":")  # argparse reports the ValueError of anything else
    return int(lo), int(hi)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dreambooth_jax.identifier", description=__doc__.split("\n")[0])
    parser.add_argument("--base", required=True, help="pipeline folder with tokenizer/")
    parser.add_argument(
        "--ranks", type=_parse_ranks, metavar="LO:HI", help="vocabulary ranks, LO <= rank < HI (default: the rare end)"
    )
    parser.add_argument("--count", type=int, default=10, help="how many to propose (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other proposals (default: 0)")
    options = parser.parse_args(arguments)
    try:
        tokenizer = load_tokenizer(options.base)
        lo, hi = options.ranks or default_ranks(tokenizer)
        words = rare_tokens(tokenizer, (lo, hi), options.count, options.seed)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(f"{len(words)} rare tokens of ranks {lo}:{hi} of {len(tokenizer)}:")
    for word in words:
        print(f"  {word:<6} rank {_encode(tokenizer, word)[0]}")
    if len(words) < options.count:
        print("There are no more in this range; widen it with --ranks.")
    print(
        "Paint 'a photo of TOKEN' with the base before you choose: some rare tokens do mean something (sks is a rifle)."
    )


if __name__ == "__main__":
    main()
