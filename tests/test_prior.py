"""Class images: each a function of its number, made once, and the person's own are as good."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save, save_file
from support.runs import config_of

from dreambooth_jax.data.class_folders import MARK, class_folders
from dreambooth_jax.data.class_images import (
    MOST,
    agreed,
    class_images_to_paint,
    damaged_class_images,
    describe_class_images,
    missing_class_images,
    paint_class_images,
    paint_missing,
    read_class_images,
)
from dreambooth_jax.devices.sharding import make_mesh, replicated
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.files.digest import parts_digests, weights_digest
from dreambooth_jax.files.weight_files import WeightsError
from dreambooth_jax.painting.painter import make_painter
from dreambooth_jax.painting.sheets import save_png
from dreambooth_jax.runs.config import FIELDS
from dreambooth_jax.runs.plan_text import plan_text
from dreambooth_jax.runs.setup import set_up

DIGEST = "0123456789abcdef" * 2
ABOUT = {"model": "micro", "model_digest": DIGEST, "sampler": "ddim"}


class Prior:
    """Paints class images of the micro base on some of the eight devices."""

    def __init__(self, base: str, devices: int, batch_size: int):
        mesh = make_mesh(devices, 1, jax.devices()[:devices])
        pipeline = load_pipeline(base)
        self.params = jax.device_put(read_params(pipeline), replicated(mesh))
        self.batch_size = batch_size
        self.painter = make_painter(
            pipeline, mesh, resolution=16, batch_size=batch_size, sampler="ddim", steps=3, guidance=3.0
        )

    def paint(self, folder, numbers, painter=None):
        paint_class_images(
            folder,
            numbers,
            painter or self.painter,
            self.params,
            prompt="a photo of dog",
            seed=7,
            batch_size=self.batch_size,
            metadata=ABOUT,
        )

    def cut_off(self, after: int):
        """A painter whose process is killed after so many pictures."""

        def paint(params, requests, all_processes):
            for count, painted in enumerate(self.painter(params, requests, all_processes)):
                if count == after:
                    raise KeyboardInterrupt
                yield painted

        return paint


@pytest.fixture(scope="module")
def prior(micro):
    return Prior(micro, devices=1, batch_size=4)


@pytest.fixture(scope="module")
def complete(prior, tmp_path_factory):
    """Ten class images painted in one go."""
    folder = tmp_path_factory.mktemp("complete")
    prior.paint(folder, missing_class_images(folder, 10))
    return folder


def pixels(folder) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))])


def test_pictures_are_named_told_and_different(complete):
    assert [path.name for path in sorted(complete.iterdir())] == [f"class_{n:05d}.png" for n in range(10)]
    with Image.open(complete / "class_00003.png") as image:
        assert image.size == (16, 16)
        assert image.text == {"prompt": "a photo of dog", "seed": "fold_in(7, 3)", **ABOUT}
    images = pixels(complete)
    assert min(np.abs(a - b).mean() for i, a in enumerate(images) for b in images[:i]) > 5
    assert images.std() > 5


@pytest.mark.parametrize(("devices", "batch_size"), [pytest.param(8, 16, marks=pytest.mark.slow), (1, 1)])
def test_a_picture_is_the_same_in_any_batch_on_any_devices(micro, complete, tmp_path, devices, batch_size):
    Prior(micro, devices, batch_size).paint(tmp_path, list(range(10)))
    assert np.abs(pixels(tmp_path) - pixels(complete)).max() <= 1


def test_an_interrupted_run_makes_what_is_missing_and_ends_equal_to_the_last_bit(prior, complete, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prior.paint(tmp_path, missing_class_images(tmp_path, 10), prior.cut_off(6))
    (tmp_path / "class_00001.png").unlink()
    made = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert sorted(made) == [f"class_{n:05d}.png" for n in (0, 2, 3, 4, 5)]
    missing = missing_class_images(tmp_path, 10)
    assert missing == [1, 6, 7, 8, 9]
    prior.paint(tmp_path, missing)
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in made.items())
    assert missing_class_images(tmp_path, 10) == []
    for path in complete.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def own(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.effect_noise((20, 30), 60).convert("RGB").save(folder / name)
    return folder


def test_a_persons_own_images_count(prior, complete, tmp_path):
    folder = own(tmp_path / "mixed", "rex.jpg", "fido.png", "class.png", "my_class_00003.png")
    (folder / "notes.md").write_text("not a picture")
    (folder / ".class_00000.png.12.partial").write_bytes(b"half")
    assert missing_class_images(folder, 4) == [] and missing_class_images(folder, 3) == []
    assert missing_class_images(folder, 6) == [0, 1]
    prior.paint(folder, [0, 1])
    assert missing_class_images(folder, 6) == []
    assert (folder / "class_00001.png").read_bytes() == (complete / "class_00001.png").read_bytes()
    assert missing_class_images(tmp_path / "not there", 3) == [0, 1, 2]


def test_numbers_of_class_images_have_five_digits(tmp_path):
    """More than there are numbers for are refused, and a file of a higher number is a person's."""
    assert agreed([0, MOST - 1]) == [0, MOST - 1]
    assert FIELDS["num_class_images"].check(MOST) and not FIELDS["num_class_images"].check(MOST + 1)
    (tmp_path / f"class_{MOST}.png").write_bytes(b"damaged")
    assert damaged_class_images(tmp_path, "a dog", "digest") == []
    assert missing_class_images(tmp_path, 3) == [0, 1]


