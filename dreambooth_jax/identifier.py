"""Proposes rare tokens to name a subject with, and class nouns for its photos.

python -m dreambooth_jax.identifier --base tiny
python -m dreambooth_jax.identifier --base path/to/stable-diffusion-v1-5 --count 20
python -m dreambooth_jax.identifier --base tiny --photos examples/subjects/dog
"""

import argparse

from dreambooth_jax.runs.command import one_line_errors, positive, seed_of
from dreambooth_jax.runs.flags import refuse


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dreambooth_jax.identifier", description=__doc__.split("\n")[0])
    parser.add_argument("--base", required=True, help="base model: 'tiny', a folder with tokenizer/, or a hub name")
    parser.add_argument(
        "--ranks", type=_parse_ranks, metavar="LO:HI", help="vocabulary ranks, LO <= rank < HI (default: the rare end)"
    )
    parser.add_argument("--count", type=positive, default=10, help="number of proposals (default: 10)")
    parser.add_argument("--seed", type=seed_of, default=0, help="seed of the draw (default: 0)")
    parser.add_argument("--photos", help="folder of the subject's photos: class nouns are proposed too")
    parser.add_argument(
        "--clip",
        help="folder or hub name of the CLIP that looks at them; default: that beside the embedded base for "
        "--base tiny, else openai/clip-vit-base-patch32",
    )
    options = parser.parse_args(arguments)
    with one_line_errors():
        if not options.photos:
            refuse(options, ["clip"], "without --photos FOLDER, which it looks at")
        print(propose(options))
        if options.photos:
            print(propose_nouns(options))


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


def propose_nouns(options: argparse.Namespace) -> str:
    """Names what the photos show, in words that the base knows; returns the text to print.

    Raises:
        FileNotFoundError: photos, base or CLIP are not there.
    """
    from dreambooth_jax.devices import runtime
    from dreambooth_jax.devices.sharding import make_mesh
    from dreambooth_jax.evaluation import judge, nouns
    from dreambooth_jax.evaluation.dataset import read_photos
    from dreambooth_jax.files.hub import EMBEDDED, EMBEDDED_FOLDER, resolve_base
    from dreambooth_jax.files.tokenizer import load_tokenizer

    photos = read_photos(options.photos)
    known = nouns.read_nouns()
    if options.clip is None and options.base in EMBEDDED:
        known = nouns.taught_nouns(known, EMBEDDED_FOLDER / "clip")
    known = nouns.known_nouns(known, load_tokenizer(resolve_base(options.base)))
    runtime.start()
    if options.clip is None and options.base in EMBEDDED:
        images, texts = judge.embedded_clip(make_mesh())
    else:
        images, texts = judge.published_clip(make_mesh(), options.clip or judge.CLIP)
    found = nouns.probabilities(images, texts, photos, list(known)).mean(0)
    proposals = nouns.propose(known, dict(zip(known, found.tolist(), strict=True)))
    lines = [f"{len(photos)} photos, {len(known)} nouns that the base knows; most probable class nouns:"]
    return "\n".join([*lines, *(f"  {name:<16} {share:.0%}" for name, share in proposals)])


def _parse_ranks(text: str) -> tuple[int, int]:
    lo, hi = text.split(":")  # argparse reports the ValueError of anything else
    return int(lo), int(hi)


if __name__ == "__main__":
    main()
