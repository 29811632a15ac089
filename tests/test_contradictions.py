"""Prompts, captions and folders that contradict each other are said in the plan."""

import re

import pytest
from support.runs import config_of

from dreambooth_jax.data.contradictions import contradictions, too_long
from dreambooth_jax.files.tokenizer import load_tokenizer

GOOD = ["a photo of sks dog"]


def test_the_shipped_config_contradicts_nothing(tmp_path):
    assert contradictions(config_of(tmp_path), GOOD) == []
    assert contradictions(config_of(tmp_path, class_noun="dog"), ["SKS Dog, smiling", "a brown animal"]) == []


@pytest.mark.parametrize(
    ("fields", "captions", "message"),
    [
        ({}, ["a brown animal", "dogs sksy"], "no caption holds the identifier 'sks'"),
        ({"instance_prompt": "a photo of {identifier} cat"}, GOOD, "'a photo of sks cat' does not hold .* 'dog'"),
        ({"class_prompt": "a photo of {identifier} dog"}, GOOD, "class_prompt .* holds the identifier"),
        ({"class_prompt": "a photo of a cat"}, GOOD, "class_prompt 'a photo of a cat' does not hold"),
        ({"class_images": "examples/subjects/../subjects/dog"}, GOOD, "are one folder"),
    ],
)
def test_each_contradiction_is_said(tmp_path, fields, captions, message):
    config = config_of(tmp_path, instance_images="examples/subjects/dog", **fields)
    (sentence,) = contradictions(config, captions)

    assert re.search(message, sentence)
    if "class" in message:
        config.prior_preservation = False
        assert contradictions(config, captions) == []


def test_a_caption_that_is_too_long_says_what_is_lost(micro):
    tokenizer = load_tokenizer(micro)
    words = tokenizer.model_max_length
    assert too_long(["a dog"], "dog", tokenizer) == []
    long = " ".join(["a"] * words)
    (sentence,) = too_long([f"dog {long} end", f"dog {long} end"], "dog", tokenizer)
    assert "end'" in sentence and "identifier" not in sentence
    (sentence,) = too_long([f"{long} dog"], "dog", tokenizer)
    assert "the identifier 'dog'" in sentence
    fitting = " ".join(["a"] * (words - 2))  # beside the tokens of start and end
    assert too_long([fitting], "dog", tokenizer) == []
    (sentence,) = too_long([f"{fitting} last"], "dog", tokenizer)
    assert "lost: 'last'" in sentence
