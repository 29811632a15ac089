"""What is exported paints elsewhere what it paints here."""

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.painting import painted_by_diffusers, painted_by_sample

from dreambooth_jax import export
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.families.pipeline import load_pipeline, read_params
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
            export.check_output(str(output), micro)
    file = tmp_path / "one.safetensors"
    save_file({"model.diffusion_model.x": np.zeros(1, np.float32)}, file)
    with pytest.raises(ValueError, match="lies in the run's own base"):
        export.check_output(str(file), f"{file}@{micro}")
    export.check_output(str(tmp_path / "out"), micro)
