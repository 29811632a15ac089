"""What is exported paints elsewhere what it paints here."""

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.painting import painted_by_diffusers, painted_by_sample
from support.runs import config_of

from dreambooth_jax import export
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.families.pipeline import load_pipeline, read_params, save_pipeline
from dreambooth_jax.files.safetensors import save_tensors
from dreambooth_jax.files.stream import as_tensor, write_tensors
from dreambooth_jax.files.weight_files import WeightsError
from dreambooth_jax.runs.export_checks import check_output, title_of, written_by
from dreambooth_jax.runs.exports import check_reopened
from dreambooth_jax.runs.workdir import open_run


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    export.main(["--workdir", str(finished), "--output", str(folder)])
    return folder


@pytest.mark.slow
def test_diffusers_paints_what_sample_paints(exported, finished, micro, tmp_path):
    ours = painted_by_sample(tmp_path / "run", "--workdir", str(finished))
    assert np.abs(painted_by_diffusers(exported) - ours).max() <= 2e-3 + 0.5 / 255  # half a grey level of the PNG
    # Not the base's pictures; and the folder is a base itself.
    assert np.abs(painted_by_diffusers(micro) - ours).max() > 0.02
    again = painted_by_sample(tmp_path / "export", "--base", str(exported))
    assert np.abs(again - ours).max() <= 1 / 255


def test_the_export_holds_the_runs_weights_to_the_last_bit(exported, finished):
    _, _, params = open_run(finished, make_mesh())
    found = read_params(load_pipeline(str(exported)))
    assert found.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(found[name], value)


def test_others_may_read_the_files(exported):
    (exported / "plain").touch()
    modes = {path.stat().st_mode for path in exported.rglob("*.safetensors")}
    assert modes == {(exported / "plain").stat().st_mode}


@pytest.mark.slow
def test_half_precision(exported, finished, tmp_path):
    export.main(["--workdir", str(finished), "--output", str(tmp_path), "--dtype", "float16"])
    full, half = (read_params(load_pipeline(str(folder))) for folder in (exported, tmp_path))
    for name, value in full.items():
        np.testing.assert_array_equal(half[name], np.asarray(value).astype(np.float16))
    sizes = [sum(path.stat().st_size for path in folder.rglob("*.safetensors")) for folder in (exported, tmp_path)]
    assert sizes[1] < 0.7 * sizes[0]
    assert np.abs(painted_by_diffusers(tmp_path) - painted_by_diffusers(exported)).max() < 0.1


def test_errors(finished, tmp_path):
    for arguments, message in (
        ((tmp_path, tmp_path / "out"), "config.json: no such file"),
        ((finished, tmp_path / "file"), "file"),
    ):
        (tmp_path / "file").touch()
        with pytest.raises(SystemExit, match=message):
            export.main(["--workdir", str(arguments[0]), "--output", str(arguments[1])])


def test_the_runs_own_base_is_not_overwritten(micro, tmp_path):
    """In its folder, under another name of it, or in the file that it is."""
    (tmp_path / "link").symlink_to(micro)
    for output in (micro, f"{micro}/unet", tmp_path / "link" / "new"):
        with pytest.raises(ValueError, match="lies in the run's own base"):
            check_output(output, micro)
    file = tmp_path / "one.safetensors"
    save_file({"model.diffusion_model.x": np.zeros(1, np.float32)}, file)
    with pytest.raises(ValueError, match="lies in the run's own base"):
        check_output(file, f"{file}@{micro}")
    check_output(tmp_path / "out", micro)


@pytest.mark.parametrize("kind", ["kohya", "peft", "embedding", None])
def test_the_files_that_a_run_began_with_are_not_overwritten(micro, tmp_path, kind):
    """Whether --output names them, or the folder that the export's file of that name lies in."""
    config = config_of(tmp_path, base=micro, method="pivotal")
    token = tmp_path / "sks_dog_token.safetensors"
    for output in (tmp_path, tmp_path / "sks_dog.safetensors"):
        for own in {*written_by(config, output, kind, 0), *([token] if kind is None else [])}:
            with pytest.raises(ValueError, match=f"would overwrite {own}, an adapter or embedding"):
                check_output(output, micro, [str(own)], written_by(config, output, kind, 0))
    check_output(tmp_path, micro, [str(tmp_path / "sks_cat.safetensors")], written_by(config, tmp_path, kind, 0))


def test_weights_of_an_earlier_export_are_not_left_beside_new_ones(sd15, tmp_path):
    """A plain set hides a variant, and an index its file: readers would take the old weights."""
    names = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}
    for part, name in (("unet", ".fp16"), ("unet", "-00001-of-00002"), ("text_encoder", ".bf16")):
        folder = tmp_path / name
        other = folder / part / f"{names[part]}{name}.safetensors"
        other.parent.mkdir(parents=True)
        other.touch()
        with pytest.raises(WeightsError, match=f"{part} holds weights of an earlier model, {other.name}: .* Remove"):
            save_pipeline(sd15.pipeline, sd15.params, folder)
        assert [path for path in folder.rglob("*") if path.is_file()] == [other]


def test_a_new_tokens_brackets_are_in_no_file_name(tmp_path):
    assert title_of(config_of(tmp_path, identifier="<sks>", class_noun="toy dog")) == "sks_toy_dog"


def test_numbers_too_large_for_a_file_are_not_written(tmp_path):
    for write in (save_tensors, lambda path, x, dtype: write_tensors(path, {"a": as_tensor(x["a"])}, dtype=dtype)):
        with pytest.raises(WeightsError, match=r"a has numbers up to 7e\+04, too large for float16"):
            write(tmp_path / "a.safetensors", {"a": np.float32([1, -7e4])}, dtype="float16")
        assert not (tmp_path / "a.safetensors").exists()
        write(tmp_path / "b.safetensors", {"a": np.float32([1, -6e4])}, dtype="float16")


def test_an_export_with_other_numbers_is_no_export(tmp_path):
    value = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    half = value.astype(np.float16)
    assert 0 < check_reopened({"a": half}, {"a": value}, "float16", tmp_path) < 1e-3
    assert check_reopened({"a": value + 1}, {"a": value}, None, tmp_path) == pytest.approx(1)
    base = {"a": value - 0.1}  # of an adapter the change must be there
    assert check_reopened({"a": value + 1e-3}, {"a": value}, "float32", tmp_path, base) < 2e-3
    for found, dtype, of in ((half, "float32", None), (base["a"], "float32", base), (value * np.inf, None, None)):
        with pytest.raises(ValueError, match=r"opened again, a differs by up to .* do not use this export"):
            check_reopened({"a": found}, {"a": value}, dtype, tmp_path, of)
