"""Scores of pictures whose answers are known, tables of one protocol, and the data set's layout."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.evaluation import dataset, prompts, table
from dreambooth_jax.evaluation.features import ImageFeatures, TextFeatures
from dreambooth_jax.evaluation.judge import Judge, embedded_judge
from dreambooth_jax.evaluation.metrics import Interval
from dreambooth_jax.evaluation.scores import Painted, Scores, background, best, copy_limit, read_scores, score
from dreambooth_jax.evaluation.table import Quoted, Row

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def plain(*colours, frame=None):
    """A picture of 16 x 16 in one mixed colour, with a frame of another."""
    picture = np.full((16, 16, 3), np.mean([COLOURS[c] for c in colours], 0), np.uint8)
    if frame:
        inside = picture[4:-4, 4:-4].copy()
        picture[:] = COLOURS[frame]
        picture[4:-4, 4:-4] = inside
    return picture


def unit(rows):
    rows = np.asarray(rows, np.float32) + 1e-6
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def middles(pictures):
    return unit([p[8, 8] for p in pictures])


JUDGE = Judge(
    subject=ImageFeatures("the middle's colour", middles),
    image=ImageFeatures("the mean colour", lambda pictures: unit([p.mean((0, 1)) for p in pictures])),
    text=TextFeatures("colours", lambda texts: unit([COLOURS[text.split()[1]] for text in texts])),
    look=ImageFeatures("the middle's colour", middles),
    title="colours",
)


def painted(rows, photos=None, **kw):
    photos = photos or [plain("red"), plain("red", "green")]
    defaults = {"of_class": [plain("green")] * 2, "of_class_before": [plain("green")] * 2, "class_text": "a green"}
    return Painted(photos=photos, rows=rows, texts=["a red", "a blue"][: len(rows)], **defaults | kw)


def test_scores_of_pictures_that_are_as_wanted():
    found = score(JUDGE, painted([[plain("red")] * 2, [plain("blue"), plain("red")]]))
    half = 0.5**0.5  # of red and yellow
    assert found.per_prompt["DINO"] == pytest.approx([(1 + half) / 2, (1 + half) / 4], abs=1e-3)
    assert found.per_prompt["CLIP-T"] == pytest.approx([1, 0.5], abs=1e-3)
    assert found.per_prompt["DIV"] == pytest.approx([0, 2], abs=1e-3)
    assert found.bound["DINO"] == pytest.approx(half, abs=1e-3)
    assert found.values["PRES"].mean == pytest.approx(half / 2, abs=1e-3)
    assert found.values["class CLIP-T"].mean == pytest.approx(1, abs=1e-3)
    assert found.values["drift"].mean == pytest.approx(0, abs=1e-3)
    assert found.values["DINO"].mean == pytest.approx(np.mean(found.per_prompt["DINO"]))
    assert read_scores(json.loads(json.dumps(found.json()))) == found


def test_a_copy_is_suspected_and_shown_beside_its_photo():
    found = score(JUDGE, painted([[plain("red"), plain("blue")]]))
    first = found.copies[0]
    assert (first.prompt, first.picture, first.photo) == (0, 0, 0) and first.similarity == pytest.approx(1, abs=1e-4)
    assert found.limit == pytest.approx(1, abs=1e-3) and found.suspicious == 0.5
    assert found.values["copy"].mean == pytest.approx(1, abs=1e-4)


def test_a_class_that_has_become_the_subject_drifts_and_a_background_of_the_photos_leaks():
    photos = [plain("red", frame="blue"), plain("red", "green", frame="blue")]
    taken = [plain("red", frame="blue")] * 2
    found = score(JUDGE, painted([[plain("red", frame="green")] * 2], photos))
    leaking = score(JUDGE, painted([taken], photos, of_class=taken))
    assert found.values["leak"].mean == pytest.approx(0, abs=0.01) and leaking.values["leak"].mean > 0.9
    assert found.values["drift"].mean == pytest.approx(0, abs=1e-3) and leaking.values["drift"].mean > 0.9
    assert leaking.values["PRES"].mean > found.values["PRES"].mean + 0.4


def test_the_best_step_follows_prompts_and_copies_nothing():
    def found(dino, clip_t, copy):
        values = {"DINO": dino, "CLIP-T": clip_t, "copy": copy}
        return Scores({name: Interval(v, v, v) for name, v in values.items()}, {}, {}, 0.8, 0.0, [])

    steps = {
        100: found(0.5, 0.30, 0.6),
        200: found(0.7, 0.29, 0.7),
        300: found(0.8, 0.29, 0.95),
        400: found(0.9, 0.2, 0.7),
    }
    assert best(steps, max_prompt_loss=0.02, max_copy=0.0) == 200
    assert best(steps, max_prompt_loss=0.02, max_copy=0.99) == 300
    assert best(steps, max_prompt_loss=0.2, max_copy=0.0) == 400
    assert best(steps, max_prompt_loss=0.2, max_copy=0.1) is None


def test_the_background_keeps_nothing_of_the_middle():
    framed, other = plain("red", frame="blue"), plain("green", frame="blue")
    np.testing.assert_array_equal(background(framed), background(other))
    np.testing.assert_array_equal(background(framed)[0], framed[0])


def test_a_table_holds_one_protocol_and_rules_quoted_rows_off():
    rows = [Row("ours", "A", {"DINO": Interval(0.5, 0.4, 0.6), "PRES": 0.3})]
    paper = Quoted("the paper, another protocol", {"Imagen": {"DINO": 0.696}})
    text = table.markdown(rows, ["DINO", "PRES"], paper)
    lines = text.splitlines()
    assert lines[2] == "| ours | 0.500 [0.400, 0.600] | 0.300 |"
    assert lines[3:5] == ["| **the paper, another protocol** |  |  |", "| Imagen | 0.696 |  |"]
    assert lines[-1] == "Protocol: A."
    assert table.as_json(rows, paper)["quoted"]["rows"]["Imagen"] == {"DINO": 0.696}
    with pytest.raises(ValueError, match="one protocol, got 2:\n  A\n  B"):
        table.markdown([*rows, Row("theirs", "B", {})], ["DINO"])


def test_the_data_sets_layout(tmp_path, monkeypatch):
    (tmp_path / "prompts_and_classes.txt").write_text(
        "Classes\n\nsubject_name,class\nduck_toy,toy\nwolf_plushie,stuffed animal\nvase,vase\n\nPrompts\n\n['x']\n"
    )
    for name in ("vase", "wolf_plushie"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 6)).save(tmp_path / name / "00.jpg")
    found = [(subject.name, subject.class_noun) for subject in dataset.read_dataset(tmp_path)]
    assert found == [("wolf_plushie", "stuffed animal"), ("vase", "vase")]
    assert [photo.shape for photo in dataset.read_photos(tmp_path / "vase")] == [(6, 8, 3)]
    data = (tmp_path / "vase" / "00.jpg").read_bytes()
    (tmp_path / "vase" / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "vase" / "text.jpg").write_bytes(b"a text")
    with monkeypatch.context() as limit:
        limit.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        with pytest.raises(ValueError, match=r"(?s)3 of 3 images.*00\.jpg: Decompression.*cut\.jpg.*text\.jpg: not a"):
            dataset.read_photos(tmp_path / "vase")
    with pytest.raises(ValueError, match=r"(?s)2 of 3 images.*cut\.jpg.*text\.jpg: not a"):
        dataset.read_photos(tmp_path / "vase")
    (tmp_path / "vase").rename(tmp_path / "jar")
    with pytest.raises(ValueError, match="no class for jar"):
        dataset.read_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="give the folder `dataset`"):
        dataset.read_dataset(tmp_path / "jar")


def test_prompts_without_the_identifier():
    assert prompts.class_only("a {identifier} {class_noun} in the snow", "dog") == "a dog in the snow"
    assert {len(prompts.paper_prompts(noun)) for noun in ("dog", "teapot")} == {25} == {len(prompts.WORLD)}
    assert prompts.paper_prompts("dog") != prompts.paper_prompts("teapot")


@pytest.mark.slow
def test_photos_are_no_copies_of_each_other_and_photos_again_are():
    """On the example subjects: each photo beside the others of its subject, and each stored again as a poor JPEG. The
    largest cosine of two photos alone would suspect 2 of 5: the most similar pair of 5 holds a given photo so often."""
    judge = embedded_judge(make_mesh())
    suspected, found, by_pairs = [], [], []
    for folder in sorted(path for path in Path("examples/subjects").iterdir() if path.is_dir()):
        photos = dataset.read_photos(folder)
        features, limit = judge.subject.of(photos), copy_limit(judge, photos)
        for number, photo in enumerate(photos):
            others = [i for i in range(len(photos)) if i != number]
            cosine = (features[others] @ features[number]).max()
            suspected.append(cosine >= copy_limit(judge, [photos[i] for i in others]))
            by_pairs.append(cosine > np.triu(features[others] @ features[others].T, k=1).max())
            buffer = io.BytesIO()
            Image.fromarray(photo).save(buffer, "JPEG", quality=30)
            again = judge.subject.of([np.asarray(Image.open(buffer))])
            found.append((features @ again[0]).max() >= limit)
    assert np.mean(suspected) < 0.15 and np.mean(found) > 0.9
    assert np.mean(by_pairs) == pytest.approx(0.4, abs=0.05)
