"""Class nouns: probabilities summed up the hypernyms, words that a base knows, and the command on photos."""

import re

import pytest
from support.torch_folders import write_tokenizer

from dreambooth_jax import identifier
from dreambooth_jax.evaluation import nouns
from dreambooth_jax.evaluation.nouns import Noun

TREE = {
    noun.name: noun
    for noun in (
        Noun("carnivore", "", False), Noun("dog", "carnivore", True), Noun("corgi", "dog", False),
        Noun("puppy", "dog", True), Noun("cat", "carnivore", True), Noun("toy", "", True),
    )
}  # fmt: skip


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
