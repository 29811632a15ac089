"""The sample command: what it paints, what it writes, what it refuses."""

import shutil

import numpy as np
import pytest
from etils import epath
from PIL import Image
from safetensors.numpy import load_file, save_file
from support.runs import config_of

from dreambooth_jax import sample
from dreambooth_jax.runs.places import check_writable

PROMPTS = ("a sks dog in the snow", "a dog!")


def run(*arguments) -> None:
    sample.main([str(argument) for argument in arguments])


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture(scope="module")
def painted(finished, tmp_path_factory):
    """Three pictures of each of two prompts, from a training run."""
    folder = tmp_path_factory.mktemp("painted")
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    run("--workdir", finished, *prompts, "--count=3", "--seed=5", "--steps=4", "--batch_size=4", "--output", folder)
    return folder


def test_pictures_say_how_they_were_made(painted, finished):
    names = [f"{slug}_{seed}.png" for slug in ("a_dog", "a_sks_dog_in_the_snow") for seed in (5, 6, 7)]
    assert sorted(path.name for path in painted.iterdir()) == sorted([*names, "sheet.png"])
    with Image.open(painted / "a_sks_dog_in_the_snow_6.png") as image:
        assert image.size == (16, 16)
        about = image.text
    assert about["prompt"] == PROMPTS[0] and about["seed"] == "6" and about["model"] == str(finished)
    assert about["sampler"] == "dpm++" and about["steps"] == "4"
    assert about["guidance"] == "2.5"  # as configs/dog.py has it
    images = [pixels(painted / name) for name in names]
    assert min(np.abs(a - b).mean() for i, a in enumerate(images) for b in images[:i]) > 0


def test_the_sheet_shows_every_picture(painted):
    sheet = pixels(painted / "sheet.png")
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (16, 16, 3))[:, :, 0]
    places = []
    for slug in ("a_sks_dog_in_the_snow", "a_dog"):
        for seed in (5, 6, 7):
            found = np.argwhere((windows == pixels(painted / f"{slug}_{seed}.png")).all((-1, -2, -3)))
            assert len(found) == 1
            places.append(tuple(found[0]))
    assert places == sorted(places)  # prompts from top to bottom, seeds from left to right


def test_a_seed_is_its_picture_whatever_is_painted_beside_it(painted, finished, tmp_path):
    run("--workdir", finished, f"--prompt={PROMPTS[1]}", "--count=1", "--seed=7", "--steps=4", "--output", tmp_path)
    alone = pixels(tmp_path / "a_dog_7.png")
    assert np.abs(alone - pixels(painted / "a_dog_7.png")).max() <= 1


def test_prompts_of_one_name_do_not_replace_each_other(micro, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = ("a cat", "A cat!", "a dog", "a dog")
    run(
        "--base",
        micro,
        *(f"--prompt={p}" for p in prompts),
        "--count=1",
        "--steps=2",
        "--guidance=1",
        "--dtype=bfloat16",
    )
    folder = tmp_path / "pictures"
    assert sorted(path.name for path in folder.iterdir()) == [
        "a_cat_1_0.png",
        "a_cat_2_0.png",
        "a_dog_0.png",
        "sheet.png",
    ]
    with Image.open(folder / "a_cat_2_0.png") as image:
        assert image.text["prompt"] == "A cat!" and image.text["model"] == micro


# Tensors before a normalisation, whose sums overflow where the values are near the largest finite number.
BROKEN = {
    "the text encoder (text_encoder)": ("text_encoder/model.safetensors", "position_embedding.weight"),
    "the denoiser (unet)": ("unet/diffusion_pytorch_model.safetensors", "conv_in.bias"),
    "the decoder (vae)": ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.bias"),
}


@pytest.mark.parametrize("part", BROKEN)
def test_no_picture_is_written_of_numbers_that_are_not_finite(micro, tmp_path, part):
    file, ending = BROKEN[part]
    base = shutil.copytree(micro, tmp_path / "base")
    weights = load_file(base / file)
    (name,) = [name for name in weights if name.endswith(ending)]
    weights[name] = np.full_like(weights[name], 3e38)
    save_file(weights, base / file, metadata={"format": "pt"})
    output = tmp_path / "pictures"
    with pytest.raises(SystemExit) as end:
        run("--base", base, "--prompt=a dog", "--count=1", "--steps=2", "--guidance=1", "--output", output)
    assert f"no picture: {part} gave numbers that are not finite" in str(end.value.code)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir={finished}"], "--prompt"),
        (["--prompt=a"], "one of the arguments --workdir --base is required"),
        (["--prompt=a", "--workdir={finished}", "--base={micro}"], "not allowed with argument"),
        (["--prompt=a", "--workdir={finished}", "--count=0"], "expected a whole number above 0"),
        (["--prompt=a", "--workdir={empty}"], "config.json: no such file. Give the --workdir of a run"),
        (["--prompt=a", "--workdir={finished}", "--step=30"], "no checkpoint of step 30; there are 60"),
        (["--prompt=a", "--workdir={unsaved}"], "no checkpoint; none was saved yet"),
        (["--prompt=a", "--base=./nowhere"], "nowhere': no such folder"),
        (["--prompt=a", "--base={micro}", "--resolution=17"], "resolution = 17"),
        (["--prompt=a", "--base={micro}", "--guidance=nan"], "nan: expected a finite number"),
        (["--prompt=a", "--base={micro}", f"--seed={2**32}"], "expected a whole number from 0 to 2^32 - 1"),
        (["--prompt=a\udcff", "--base={micro}"], "expected text in UTF-8"),
    ],
)
def test_errors_name_the_remedy(micro, finished, tmp_path, capsys, arguments, message):
    places = {"micro": micro, "finished": finished, "empty": tmp_path, "unsaved": tmp_path / "unsaved"}
    places["unsaved"].mkdir()
    shutil.copy(finished / "config.json", places["unsaved"])
    with pytest.raises(SystemExit) as end:
        run(*(argument.format(**places) for argument in arguments))
    assert end.value.code not in (0, None)
    assert message in f"{end.value.code}{capsys.readouterr().err}"
    assert not (places["unsaved"] / "checkpoints").exists()


@pytest.mark.parametrize("source", ["base", "workdir"])
@pytest.mark.parametrize(("option", "message"), [("--resolution=15", "15"), ("--steps=5000", "5000")])
def test_settings_are_checked_before_weights_are_read(micro, tmp_path, source, option, message, monkeypatch):
    """Those of a run before its checkpoint too: here there is none."""
    for module in ("families.pipeline", "runs.workdir"):
        monkeypatch.setattr(f"dreambooth_jax.{module}.read_params", lambda *args, **kw: 1 / 0)
    (tmp_path / "config.json").write_text(config_of(tmp_path, base=micro).to_json())
    place = {"base": micro, "workdir": tmp_path}[source]
    with pytest.raises(SystemExit, match=message):
        run(f"--{source}", place, "--prompt=a dog", option, "--output", tmp_path / "pictures")


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    check_writable(epath.Path(tmp_path / "new" / "pictures"))
    with pytest.raises(NotADirectoryError, match="file: not a folder"):
        check_writable(epath.Path(tmp_path / "file" / "pictures"))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=f"{tmp_path}: not writable, where {tmp_path}/new would be written"):
        check_writable(epath.Path(tmp_path / "new"))
