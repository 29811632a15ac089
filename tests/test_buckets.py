"""Aspect-ratio buckets: photos keep about their ratio, and a run of several shapes is as repeatable as any other."""

import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support.runs import (
    assert_same_run,
    assert_same_state,
    checkpoints,
    config_of,
    finish,
    kill_when,
    read_state,
    start,
)

from dreambooth_jax.data.buckets import bucket_sizes, nearest
from dreambooth_jax.data.encode import pictures
from dreambooth_jax.data.images import read_buckets, read_examples
from dreambooth_jax.diffusion.buckets import alike, in_turns
from dreambooth_jax.diffusion.examples import EncodedExamples, TrainingData, draw
from dreambooth_jax.diffusion.loss import Losses
from dreambooth_jax.diffusion.schedulers import process_from_scheduler
from dreambooth_jax.families.pipeline import load_pipeline
from dreambooth_jax.runs import held_out
from dreambooth_jax.runs.config import ConfigError, check_config
from dreambooth_jax.runs.job import data_shapes, key_shape, lower_steps, split_shapes, state_shapes
from dreambooth_jax.runs.plan_text import plan_text
from dreambooth_jax.runs.preemption import Preemption
from dreambooth_jax.runs.setup import set_up, sizes_of
from dreambooth_jax.runs.slices import count_examples
from dreambooth_jax.runs.training import train

OPTIONS = {"template": "a {identifier} {class_noun}", "identifier": "sks", "class_noun": "dog"}


