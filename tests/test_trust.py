"""Damaged state is found and survived; a run goes on only with the config and the data that it was begun with."""

import json
import os
import random
import re
import shutil
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.runs import ROOT, config_of, read_state

from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.diffusion.step import TrainState
from dreambooth_jax.families.pipeline import read_params
from dreambooth_jax.runs import checkpoint
from dreambooth_jax.runs.checkpoint import DamagedCheckpoint
from dreambooth_jax.runs.config import ConfigError
from dreambooth_jax.runs.plan_text import plan_text
from dreambooth_jax.runs.preemption import Preemption
from dreambooth_jax.runs.setup import set_up
from dreambooth_jax.runs.training import train
from dreambooth_jax.runs.workdir import open_trained

OLD = ROOT / "tests" / "data" / "run_of_c134e27.zip"


def state(seed: int) -> TrainState:
    values = {f"w{i}": jax.random.normal(jax.random.key(seed + i), (64, 32)) for i in range(3)}
    return TrainState(jnp.asarray(seed), values, {"m": values["w0"]}, values)


def like(tree):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    manager = checkpoint.open_checkpoints(folder, keep_last=2, record={"config": {"a": 1}})
    for step in (1, 2):
        checkpoint.save(manager, step, state(step))
    with checkpoint.closing(manager):
        pass
    return folder


@pytest.fixture
def folder(two_checkpoints, tmp_path):
    return shutil.copytree(two_checkpoints, tmp_path / "run" / "checkpoints")


def test_every_checkpoint_has_digests_and_the_record_of_its_run(two_checkpoints):
    for step in (1, 2):
        record = checkpoint.read_record(two_checkpoints, step)
        assert record["digests"].keys() == {"trainable", "optimizer", "ema"} and record["config"] == {"a": 1}
        checkpoint.verify(two_checkpoints, step)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def test_one_flipped_bit_anywhere_is_found(folder):
    rng = random.Random(0)
    for item in ("trainable", "optimizer", "ema"):
        for path in files_of(folder / "2" / item):
            whole = path.read_bytes()
            place = rng.randrange(len(whole))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
            with pytest.raises(DamagedCheckpoint, match=item):
                checkpoint.verify(folder, 2)
            path.write_bytes(whole)
    checkpoint.verify(folder, 2)


