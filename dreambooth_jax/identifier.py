"""Rare tokens to name a subject with.

    python -m dreambooth_jax.identifier --base path/to/stable-diffusion-v1-5

DreamBooth binds a subject to an identifier that the base model knows little about (arXiv 2208.12242, section 3.2):
draw tokens without replacement from the rare end of the tokenizer's vocabulary, decode them, and keep the short ones
without spaces. A word that the model knows has to be unlearned first, and a random string of letters falls apart into
several well-known tokens.
"""

import argparse

from dreambooth_jax.data.identifiers import default_ranks, rare_tokens
from dreambooth_jax.files.tokenizer import load_tokenizer


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
        print(f"  {word:<6} rank {tokenizer.encode(word, add_special_tokens=False)[0]}")
    if len(words) < options.count:
        print("There are no more in this range; widen it with --ranks.")
    print(
        "Paint 'a photo of TOKEN' with the base before you choose: some rare tokens do mean something (sks is a rifle)."
    )


if __name__ == "__main__":
    main()