def photo(path, width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    Image.fromarray(noise).resize((width, height)).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three photos lie, one stands; none is square."""
    folder = tmp_path_factory.mktemp("photos")
    for number, size in enumerate([(60, 40), (90, 60), (62, 40), (40, 60)]):
        photo(folder / f"{number}.png", *size, seed=number)
    return folder


# --- shapes


def test_the_shapes_of_sdxl_are_those_of_its_paper():
    """All of ours are in the table of arXiv 2307.01952, appendix I."""
    table = {
        512: (1856, 1920, 1984, 2048),
        576: (1664, 1728, 1792),
        640: (1536, 1600),
        704: (1344, 1408, 1472),
        768: (1280, 1344),
        832: (1152, 1216),
        896: (1088, 1152),
        960: (1024, 1088),
        1024: (1024,),
    }
    paper = {pair for a, others in table.items() for b in others for pair in ((a, b), (b, a))}
    ours = bucket_sizes(1024, 32)
    assert ours[0] == (1024, 1024) and len(ours) == len(set(ours)) > 30
    assert set(ours) <= paper


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 64), (768, 64), (520, 8), (64, 8), (16, 2), (24, 8)])
def test_shapes_have_about_the_area_of_the_square(resolution, multiple):
    sizes = bucket_sizes(resolution, multiple)
    assert sizes[0] == (resolution, resolution) and {(w, h) for h, w in sizes} == set(sizes)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert resolution / 2 <= min(height, width) and max(height, width) <= 2 * resolution
        assert height * width <= resolution**2 < (height + 2 * resolution / 16 + multiple) * (width + resolution)


def test_shapes_are_no_finer_than_a_sixteenth_of_the_square():
    """264 / 16 = 16.5 pixels: the next multiple of 8 is 24."""
    assert {side % 24 for size in bucket_sizes(264, 8)[1:] for side in size} == {0}


def test_the_nearest_shape_is_the_one_that_cuts_least():
    sizes = bucket_sizes(512, 64)
    for height, width in [(3000, 4000), (4000, 3000), (1080, 1920), (500, 500), (510, 500), (100, 1000), (667, 1000)]:
        chosen = nearest(sizes, height, width)

        def lost(size, height=height, width=width):
            scale = max(size[0] / height, size[1] / width)  # the photo just covers the shape
            return 1 - size[0] * size[1] / (height * scale * width * scale)

        assert lost(chosen) <= min(map(lost, sizes)) + 1e-9
        assert nearest(sizes, width, height) == chosen[::-1]
    assert nearest(sizes, 500, 500) == (512, 512)
    for small, large in [((16, 32), (32, 64)), ((32, 16), (64, 32))]:
        assert nearest([small, large], *small) == nearest([large, small], *small) == large


def test_photos_are_resized_and_cropped_to_their_shape(photos, tmp_path):
    buckets = read_buckets(photos, bucket_sizes(64, 8), **OPTIONS)
    assert [part.images.shape for part in buckets] == [(3, 48, 80, 3), (1, 80, 48, 3)]
    assert buckets[0].names == ("0.png", "1.png", "2.png") and buckets[1].names == ("3.png",)
    assert buckets[0].original.tolist() == [[40, 60], [60, 90], [40, 62]]
    # Cropped first: the same middle strip, 36 of 40 rows.
    Image.open(photos / "0.png").crop((0, 2, 60, 38)).save(tmp_path / "cut.png")
    cut = read_buckets(tmp_path, [(48, 80)], **OPTIONS)[0]
    # The filter reaches beyond the crop's edge.
    assert np.abs(cut.images[0].astype(int) - buckets[0].images[0])[4:-4].max() <= 2
    assert buckets[0].crop[0].tolist() == [round(2 * 80 / 60), 0]
    first, second = (part.notes[0] for part in buckets)
    assert "bucket 80 x 48: 3 images, cropped at both ends: 0.png (60 x 40) loses 10 % of its height" in first
    assert second == "bucket 48 x 80: 1 image, cropped at both ends: 3.png (40 x 60) loses 10 % of its width"


def test_photos_of_one_colour_are_named(tmp_path):
    photo(tmp_path / "a.png", 60, 40)
    Image.new("RGB", (40, 40)).save(tmp_path / "b.png")
    assert "of one colour, with nothing to learn: b.png" in read_examples(tmp_path, 16, **OPTIONS).notes


def test_masks_crops_and_mirrors_have_the_shape(tmp_path):
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 5:25] = 255
    picture = Image.merge("RGBA", [Image.fromarray(mask)] * 4)
    picture.save(tmp_path / "a.png")
    options = {"crop": "random", "flip": True, "views": 6, "masked": True}
    (bucket,) = read_buckets(tmp_path, bucket_sizes(64, 8), **OPTIONS, **options)
    assert bucket.images.shape == (6, 48, 80, 3) and bucket.masks.shape == (6, 48, 80)
    assert len({mask.tobytes() for mask in bucket.masks}) == 6
    assert {left for _, left in bucket.crop.tolist()} == {0} and (bucket.crop[:, 0] <= 80 * 40 / 60 - 48).all()


# --- which step takes which


def data(*counts):
    def half(count):
        latents = jnp.zeros((count, 4))
        return EncodedExamples(latents, latents, {"row": jnp.arange(1)}, jnp.zeros(count, jnp.int32))

    return [TrainingData(half(count), None) for count in counts]


def test_a_bucket_may_have_no_turn():
    ordered, bucket = in_turns(data(3, 1, 4), 2, jax.random.key(5), 1)
    assert len(ordered) == 3 and len(bucket) == 1
    assert all(part.order.shape == (1, 2) for part in ordered)


def test_every_photo_is_drawn_equally_often():
    ordered, bucket = in_turns(data(3, 1, 4), 2, jax.random.key(5), 80)
    for begin in range(0, 80, 8):
        assert Counter(bucket[begin : begin + 8].tolist()) == {0: 3, 1: 1, 2: 4}
    assert len({tuple(bucket[begin : begin + 8]) for begin in range(0, 80, 8)}) > 3
    for number, count in enumerate((3, 1, 4)):
        rows = np.asarray(ordered[number].order)[bucket == number].ravel()
        assert Counter(rows.tolist()) == {row: 20 for row in range(count)}
        for begin in range(0, len(rows), count):  # one epoch after the other
            assert sorted(rows[begin : begin + count]) == list(range(count))


def test_one_shape_is_drawn_as_without_buckets():
    (half,) = data(3)
    given, process = half._replace(prior=half.instance), process_from_scheduler({"beta_schedule": "scaled_linear"})
    (ordered,), bucket = in_turns([given], 2, jax.random.key(0), 60)
    assert not bucket.any()
    for step in (0, 7, 59):
        batches = [draw(part, process, 2, jax.random.key(0), jnp.int32(step)) for part in (given, ordered)]
        jax.tree.map(np.testing.assert_array_equal, *batches)


def test_the_bucket_is_a_function_of_seed_and_step():
    longer, first = in_turns(data(2, 3), 4, jax.random.key(0), 60), in_turns(data(2, 3), 4, jax.random.key(0), 33)
    np.testing.assert_array_equal(longer[1][:33], first[1])
    for one, other in zip(longer[0], first[0], strict=True):
        np.testing.assert_array_equal(one.order[:33], other.order)
    assert (in_turns(data(2, 3), 4, jax.random.key(1), 60)[1] != longer[1]).any()
    steps = [alike(longer[1], step) for step in range(60)]
    assert all(len(set(longer[1][s : s + n].tolist())) == 1 for s, n in enumerate(steps))
    assert all(s + n == 60 or longer[1][s + n] != longer[1][s] for s, n in enumerate(steps))


# --- runs


FIELDS = {"buckets": True, "steps": 12, "save_every": 4, "sample_every": 12, "class_batch_size": 4}


@pytest.mark.slow
def test_two_shapes_train_and_go_on_after_a_kill(micro, photos, tmp_path):
    """Killed and resumed, with other steps per call: the same states, pictures and metrics to the last bit."""
    fields = FIELDS | {"base": micro, "instance_images": str(photos), "accumulate": 2, "batch_size": 2}
    text = finish(tmp_path / "whole", **fields)
    assert "buckets: 2 shapes and compiled programs: 20 x 12 (75 % of the steps), 12 x 20 (25 % of the steps)" in text
    killed = start(tmp_path / "killed", **fields | {"steps_per_call": 3})
    saved = lambda: bool(checkpoints(tmp_path / "killed"))  # noqa: E731
    assert kill_when(killed, saved)
    finish(tmp_path / "killed", **fields | {"steps_per_call": 3})
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


LORA = {
    "buckets": True,
    "seed": 2,
    "method": "lora",
    "lora_rank": 2,
    "masked_loss": True,
    "num_class_images": 3,
    "batch_size": 4,
    "steps": 6,
    "save_every": 3,
    "sample_prompts": (),
}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """Cut-out photos of two shapes with captions, and three pictures of the class."""
    folder = tmp_path_factory.mktemp("subject")
    for number, size in enumerate([(60, 40), (90, 60), (62, 40), (40, 60), (60, 90)]):
        place = folder / ("class" if number > 3 else "photos") / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        photo(place, *size, seed=number)
        if number < 4:
            cut_out = Image.open(place)
            opacity = Image.new("L", size)
            opacity.paste(255, (size[0] // 4, 0, size[0], size[1]))
            cut_out.putalpha(opacity)
            cut_out.save(place)
            place.with_suffix(".txt").write_text(f"sks dog, place {number}")
        else:
            photo(folder / "class" / "more.png", 50, 50, seed=7)
            photo(folder / "class" / "wide.png", 80, 40, seed=8)
    return {"instance_images": str(folder / "photos"), "class_images": str(folder / "class")}


@pytest.fixture(scope="module")
def trains(micro, subject):
    """(workdir, devices, fields) -> trains; every different program is compiled once."""
    compiled = {}

    def compile_once(lowered):
        text = lowered.as_text()
        if text not in compiled:
            compiled[text] = lowered.compile()
        return compiled[text]

    def trains(workdir, devices, **fields):
        run = set_up(config_of(workdir, base=micro, **LORA | subject | fields), devices)
        with Preemption() as guard:
            train(run, guard, compile_steps=compile_once)
        return run

    return trains


@pytest.mark.slow
def test_factors_masks_and_a_mesh(trains, tmp_path):
    """LoRA with masks on eight devices: as on one of them; and stopped where the next step has another shape, to the
    last bit as without the stop."""
    spread = {"devices": jax.devices(), "mesh_data": 4, "mesh_fsdp": 2}
    run = trains(tmp_path / "whole", **spread)
    assert [len(part.names) for part in run.examples] == [6, 2]  # two views of each
    _, bucket = in_turns(data(6, 2), 4, jax.random.key(run.config.seed), 16)
    assert bucket[2] != bucket[3]
    for steps in (3, 6):
        trains(tmp_path / "stopped", steps=steps, **spread)
    assert_same_state(read_state(tmp_path / "whole", 6), read_state(tmp_path / "stopped", 6))
    assert (tmp_path / "whole" / "metrics.csv").read_text() == (tmp_path / "stopped" / "metrics.csv").read_text()
    trains(tmp_path / "one", jax.devices()[:1], mesh_data=1, mesh_fsdp=1)
    spread_out, alone = (np.loadtxt(tmp_path / name / "metrics.csv", delimiter=",", skiprows=1) for name in NAMES)
    np.testing.assert_allclose(spread_out, alone, rtol=1e-3)


NAMES = ("whole", "one")


def test_held_out_photos_keep_their_shapes(micro, photos, tmp_path, monkeypatch):
    """A shape of held-out photos alone is no program of the training."""
    fields = {"buckets": True, "held_out_images": "2", "evaluate_every": 60, "prior_preservation": False}
    config = config_of(tmp_path / "run", base=micro, instance_images=str(photos), **fields)
    run = set_up(config, jax.devices()[:1])
    assert [(part.images.shape[1:3], set(part.names)) for part in run.examples] == [((12, 20), {"0.png", "1.png"})]
    assert [(part.images.shape, part.names) for part in run.held_out] == [
        ((1, 12, 20, 3), ("2.png",)),
        ((1, 20, 12, 3), ("3.png",)),
    ]
    assert "held out: 2.png, 3.png: for loss" in plan_text(run, 0)
    with pytest.raises(ConfigError, match="leaves none of 4 photos"):
        set_up(
            config_of(tmp_path / "none", base=micro, instance_images=str(photos), **fields | {"held_out_images": "4"})
        )
    # Every photo counts alike in the loss.
    constant = lambda job, size, draws: lambda *_: Losses(*jnp.asarray([size[0], 0, draws], jnp.float32))  # noqa: E731
    monkeypatch.setattr(held_out, "make_loss", constant)
    loss = held_out.mean_loss(run.job, [((2, 2), data(1)[0]), ((6, 2), data(3)[0])])({}, {}, jax.random.key(0))
    assert (loss.loss, loss.prior) == (5.0, held_out.DRAWS * (1 / 16 + 9 / 16))


@pytest.mark.slow
def test_losses_of_held_out_photos_in_a_shape_that_does_not_train(trains, tmp_path):
    """Such a shape has class images of its own."""
    fields = {"held_out_images": "2", "evaluate_every": 3, "sample_every": 3, "mesh_data": 1, "mesh_fsdp": 1}
    run = trains(tmp_path / "run", jax.devices()[:1], **fields)
    assert [part.names for part in run.held_out] == [("2.png",), ("3.png",)] and len(run.examples) == 1
    header, *rows = (line.split(",") for line in (tmp_path / "run" / "scores.csv").read_text().splitlines())
    assert header == ["step", "held-out loss", "class loss"] and [row[0] for row in rows] == ["0", "3", "6"]
    values = np.array(rows, float)
    assert (values[:, 1:] > 0).all() and (values[1:, 1:] != values[0, 1:]).all()


@pytest.mark.slow
def test_squares_train_as_without_buckets(micro, tmp_path):
    """Square photos alone: one shape, the same examples, and the very program of `buckets=False`."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        photo(folder / f"{number}.png", 48, 48, seed=number)
    on, off = (
        set_up(config_of(tmp_path / "run", base=micro, instance_images=str(folder), buckets=buckets), jax.devices()[:1])
        for buckets in (True, False)
    )
    for name, one, other in zip(on.examples[0]._fields, on.examples[0], off.examples[0], strict=True):
        assert name == "notes" or np.array_equal(one, other), name
    trainable, frozen = split_shapes(on.job)
    arguments = state_shapes(on.job, trainable), frozen, data_shapes(on.job, 3, 10), key_shape(on.job)
    assert lower_steps(on.job, *arguments, *sizes_of(on)).as_text() == lower_steps(off.job, *arguments).as_text()


def test_a_photo_knows_its_sizes(micro, photos):
    """SDXL's conditions: original size, corner of the crop, size after it."""
    pipeline = load_pipeline(micro)
    known = [pictures(pipeline, part) for part in read_buckets(photos, bucket_sizes(64, 8), **OPTIONS)]
    assert known[0].original.tolist() == [[40, 60], [60, 90], [40, 62]] and known[1].original.tolist() == [[60, 40]]
    assert [part.target[0].tolist() for part in known] == [[48, 80], [80, 48]]
    assert known[0].crop[0].tolist() == [3, 0] and known[1].crop[0].tolist() == [0, 3]


def test_the_plan_names_shapes_and_crops(micro, photos, tmp_path):
    run = set_up(config_of(tmp_path / "run", base=micro, instance_images=str(photos), buckets=True), jax.devices()[:1])
    text = plan_text(run, 0)
    assert "4 images in" in text and "2 shapes and compiled programs" in text
    assert "class images are cropped to the shape of their step" in text
    assert "photos: bucket 20 x 12: 3 images, cropped at random ends: 0.png (60 x 40) loses" in text
    assert "photos: bucket 12 x 20: 1 image" in text


@pytest.mark.parametrize("buckets", [False, True])
def test_plans_count_what_trains(micro, photos, tmp_path, buckets):
    """Repeats of kohya's folders, views, templates and shapes."""
    shutil.copytree(photos, tmp_path / "photos" / "2_sks dog")
    shutil.copytree(photos, tmp_path / "photos" / "1_sks dog in snow")
    config = config_of(tmp_path / "run", base=micro, instance_images=str(tmp_path / "photos"), buckets=buckets)
    run = set_up(config, jax.devices()[:1])
    counts, text = count_examples(run.job)
    assert counts == {part.images.shape[1:3]: len(part.captions) for part in run.examples}
    assert sum(counts.values()) == 2 * (2 * 4 + 4)
    assert text == (
        "6 of 20 x 12, 2 of 12 x 20: 2 programs, of which that of 20 x 12 is compiled here" if buckets else "8"
    )
    run.job.config.instance_images = str(tmp_path / "none")
    counts, text = count_examples(run.job)
    assert counts == {(16, 16): 10} and text.startswith("5 assumed: No image folder")


def test_what_has_no_buckets_says_so(micro, tmp_path):
    with pytest.raises(ConfigError, match=r"buckets = True: the stages of a cascade"):
        set_up(config_of(tmp_path / "run", base=micro, buckets=True, stages=("another",)), jax.devices()[:1])
    with pytest.raises(ConfigError, match="buckets: not implemented for many subjects at once"):
        check_config(config_of(tmp_path, buckets=True, subjects="folder", method="lora"))
