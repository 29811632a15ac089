"""Class nouns: probabilities summed up the hypernyms, words that a base knows, and the command on photos."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.torch_folders import write_tokenizer

from dreambooth_jax import identifier
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.evaluation import judge, nouns
from dreambooth_jax.evaluation.dataset import read_photos
from dreambooth_jax.evaluation.nouns import Noun
from dreambooth_jax.files.hub import EMBEDDED_FOLDER
from dreambooth_jax.files.tokenizer import load_tokenizer

TREE = {
    noun.name: noun
    for noun in (
        Noun("carnivore", "", False),
        Noun("dog", "carnivore", True),
        Noun("corgi", "dog", False),
        Noun("puppy", "dog", True),
        Noun("cat", "carnivore", True),
        Noun("toy", "", True),
    )
}


def test_a_breed_is_a_dog():
    found = {"carnivore": 0.0, "dog": 0.2, "corgi": 0.5, "puppy": 0.1, "cat": 0.15, "toy": 0.05}
    names = [proposal.name for proposal in nouns.propose(TREE, found)]
    assert names == ["dog", "cat", "puppy", "toy"]
    assert nouns.propose(TREE, found)[0].probability == pytest.approx(0.8)


def test_the_most_specific_noun_that_is_sure_comes_first():
    found = {"carnivore": 0.0, "dog": 0.2, "corgi": 0.0, "puppy": 0.7, "cat": 0.1, "toy": 0.0}
    assert nouns.propose(TREE, found, count=2)[0] == ("puppy", pytest.approx(0.7))


def test_nouns_that_a_base_spells_are_left_out_and_the_tree_closes_up(tmp_path):
    tokenizer = write_tokenizer(tmp_path)  # knows "dog" and "cat" as words
    known = nouns.known_nouns(TREE, tokenizer)
    assert known.keys() == {"dog", "cat"} and known["dog"].parent == ""
    assert not nouns.knows(tokenizer, "corgi")


def test_the_list_is_a_forest_of_common_nouns():
    found = nouns.read_nouns()
    assert {"dog", "cat", "teapot", "backpack", "sneaker", "clock", "vase", "toy", "stuffed animal"} <= found.keys()
    assert found["corgi"].parent == "dog" and not found["corgi"].everyday
    assert {noun.parent for noun in found.values()} <= found.keys() | {""}
    for name in found:
        assert len(nouns._chain(found, name)) < 20


def test_the_command_proposes_nouns_for_photos(capsys):
    identifier.main(["--base", "tiny", "--photos", "examples/subjects/cat"])
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if "most probable class nouns" in line) + 1
    proposed = [re.fullmatch(r"  ([a-z ]+?) +(\d+)%", line) for line in lines[first:]]
    assert len(proposed) == 5 and all(proposed)
    assert all(int(match[2]) <= 100 for match in proposed)  # a noun's share has that of the nouns below it


# Pictures of the embedded base's world in settings that its training did not see, row by row.
WORLD = """
dog vase glasses cat can dog teddy_bear can dog robot duck toy cat dog robot dog toy fish boot car teapot teddy_bear
cat bear bowl toy robot rabbit car clock glasses chick robot bowl vase boot monkey camera cartoon clock robot vase
teddy_bear teddy_bear dog dog candle glasses sneaker car bus duck cat truck cat cat teapot toy clock sneaker
"""


def test_the_embedded_clip_names_pictures_of_its_own_world():
    strip = np.asarray(Image.open(Path(__file__).parent / "data" / "world.jpg"))
    pictures = [cell for row in np.split(strip, 6) for cell in np.split(row, 10, axis=1)]
    listed = nouns.read_nouns()
    taught = nouns.taught_nouns(listed, EMBEDDED_FOLDER / "clip")
    assert nouns.known_nouns(taught, load_tokenizer(EMBEDDED_FOLDER)) == taught
    assert nouns.taught_nouns(listed, EMBEDDED_FOLDER / "vit") == listed
    images, texts = judge.embedded_clip(make_mesh())
    shares = nouns.probabilities(images, texts, pictures, list(taught))
    proposals = [nouns.propose(taught, dict(zip(taught, row.tolist(), strict=True))) for row in shares]
    names = [name.replace("_", " ") for name in WORLD.split()]
    first = np.mean([found[0].name == name for found, name in zip(proposals, names, strict=True)])
    five = np.mean([name in [p.name for p in found] for found, name in zip(proposals, names, strict=True)])
    assert first >= 0.8 and five >= 0.9


def test_a_noun_that_the_photos_do_not_show_is_doubted(monkeypatch):
    """To CLIP the photos are robots; a run that calls them dogs is warned."""
    monkeypatch.setattr(nouns, "read_nouns", lambda: nouns.taught_nouns({}, EMBEDDED_FOLDER / "clip"))
    images, texts = judge.embedded_clip(make_mesh())
    photos = read_photos("examples/subjects/robot")
    assert nouns.doubt("robot", images, texts, photos) == ""
    assert "'dog' is not among the 5" in (said := nouns.doubt("dog", images, texts, photos)) and "robot" in said
    assert "'zebra'" in nouns.doubt("zebra", images, texts, photos)
