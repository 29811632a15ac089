"""Proposes rare tokens to name a subject with.

python -m dreambooth_jax.identifier --base tiny
python -m dreambooth_jax.identifier --base path/to/stable-diffusion-v1-5 --count 20
"""

import argparse
import sys


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dreambooth_jax.identifier", description=__doc__.split("\n")[0])
    parser.add_argument("--base", required=True, help="base model: 'tiny', a folder with tokenizer/, or a hub name")
    parser.add_argument(
        "--ranks", type=_parse_ranks, metavar="LO:HI", help="vocabulary ranks, LO <= rank < HI (default: the rare end)"
    )
    parser.add_argument("--count", type=int, default=10, help="number of proposals (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default: 0)")
    options = parser.parse_args(arguments)
    try:
        print(propose(options))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def propose(options: argparse.Namespace) -> str:
    """Draws identifiers as the options say; returns the text to print.

    Raises:
        FileNotFoundError: base or its tokenizer is not there.
        ValueError: the range holds no identifier.
    """
    from dreambooth_jax.data.identifiers import default_ranks, rare_tokens
    from dreambooth_jax.files.hub import resolve_base
    from dreambooth_jax.files.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve_base(options.base))
    lo, hi = options.ranks or default_ranks(tokenizer)
    words = rare_tokens(tokenizer, (lo, hi), options.count, options.seed)
    lines = [f"{len(words)} rare tokens of ranks {lo}:{hi} of {len(tokenizer)}:"]
    lines += [f"  {word:<6} rank {tokenizer.encode(word, add_special_tokens=False)[0]}" for word in words]
    if len(words) < options.count:
        lines.append("There are no more in this range; widen it with --ranks.")
    lines.append(
        "Paint 'a photo of TOKEN' with the base before you choose: some rare tokens do mean something (sks is a rifle)."
    )
    return "\n".join(lines)


def _parse_ranks(text: str) -> tuple[int, int]:
    lo, hi = text.split(":")  # argparse reports the ValueError of anything else
    return int(lo), int(hi)


if __name__ == "__main__":
    main()