def test_more_than_were_asked_for_are_used(complete, tmp_path, micro):
    config = config_of(tmp_path, base=micro, resolution=16, num_class_images=3, class_images=str(complete))
    assert missing_class_images(complete, 3) == []
    assert len(read_class_images(config).images) == 10


def test_another_prompt_or_base_is_found_out(complete, tmp_path):
    assert damaged_class_images(complete, "a photo of dog", DIGEST) == []
    # It says nothing of itself.
    assert damaged_class_images(own(tmp_path / "own", "rex.png", "class_00000.png"), "a photo of cat", DIGEST) == []
    with pytest.raises(ValueError, match=r"another prompt than 'a photo of cat'.*class_00000\.png.*--config"):
        damaged_class_images(complete, "a photo of cat", DIGEST)
    with pytest.raises(ValueError, match=r"class_00000\.png of another base, micro"):
        damaged_class_images(complete, "a photo of dog", "0" * 32)


def test_black_and_truncated_pictures_are_painted_again(prior, complete, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(complete, folder)
    cut = folder / "class_00002.png"
    cut.write_bytes(cut.read_bytes()[:-200])
    (folder / "class_00007.png").write_bytes(b"")
    with Image.open(folder / "class_00004.png") as image:
        save_png(folder / "class_00004.png", np.zeros((16, 16, 3), np.uint8), image.text)
    assert damaged_class_images(folder, "a photo of dog", DIGEST) == [2, 4, 7]
    prior.paint(folder, [2, 4, 7])
    assert np.array_equal(pixels(folder), pixels(complete))


def test_a_base_that_paints_black_is_named_and_nothing_is_saved(prior, tmp_path):
    def paint(params, requests, all_processes):
        yield from ((number, np.zeros((16, 16, 3), np.uint8)) for number in range(len(requests)))

    with pytest.raises(ValueError, match=r"class image 0 is black.*not finite"):
        prior.paint(tmp_path, [0, 1], paint)
    assert list(tmp_path.iterdir()) == []


def test_a_named_folder_must_hold_images_or_be_made_on_purpose(tmp_path):
    def folders(**fields):
        return class_folders(config_of(tmp_path / "run", **fields))

    painted = tmp_path / "run" / "class_images"
    assert folders() == (painted,)
    (tmp_path / "empty").mkdir()
    own(tmp_path / "reg", "notes.md.png").rename(tmp_path / "empty" / "1_dog")
    (tmp_path / "empty" / "0_nothing").mkdir()
    for name, state in [
        ("nowhere", "does not exist"),
        ("empty", r"holds no images itself, but its subfolders do: 1_dog\."),
    ]:
        with pytest.raises(ValueError, match=rf"{name}.*{state}.*create_class_images"):
            folders(class_images=str(tmp_path / name))
        shared = tmp_path / name
        assert folders(class_images=str(shared), create_class_images=True) == (shared,)
    assert folders(class_images=str(tmp_path / "empty" / "1_dog")) == (tmp_path / "empty" / "1_dog", painted)
    (tmp_path / "empty" / MARK).write_text("{}")
    assert folders(class_images=str(tmp_path / "empty")) == (tmp_path / "empty",)


def test_what_a_persons_folder_lacks_is_painted_into_the_workdir(prior, micro, tmp_path):
    folder = own(tmp_path / "mine", "rex.jpg", "fido.png", "bello.png")
    config = config_of(
        tmp_path / "run", base=micro, resolution=16, num_class_images=5, class_images=str(folder), class_batch_size=4
    )
    numbers = class_images_to_paint(config, DIGEST)
    assert numbers == [0, 1]
    paint_missing(config, numbers, prior.painter, prior.params, DIGEST)
    assert sorted(path.name for path in folder.iterdir()) == ["bello.png", "fido.png", "rex.jpg"]
    assert class_images_to_paint(config, DIGEST) == []
    examples = read_class_images(config)
    assert examples.names == ("bello.png", "fido.png", "rex.jpg", "class_00000.png", "class_00001.png")
    assert "3 images in" in describe_class_images(config, 0) and "2 images in" in describe_class_images(config, 0)
    with pytest.raises(ValueError, match="another base"):
        class_images_to_paint(config, "0" * 32)


def test_the_plan_names_what_the_folder_of_class_images_holds_besides(micro, tmp_path):
    folder = own(tmp_path / "mine", "rex.jpg", "fido.png")
    own(folder / "more", "bello.png")
    (folder / "fido.ARW").write_bytes(b"?")
    run = set_up(
        config_of(tmp_path / "run", base=micro, num_class_images=2, class_images=str(folder)), jax.devices()[:1]
    )
    lines = [line.strip() for line in plan_text(run, done=0).splitlines() if line.startswith("   class: ")]
    assert lines == [
        "class: not used: more/: a subfolder with 1 images; subfolders are not searched",
        "class: not used: fido.ARW: ARW; the JPEG, PNG or WebP of that name is read",
    ]


@pytest.mark.parametrize("colour", ["black", "white"])
def test_own_class_images_that_show_nothing_are_named(micro, tmp_path, colour):
    folder = own(tmp_path / "mine", "rex.jpg")
    Image.new("RGB", (20, 30), colour).save(folder / "empty.png")
    config = config_of(tmp_path / "run", base=micro, resolution=16, class_images=str(folder))
    with pytest.raises(ValueError, match=r"(?s)class images show nothing:\n  empty\.png: one colour\n"):
        class_images_to_paint(config, DIGEST)


def test_one_flipped_bit_changes_the_digest_of_all_bytes(tmp_path):
    """Where samples do not look; the division into files does not count."""
    weights = {name: np.random.default_rng(0).normal(size=(100, 100)).astype(np.float32) for name in "ab"}
    for folder in ("one", "two", "flipped"):
        (tmp_path / folder / "unet").mkdir(parents=True)
    save_file(weights, tmp_path / "one" / "unet" / "model.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in weights}}
    for name, value in weights.items():
        save_file({name: value}, tmp_path / "two" / "unet" / f"{name}.safetensors")
    (tmp_path / "two" / "unet" / "model.safetensors.index.json").write_text(json.dumps(index))
    weights["b"].view(np.uint32)[25, 50] ^= 1
    save_file(weights, tmp_path / "flipped" / "unet" / "model.safetensors")
    one, two, flipped = (parts_digests(tmp_path / name, ["unet"]) for name in ("one", "two", "flipped"))
    assert one == two != flipped and one.keys() == {"unet"}
    assert weights_digest(tmp_path / "flipped", ["unet"]) == weights_digest(tmp_path / "one", ["unet"])


CUT_OFF = save({"a": np.zeros(1000, np.float32)})[:-1]


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0", b"", b"\x02" + bytes(7), CUT_OFF]
)
def test_files_that_are_no_weights_are_named(tmp_path, content):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.safetensors").write_bytes(content)
    for digest in (weights_digest, parts_digests):
        with pytest.raises(WeightsError, match=r"model\.safetensors: not a readable.*Download it again") as error:
            digest(tmp_path, ["unet"])
        assert ("Git LFS" in str(error.value)) == content.startswith(b"version")


def test_the_digest_of_weights_knows_values_and_not_files(micro, tmp_path):
    parts = ("unet", "vae", "text_encoder")
    digest = weights_digest(Path(micro), parts)
    copied = tmp_path / "copy"
    shutil.copytree(micro, copied)
    assert weights_digest(copied, parts) == digest
    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    half = len(tensors) // 2
    names = sorted(tensors)
    shards = {"a.safetensors": names[:half], "b.safetensors": names[half:]}
    for shard, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, file.parent / shard)
    index = {"weight_map": {name: shard for shard, inside in shards.items() for name in inside}}
    file.unlink()
    (file.parent / f"{file.name}.index.json").write_text(json.dumps(index))
    assert weights_digest(copied, parts) == digest
    tensors[names[0]].flat[-1] += 1
    save_file({name: tensors[name] for name in names[:half]}, file.parent / "a.safetensors")
    assert weights_digest(copied, parts) != digest
