"""The class noun of a subject (arXiv 2208.12242, section 3.2: "obtained using a classifier"): CLIP zero-shot over
common concrete nouns, backed off along WordNet's hypernyms."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dreambooth_jax.evaluation.features import ImageFeatures, TextFeatures
from dreambooth_jax.evaluation.transforms import Picture
from dreambooth_jax.files.tokenizer import Tokenizer

LIST = Path(__file__).parent.parent / "data" / "nouns.tsv"
TEMPLATE = "a photo of {}"
SCALE = 100.0  # of cosines, as CLIP was trained
TAUGHT = "nouns.txt"  # beside a CLIP: the only class nouns that it was trained on, one per line
TOP = 5  # proposals
SURE = 0.6  # share of the probability from which a noun is specific enough


class Noun(NamedTuple):
    """A noun of the list: the next more general one ("" for none) and whether it is an everyday word."""

    name: str
    parent: str
    everyday: bool


class Proposal(NamedTuple):
    """A class noun and its probability, that of all nouns below it included."""

    name: str
    probability: float


def read_nouns(path: Path = LIST) -> dict[str, Noun]:
    """The list that `benchmarks/nouns.py` writes."""
    lines = [line.split("\t") for line in path.read_text().splitlines() if not line.startswith("#")]
    return {name: Noun(name, parent, everyday == "1") for name, parent, everyday in lines}


def known_nouns(nouns: Mapping[str, Noun], tokenizer: Tokenizer) -> dict[str, Noun]:
    """The nouns that a base's text tower knows as words. Nouns above them close up."""
    return _among(nouns, {name for name in nouns if knows(tokenizer, name)})


def taught_nouns(nouns: Mapping[str, Noun], clip: Path) -> dict[str, Noun]:
    """The nouns that a CLIP was trained on, all of them everyday words, if its folder lists them; else `nouns`.

    A word of the tokenizer that no training caption holds has an arbitrary vector. Among 520 words of the list, 70 of
    them class nouns of its training, the embedded base's CLIP names 45 % of 65 pictures of its world; among its own 77
    nouns 89 %.
    """
    if not (clip / TAUGHT).is_file():
        return dict(nouns)
    names = (clip / TAUGHT).read_text().splitlines()
    named = {name: nouns.get(name, Noun(name, "", True))._replace(everyday=True) for name in names}
    return _among({**nouns, **named}, set(named))


def _among(nouns: Mapping[str, Noun], known: set[str]) -> dict[str, Noun]:
    def above(name: str) -> str:
        parent, seen = nouns[name].parent, {name}
        while parent and parent not in known and parent not in seen:
            seen.add(parent)
            parent = nouns[parent].parent
        return parent if parent in known else ""

    return {name: nouns[name]._replace(parent=above(name)) for name in nouns if name in known}


def knows(tokenizer: Tokenizer, noun: str) -> bool:
    """Whether every word of the noun is one token: rarer words are spelt, and mean little to a base."""
    return len(tokenizer.encode(noun, add_special_tokens=False)) == len(noun.split())


def probabilities(
    images: ImageFeatures, texts: TextFeatures, photos: Sequence[Picture], names: Sequence[str]
) -> Float[np.ndarray, "photos n"]:
    """The probability of each noun for each photo."""
    logits = SCALE * images.of(photos) @ texts.of([TEMPLATE.format(with_article(name)) for name in names]).T
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def with_article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def propose(nouns: Mapping[str, Noun], found: Mapping[str, float], count: int = TOP) -> list[Proposal]:
    """The most probable everyday nouns.

    The probability of other nouns goes to the next everyday noun above them ("corgi" to "dog"). The first proposal is
    the most specific everyday noun with at least `SURE` of the probability below it, if there is one.

    Args:
        found: noun -> probability.
    """
    own = dict.fromkeys((name for name, noun in nouns.items() if noun.everyday), 0.0)
    below = dict.fromkeys(own, 0.0)
    depth = {}
    for name in nouns:
        chain = [above for above in _chain(nouns, name) if nouns[above].everyday]
        depth[name] = len(chain)
        for above in chain:
            below[above] += found[name]
        if chain:
            own[chain[0]] += found[name]
    sure = sorted((name for name in below if below[name] >= SURE), key=lambda name: (-depth[name], -below[name]))
    likely = sorted(own, key=lambda name: -own[name])
    first = sure[:1]
    return [Proposal(name, below[name]) for name in (first + [name for name in likely if name not in first])[:count]]


def _chain(nouns: Mapping[str, Noun], name: str) -> list[str]:
    """The noun and those above it."""
    chain = []
    while name and name not in chain:
        chain.append(name)
        name = nouns[name].parent
    return chain


def doubt(noun: str, images: ImageFeatures, texts: TextFeatures, photos: Sequence[Picture]) -> str:
    """A warning if `noun` is not among the most probable everyday nouns for the photos; "" if it is.

    Args:
        noun: class noun of a run.
        images, texts: a CLIP that knows everyday nouns.
    """
    listed = read_nouns()
    names = {name for name, entry in listed.items() if entry.everyday} | {noun}
    nouns = _among({**listed, noun: listed.get(noun, Noun(noun, "", True))._replace(everyday=True)}, names)
    found = probabilities(images, texts, photos, list(nouns)).mean(0)
    proposals = propose(nouns, dict(zip(nouns, found.tolist(), strict=True)))
    if noun in [proposal.name for proposal in proposals]:
        return ""
    likely = ", ".join(f"{proposal.name} {proposal.probability:.0%}" for proposal in proposals)
    return f"class noun {noun!r} is not among the {TOP} that CLIP finds most probable for the photos: {likely}"
