"""Identifiers from tokenizers of CLIP's and T5's kind, trained here on a made-up language of known word frequencies."""

import json
import math
import random
import subprocess
import sys
from collections import Counter

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dreambooth_jax.data.identifiers import check_identifier, default_ranks, rare_tokens
from dreambooth_jax.files.tokenizer import load_tokenizer
from dreambooth_jax.identifier import main

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def corpus():
    """Sentences of Zipf's distribution; `dog` is the most frequent word, `äöü` a rare one beyond ASCII."""
    rng = random.Random(0)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(1, 5))) for _ in range(3000)]
    words = ["dog", *words, "äöü"]
    weights = [1 / (i + 1) for i in range(len(words))]
    return [" ".join(rng.choices(words, weights, k=12)) for _ in range(2000)] + ["äöü äöü"] * 4


@pytest.fixture(scope="module")
def clip_base(corpus, tmp_path_factory):
    """A tokenizer folder in CLIP's layout: bytes, bytes</w>, merges in the order of learning, two special tokens."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2600, initial_alphabet=ALPHABET, end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator(corpus, trainer)
    merges = json.loads(trained.to_str())["model"]["merges"]
    letters = sorted(ALPHABET)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("clip") / "tokenizer"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return folder.parent


@pytest.fixture(scope="module")
def t5_base(corpus, tmp_path_factory):
    counts = Counter(word for line in corpus for word in line.split()).most_common(1500)
    pieces = [(f"\u2581{word}", math.log(n)) for word, n in counts] + [(letter, -50.0) for letter in "\u2581" + LETTERS]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    trained = Tokenizer(models.Unigram([*special, *pieces], unk_id=2))
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    folder = tmp_path_factory.mktemp("t5") / "tokenizer"
    folder.mkdir()
    trained.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"} | names))
    return folder.parent


@pytest.fixture(scope="module", params=["clip_base", "t5_base"])
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))


def test_every_proposal_is_one_short_rare_token(tokenizer):
    lo, hi = default_ranks(tokenizer)
    words = rare_tokens(tokenizer, (lo, hi), 10, seed=0)
    assert len(words) == len(set(words)) == 10
    for word in words:
        in_prompt = tokenizer(f"a photo of {word} dog").input_ids
        (rank,) = [i for i in in_prompt if tokenizer.decode([i]).strip() == word]
        assert lo <= rank < hi and 1 <= len(word) <= 3 and word.isalpha()
        assert check_identifier(tokenizer, word) == []


def test_proposals_end_words(clip_base):
    tokenizer = load_tokenizer(clip_base)
    for word in rare_tokens(tokenizer, default_ranks(tokenizer), 10, seed=1):
        (token,) = tokenizer.convert_ids_to_tokens(tokenizer.encode(word, add_special_tokens=False))
        assert token.endswith("</w>")


def test_seeds_differ_and_repeat(tokenizer):
    ranks = default_ranks(tokenizer)
    draws = [rare_tokens(tokenizer, ranks, 8, seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert rare_tokens(tokenizer, ranks, 3, 0) == draws[0][:3]


def test_all_of_a_range_are_found(clip_base):
    """Against an exhaustive look at the vocabulary file; `äöü` is three characters though six bytes."""
    tokenizer = load_tokenizer(clip_base)
    vocabulary = json.loads((clip_base / "tokenizer" / "vocab.json").read_text())
    ascii_words = {t[:-4] for t, i in vocabulary.items() if i >= 512 and t.endswith("</w>") and t[:-4].isascii()}
    short = {word for word in ascii_words if len(word) <= 3 and word.isalpha()}
    found = rare_tokens(tokenizer, (512, len(vocabulary)), 10**6, seed=3)
    assert len(found) == len(set(found)) and "äöü" in found
    # A learned token may be unreachable because an earlier merge takes its letters: those must not be proposed.
    assert {word for word in found if word.isascii()} <= short
    assert len(found) > 0.9 * len(short)


def test_default_ranks_are_the_rare_end():
    class Vocabulary:
        def __init__(self, size, special, mark=""):
            self.all_special_ids = special
            self.tokens = {f"{mark}{i}": i for i in range(size)}

        def __call__(self, texts, **settings):
            raise AssertionError("ranks depend on the vocabulary alone")

        def __len__(self):
            return len(self.tokens)

        def get_vocab(self):
            return self.tokens

    assert default_ranks(Vocabulary(49408, [49406, 49407])) == (39525, 49406)
    assert default_ranks(Vocabulary(49408, [49406, 49407, 0])) == (39525, 49406)  # SD 2 pads with token 0
    assert default_ranks(Vocabulary(2000, [1998, 1999])) == (1599, 1998)
    assert default_ranks(Vocabulary(32100, [0, 1, 2, *range(32000, 32100)], "\u2581")) == (5000, 10000)


def test_warnings(tokenizer):
    (common,) = check_identifier(tokenizer, "dog")
    assert "common word" in common
    (several,) = check_identifier(tokenizer, "qxzjvkwq")
    assert "tokens" in several and "'" in several
    (two,) = check_identifier(tokenizer, "dog dog")
    assert "2 tokens" in two
    (empty,) = check_identifier(tokenizer, "")
    assert "empty" in empty


def test_unknown_characters(t5_base):
    (unknown,) = check_identifier(load_tokenizer(t5_base), "犬")
    assert "not in the vocabulary" in unknown


def test_bad_ranks(tokenizer):
    for ranks in [(5, 5), (-1, 4), (0, 10**6)]:
        with pytest.raises(ValueError, match="must be a range within"):
            rare_tokens(tokenizer, ranks, 1, 0)
    with pytest.raises(ValueError, match="widen the range"):
        rare_tokens(tokenizer, (len(tokenizer) - 1, len(tokenizer)), 1, 0)


def test_missing_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No tokenizer in .*holds nothing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"merges\.txt.*holds vocab\.json"):
        load_tokenizer(tmp_path)


def test_folder_without_config_is_clip(clip_base, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    for name in ["vocab.json", "merges.txt"]:
        (tmp_path / "tokenizer" / name).write_bytes((clip_base / "tokenizer" / name).read_bytes())
    texts = ["a photo of a dog", "Äöü!"]
    assert load_tokenizer(tmp_path)(texts).input_ids == load_tokenizer(clip_base)(texts).input_ids


def test_command(clip_base, capsys):
    main(["--base", str(clip_base), "--count", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4 rare tokens") and sum(" rank " in line for line in lines[1:5]) == 4
    main(["--base", str(clip_base), "--ranks", "512:530", "--count", "500"])
    assert "no more in this range" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--base", "nowhere"], "nowhere': no such folder"), (["--base", "nowhere", "--ranks", "5"], "invalid")],
)
def test_command_errors(options, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(options)
    assert end.value.code not in (0, None) and message in f"{end.value.code}{capsys.readouterr().err}"


def test_the_embedded_base_proposes_identifiers(capsys):
    main(["--base", "tiny", "--count", "3"])
    assert capsys.readouterr().out.count(" rank ") == 3


def test_module_runs_as_a_program():
    command = [sys.executable, "-m", "dreambooth_jax.identifier", "--help"]
    assert "--ranks LO:HI" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
