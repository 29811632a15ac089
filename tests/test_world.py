"""The picture world, on a few synthetic sprites in npm's layout: no network, no emoji package."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support.npm_packages import write_packages
from transformers import CLIPTokenizer

from dreambooth_jax.tiny.world import (
    BACKGROUNDS,
    COLOURS,
    SETTINGS,
    SUBJECT_NOUNS,
    load_sprites,
    rare_words,
    render,
    words,
    write_tokenizer,
)
from dreambooth_jax.tiny.world.dataset import background_weights, sprite_weights
from dreambooth_jax.tiny.world.names import CLASSES, with_article
from dreambooth_jax.tiny.world.scenes import place, setting
from dreambooth_jax.tiny.world.sprites import FLUENT, HELD_OUT, NOTO, Sprite, fetch, tarball_name


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_packages(tmp_path_factory.mktemp("npm"))


@pytest.fixture(scope="module")
def sprites(source):
    return load_sprites(source)


def test_the_tokenizer_is_the_same_in_every_process(sprites, tmp_path):
    """The text tower knows tokens by their ids: another order of merges would turn it into noise."""
    program = (
        "import sys; from dreambooth_jax.tiny.world import write_tokenizer; write_tokenizer(sys.argv[1], sys.argv[2:])"
    )
    for number in range(3):
        command = [sys.executable, "-c", program, str(tmp_path / str(number)), *words(sprites)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": str(number)})
    for name in ("vocab.json", "merges.txt"):
        assert len({(tmp_path / str(number) / name).read_bytes() for number in range(3)}) == 1


def test_things_are_kept_and_people_flags_and_symbols_left_out(sprites):
    assert {sprite.noun for sprite in sprites} == {"dog", "cat", "teapot", "glasses", "car", "anchor"}
    assert {sprite.style for sprite in sprites} == {"3d", "flat"}
    assert len({sprite.name for sprite in sprites}) == len(sprites)


def test_sprites_are_cropped_to_what_is_visible(sprites):
    for sprite in sprites:
        assert max(sprite.rgba.shape[:2]) <= 128
        alpha = sprite.rgba[..., 3]
        assert all(edge.max() > 8 for edge in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]))


def test_held_out_sprites_are_apart_from_the_others(source, sprites):
    """Individuals of the examples in every dye and pose, and some poses of the others."""
    held_out = load_sprites(source, held_out=True)
    names = {sprite.name for sprite in held_out}
    assert names > HELD_OUT and not names & {sprite.name for sprite in sprites}
    assert not [s.name for s in sprites if any(s.name.startswith(name) for name in HELD_OUT)]
    assert {sprite.individual for sprite in held_out if sprite.noun == "dog" and sprite.pose} == {"dog2/3d"}


def test_an_animation_gives_its_different_frames_as_poses(source, sprites):
    both = [s for s in (*sprites, *load_sprites(source, held_out=True)) if s.name.startswith("dog2/3d/pose")]
    assert sorted(sprite.pose for sprite in both) == [1, 2, 3, 4, 5]  # six different frames, each shown twice
    assert len({sprite.rgba.shape for sprite in both}) == 5
    assert {(s.noun, s.variant, s.style) for s in both} == {("dog", "standing dog", "3d")}


def test_nothing_stands_before_a_background_that_hides_its_outline():
    rgba = np.zeros((40, 40, 4), np.uint8)
    rgba[4:-4, 4:-4] = (*COLOURS["blue"], 255)
    blue = Sprite("bar/3d", "bar", "bar", "object", "3d", rgba)
    weights = background_weights([blue])[0]
    assert weights.sum() == pytest.approx(1)
    assert weights[BACKGROUNDS.index("blue")] == 0 < weights[BACKGROUNDS.index("red")]


def test_dyed_sprites_keep_their_shape_and_change_their_colour(sprites):
    by_name = {sprite.name: sprite for sprite in sprites}
    original, blue = by_name["teapot/3d"], by_name["teapot/3d/blue"]
    np.testing.assert_array_equal(original.rgba[..., 3], blue.rgba[..., 3])
    inside = blue.rgba[..., 3] == 255
    assert blue.rgba[inside][:, 2].mean() > blue.rgba[inside][:, :2].mean() + 50
    assert blue.colour == "blue" and blue.noun == "teapot"


def test_a_missing_or_damaged_package_is_named_with_a_remedy(source, tmp_path):
    with pytest.raises(FileNotFoundError, match="npm pack"):
        load_sprites(tmp_path)
    whole = (source / tarball_name(NOTO)).read_bytes()
    (tmp_path / tarball_name(NOTO)).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=tarball_name(NOTO)):
        load_sprites(tmp_path)


def test_fetch_uses_the_cache_and_explains_a_missing_npm(source, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fetch(FLUENT, source) == source / tarball_name(FLUENT)
    with pytest.raises(RuntimeError, match="npm pack"):
        fetch(FLUENT, tmp_path)


def test_a_picture_depends_on_split_seed_and_index_alone(sprites):
    images, captions, labels, backgrounds = render(sprites, 12, size=32, seed=3)
    parts = [render(sprites, n, size=32, seed=3, start=start) for start, n in ((8, 4), (0, 8))]
    np.testing.assert_array_equal(images, np.concatenate([parts[1][0], parts[0][0]]))
    assert captions == parts[1][1] + parts[0][1]
    np.testing.assert_array_equal(labels, np.concatenate([parts[1][2], parts[0][2]]))
    np.testing.assert_array_equal(backgrounds, np.concatenate([parts[1][3], parts[0][3]]))
    for other in (render(sprites, 12, size=32, seed=4), render(sprites, 12, size=32, seed=3, split="test")):
        assert not (other[0] == images).all(axis=(1, 2, 3)).any()


def test_captions_name_the_thing_and_its_background(sprites):
    _, captions, labels, backgrounds = render(sprites, 400, size=16, seed=0)
    colour_named = 0
    for caption, label, background in zip(captions, labels, backgrounds, strict=True):
        sprite = sprites[label]
        assert any(name in caption for name in (sprite.noun, sprite.variant, *sprite.synonyms)), (caption, sprite.name)
        named = [c for c in COLOURS if f"{c} background" in caption or f"{c} wall" in caption]
        colour_named += BACKGROUNDS[background] in named
        if BACKGROUNDS[background] in SETTINGS:
            assert not named
    plain = sum(BACKGROUNDS[b] in COLOURS for b in backgrounds)
    assert 0.7 < colour_named / plain < 0.95  # some captions leave the place out


def test_flat_pictures_always_say_so_and_bare_captions_mean_rendered_ones(sprites):
    _, captions, labels, _ = render(sprites, 400, size=16, seed=1)
    drawn = [any(word in caption for word in ("drawing", "illustration", "cartoon of")) for caption in captions]
    assert drawn == [sprites[label].style == "flat" for label in labels]


def test_the_background_is_the_colour_it_is_called(sprites):
    images, _, _, backgrounds = render(sprites, 300, size=32, seed=2)
    for image, background in zip(images, backgrounds, strict=True):
        if BACKGROUNDS[background] in COLOURS:
            corners = image[[0, 0, -1, -1], [0, -1, 0, -1]].astype(float)
            nearest = [min(COLOURS, key=lambda c: np.abs(corner - COLOURS[c]).sum()) for corner in corners]
            assert nearest.count(BACKGROUNDS[background]) >= 2


def test_classes_that_people_fine_tune_come_up_more_often(sprites):
    weights = sprite_weights(sprites, 0.5)
    nouns = np.array([sprite.noun for sprite in sprites])
    share = {noun: weights[nouns == noun].sum() for noun in (*SUBJECT_NOUNS, "anchor")}
    assert weights.sum() == pytest.approx(1)
    assert sum(share[noun] for noun in SUBJECT_NOUNS) == pytest.approx(0.5)
    assert share["dog"] > share["teapot"] > 0.05
    individuals = {name: weights[[s.individual == name for s in sprites]].sum() for name in ("dog2/3d", "dog/3d")}
    assert individuals["dog2/3d"] == pytest.approx(individuals["dog/3d"])  # whatever the number of its poses
    assert set(SUBJECT_NOUNS) <= {name.noun for name in CLASSES.values()}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_exist_at_any_size_and_vary(name):
    for size in (24, 64, 100):
        first, second = (setting(np.random.default_rng(seed), name, size) for seed in (0, 1))
        assert first.shape == (size, size, 3) and first.dtype == np.uint8
        assert np.abs(first.astype(int) - second).mean() > 1


def test_a_sprite_lies_where_it_is_put():
    rgba = np.zeros((40, 20, 4), np.uint8)
    rgba[..., 3] = 255
    rgba[:, :10, 0] = 255  # the left half is red, the right half black
    sprite = Sprite("bar/3d", "bar", "bar", "object", "3d", rgba)
    white = np.full((64, 64, 3), 255, np.uint8)
    image = place(white, sprite, scale=0.5, x=0.25, y=0.5, shadow=False)
    rows, columns = np.nonzero(image[..., 1] < 128)
    assert (rows.min(), rows.max()) == (16, 47) and (columns.min(), columns.max()) == (8, 23)
    assert image[32, 10, 0] > 200 and image[32, 20, 0] < 50
    mirrored = place(white, sprite, scale=0.5, x=0.25, y=0.5, mirror=True, shadow=False)
    assert mirrored[32, 10, 0] < 50 and mirrored[32, 20, 0] > 200
    upside_down = place(white, sprite, scale=0.5, x=0.25, y=0.5, angle=180.0, shadow=False)
    assert np.abs(upside_down.astype(int) - mirrored).mean() < 2
    turned = place(white, sprite, scale=0.5, x=0.5, y=0.5, angle=90.0, shadow=False)
    assert turned[40, 32, 0] > 200 and turned[24, 32, 0] < 50  # counter-clockwise: left goes to the bottom
    assert (white == 255).all()


def test_articles():
    phrases = ("apple", "dog", "hourglass", "umbrella", "unicorn", "glasses", "bread", "orange and red")
    assert [with_article(p) for p in phrases] == [
        "an apple",
        "a dog",
        "an hourglass",
        "an umbrella",
        "a unicorn",
        "glasses",
        "bread",
        "an orange and red",
    ]


@pytest.fixture(scope="module")
def tokenizer(sprites, tmp_path_factory):
    return CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), words(sprites)))


def _decode(tokenizer, text: str) -> str:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_every_caption_word_is_one_token(tokenizer, sprites):
    assert [word for word in words(sprites) if len(tokenizer.tokenize(word)) != 1] == []
    _, captions, _, _ = render(sprites, 200, size=16, seed=5)
    for caption in captions:
        assert len(tokenizer.tokenize(caption)) == len(caption.replace("3d", "3 d").split())
        assert len(tokenizer(caption).input_ids) <= tokenizer.model_max_length


def test_rare_words_are_the_last_tokens_and_no_caption_has_them(tokenizer, sprites):
    rare = rare_words()
    assert len(rare) >= 200 and "sks" in rare and max(map(len, rare)) <= 3
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in rare]
    assert ids == [[i] for i in range(len(tokenizer) - 2 - len(rare), len(tokenizer) - 2)]
    assert [_decode(tokenizer, word).strip() for word in rare] == rare
    assert not set(rare) & set(words(sprites))
    assert len(tokenizer.tokenize("a photo of a sks dog")) == 6


def test_any_text_is_covered(tokenizer):
    for text in ("zürich 漢字 🐶 naïve", "привет мир", "\u0000\u0007\u200d", "".join(map(chr, range(33, 127))).lower()):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.eos_token_id not in ids  # the unknown token
        assert _decode(tokenizer, text).replace(" ", "") == text.replace(" ", "")
    assert len({tokenizer.convert_tokens_to_ids(token) for token in tokenizer.get_vocab()}) == len(tokenizer)


def test_special_tokens_stand_where_clip_has_them(tokenizer):
    start, *_, end = tokenizer("A DOG").input_ids
    assert (start, end) == (len(tokenizer) - 2, len(tokenizer) - 1)
    assert tokenizer("A DOG").input_ids == tokenizer("a dog").input_ids
    assert tokenizer.pad_token_id == end


def test_a_word_the_format_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Ünder"):
        write_tokenizer(tmp_path, ["dog", "Ünder"])


def test_the_example_subjects_are_there_and_small():
    folder = pathlib.Path(__file__).parents[1] / "examples" / "subjects"
    subjects = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("_"))
    assert subjects == ["backpack", "car", "cat", "dog", "robot", "teapot"]
    assert set(subjects) <= set(SUBJECT_NOUNS)
    for subject in subjects:
        pictures = sorted((folder / subject).glob("*.jpg"))
        assert len(pictures) == 5
        assert {Image.open(picture).size for picture in pictures} == {(256, 256)}
    assert sum(picture.stat().st_size for picture in folder.rglob("*.jpg")) < 1_000_000