@pytest.mark.parametrize("damage", ["truncated", "file gone", "item gone", "record cut"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(folder, damage):
    victim = max(files_of(folder / "2" / "trainable"), key=lambda path: path.stat().st_size)
    if damage == "truncated":
        os.truncate(victim, victim.stat().st_size // 2)
    elif damage == "file gone":
        victim.unlink()
    elif damage == "item gone":
        shutil.rmtree(folder / "2" / "ema")
    else:
        os.truncate(folder / "2" / "run.json", 20)
    (line,) = checkpoint.set_aside_damaged(folder)
    assert line.endswith("damaged_checkpoints/2; the run goes on from step 1")
    assert (folder.parent / "damaged_checkpoints" / "2").is_dir() and checkpoint.steps_of(folder) == [1]
    manager = checkpoint.open_checkpoints(folder)
    found = checkpoint.restore(manager, like(state(0)))
    jax.tree.map(np.testing.assert_array_equal, found, state(1))
    manager.close()
    assert checkpoint.set_aside_damaged(folder) == []


@pytest.mark.parametrize("gone", ["run.json", "trainable", "a file"])
def test_what_a_killed_process_was_deleting_is_deleted(folder, gone):
    """Steps beyond keep_last that are not whole; whole ones, and those of keep_every, stay."""
    checkpoint.finish_deletions(folder, keep_last=1)
    assert checkpoint.steps_of(folder) == [1, 2]
    if gone == "trainable":
        shutil.rmtree(folder / "1" / gone)
    else:
        (folder / "1" / "run.json" if gone == "run.json" else files_of(folder / "1" / "ema")[0]).unlink()
    checkpoint.finish_deletions(folder, keep_last=2)
    checkpoint.finish_deletions(folder, keep_last=1, keep_every=1)
    assert checkpoint.steps_of(folder) == [1, 2]
    checkpoint.finish_deletions(folder, keep_last=1)
    assert checkpoint.steps_of(folder) == [2]


def test_what_a_killed_process_was_about_to_delete_is_deleted(folder):
    """It saved step 3 with keep_last=2 and was killed before it deleted step 1. Other numbers delete nothing whole."""
    shutil.copytree(folder / "1", folder.parent / "1")
    manager = checkpoint.open_checkpoints(folder, keep_last=2, record={"config": {"a": 1}})
    checkpoint.save(manager, 3, state(3))
    with checkpoint.closing(manager):
        pass
    assert checkpoint.steps_of(folder) == [2, 3]
    shutil.copytree(folder.parent / "1", folder / "1")
    for other in ({"keep_last": 1}, {"keep_last": 2, "keep_every": 2}, {"keep_last": 3}):
        checkpoint.finish_deletions(folder, **other)
        assert checkpoint.steps_of(folder) == [1, 2, 3]
    checkpoint.finish_deletions(folder, keep_last=2)
    assert checkpoint.steps_of(folder) == [2, 3]


def test_nothing_whole_is_deleted_beside_a_damaged_newest_checkpoint(folder):
    manager = checkpoint.open_checkpoints(folder, keep_last=1)
    checkpoint.save(manager, 3, state(3))
    shutil.copytree(folder / "2", folder.parent / "2")
    with checkpoint.closing(manager):
        pass
    shutil.copytree(folder.parent / "2", folder / "2", dirs_exist_ok=True)
    victim = max(files_of(folder / "3" / "trainable"), key=lambda path: path.stat().st_size)
    os.truncate(victim, 10)
    checkpoint.finish_deletions(folder, keep_last=1)
    assert checkpoint.steps_of(folder) == [2, 3]


def test_reading_damaged_weights_says_which_step_is_there(folder):
    victim = max(files_of(folder / "2" / "ema"), key=lambda path: path.stat().st_size)
    os.truncate(victim, 10)
    manager = checkpoint.open_checkpoints(folder, read_only=True)
    wanted = like(state(0)).trainable
    checkpoint.restore_weights(manager, wanted, average=False)  # not the damaged item
    with pytest.raises(DamagedCheckpoint, match=r"the bytes of ema .*Other checkpoints: 1 \(--step\)"):
        checkpoint.restore_weights(manager, wanted, average=True)
    assert checkpoint.steps_of(folder) == [1, 2]


def test_a_checkpoint_of_another_shape_is_one_line(folder):
    manager = checkpoint.open_checkpoints(folder)
    other = like(state(0))._replace(trainable={"w0": jax.ShapeDtypeStruct((3,), jnp.float32)})
    with pytest.raises(ValueError, match=r"checkpoints/2 cannot be restored") as error:
        checkpoint.restore(manager, other)
    assert "\n" not in str(error.value)
    manager.close()


# --- a run and its data


def read_nothing(*_):
    pytest.fail("weights are read")


def go_on(workdir: Path, read=read_nothing, **fields) -> None:
    config = config_of(workdir, **{"instance_images": str(ROOT / "examples" / "subjects" / "dog")} | fields)
    with Preemption() as guard:
        train(set_up(config, jax.devices()[:1]), guard, read=read)


@pytest.fixture
def workdir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_without_config_json_the_checkpoint_knows_its_config(micro, workdir):
    (workdir / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"learning_rate: 0\.0002 in the checkpoint, 0\.001 now"):
        go_on(workdir, base=micro, learning_rate=1e-3)
    go_on(workdir, base=micro)
    assert json.loads((workdir / "config.json").read_text())["learning_rate"] == 2e-4


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_without_any_config_it_is_refused(micro, workdir, text):
    (workdir / "checkpoints" / "60" / "run.json").unlink()
    (workdir / "config.json").unlink() if text is None else (workdir / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config they were trained with cannot be read.*config\.json"):
        go_on(workdir, base=micro)


def test_other_photos_and_captions_are_named(micro, workdir, tmp_path):
    photos = shutil.copytree(ROOT / "examples" / "subjects" / "dog", tmp_path / "photos")
    go_on(workdir, base=micro, instance_images=str(photos))  # the same pictures elsewhere
    first, second, *_ = sorted(photos.iterdir())
    shutil.copy(second, first)
    (photos / "new.png").write_bytes(second.read_bytes())
    with pytest.raises(ConfigError, match=rf"photos: changed: {first.name}; new: new\.png"):
        go_on(workdir, base=micro, instance_images=str(photos))


def test_another_base_in_the_same_place_is_named(micro, workdir, tmp_path):
    base = shutil.copytree(micro, tmp_path / "base")
    moved = json.loads((workdir / "checkpoints" / "60" / "run.json").read_text())
    moved["config"]["base"] = str(base)
    (workdir / "checkpoints" / "60" / "run.json").write_text(json.dumps(moved))
    go_on(workdir, base=str(base))
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"] = weights["conv_out.bias"] + 1e-6
    save_file(weights, path, metadata={"format": "pt"})
    shutil.rmtree(workdir / "class_images")  # they are bound to their base as well
    with pytest.raises(ConfigError, match="base: changed: weights"):
        go_on(workdir, base=str(base))


def test_one_flipped_bit_of_the_base_is_named(micro, workdir, tmp_path):
    base = shutil.copytree(micro, tmp_path / "base")
    record = workdir / "checkpoints" / "60" / "run.json"
    moved = json.loads(record.read_text())
    assert moved["fingerprints"]["weights"].keys() == {"text_encoder", "unet", "vae"}
    moved["config"]["base"] = str(base)
    record.write_text(json.dumps(moved))
    path = base / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    largest = max(weights, key=lambda name: weights[name].size)
    weights[largest].view(np.uint32).reshape(-1)[weights[largest].size // 4] ^= 1
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="weights: changed: text_encoder"):
        go_on(workdir, read=read_params, base=str(base), steps=62)


def test_the_only_checkpoint_damaged_is_said_and_the_run_begins_anew(micro, workdir):
    victim = max(files_of(workdir / "checkpoints" / "60" / "trainable"), key=lambda path: path.stat().st_size)
    os.truncate(victim, 10)
    run = set_up(config_of(workdir, base=micro, instance_images="examples/subjects/dog"), jax.devices()[:1])
    text = plan_text(run, done=0)
    assert "the bytes of trainable are not those that were saved" in text
    assert "damaged_checkpoints/60; no other is left, the run begins anew" in text
    assert "going on" not in text
    assert re.search(r"warning: keep_last = 1: .* nothing is left; 2 would take [\d.e-]+ GB more", text)


def test_half_written_files_of_a_killed_run_are_removed(micro, workdir, capfd):
    name = f".{'0' * 16}.partial"
    for folder in (workdir, workdir / "class_images", workdir / "samples"):
        (folder / name).write_bytes(b"half")
        (folder / ".mine.partial").write_bytes(b"kept")
    go_on(workdir, base=micro)
    assert not list(workdir.rglob(name)) and len(list(workdir.rglob(".mine.partial"))) == 3
    assert f"half written by a process that was killed: {workdir}/{name}, " in capfd.readouterr().out


# --- runs of earlier versions


@pytest.fixture
def old(micro, tmp_path):
    """The workdir of a LoRA run of 22 November's main: no digests, no record, no newer fields."""
    workdir = tmp_path / "old"
    with zipfile.ZipFile(OLD) as archive:
        archive.extractall(workdir)
    text = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(text.replace("BASE", micro).replace("WORKDIR", str(workdir)))
    return workdir


FIELDS = {
    "method": "lora",
    "lora_rank": 1,
    "num_class_images": 2,
    "class_batch_size": 2,
    "save_every": 4,
    "sample_every": 4,
    "sample_prompts": (),
    "sample_count": 6,
}


def test_a_checkpoint_of_an_earlier_version_is_read(micro, old):
    stored = read_state(old, 4)
    trained = open_trained(old, make_mesh(1, 1, jax.devices()[:1]))
    assert len(trained.trainable) == sum("['ema']" in name for name in stored) > 4
    for name, value in trained.trainable.items():
        np.testing.assert_array_equal(value, stored[f"['ema']['{name}']"])


@pytest.mark.slow
def test_a_run_of_an_earlier_version_goes_on_as_it_was(micro, old, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)  # its photos are named from here
    go_on(old, base=micro, read=read_params, steps=6, **FIELDS)
    text = capfd.readouterr().out
    assert "going on from step 4" in text and "stores no fingerprints" in text
    assert "step 4 was saved by an older version, without" in text and "lora_ranks" in text
    assert checkpoint.steps_of(old / "checkpoints") == [6] and checkpoint.read_record(old / "checkpoints", 6)["digests"]
    with pytest.raises(ConfigError, match="learning_rate"):
        go_on(old, base=micro, steps=8, **FIELDS, learning_rate=1e-3)
