"""LDM single files: the name table is diffusers', reading undoes writing, and diffusers paints what we paint."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders import single_file_utils as theirs
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.painting import painted_by_diffusers, painted_by_sample

from dreambooth_jax import export
from dreambooth_jax.families.pipeline import describe_base, load_pipeline, read_params
from dreambooth_jax.files import hub
from dreambooth_jax.files.layouts import sniff, split_base
from dreambooth_jax.files.safetensors import file_name, to_file_axes
from dreambooth_jax.files.sd2_config import V_YAML
from dreambooth_jax.files.single_file import (
    SD1,
    SD2,
    XL,
    entries,
    layout_of,
    read_single_file,
    shape_in_file,
    write_single_file,
)
from dreambooth_jax.files.weight_files import WeightsError

SD15, SD21 = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def torch_shape(name, shape):
    return tuple(shape[axis] for axis in to_file_axes(name, len(shape)))


@pytest.mark.parametrize(("base", "layout", "count"), [(SD15, SD1, 1130), (SD21, SD2, 1214), (SDXL, XL, 2513)])
def test_the_table_is_diffusers_own(base, layout, count):
    pipeline = describe_base(base)
    shapes, configs = pipeline.shapes, pipeline.models.configs
    assert layout_of(shapes, configs) == layout
    table = entries(shapes, layout)
    assert len(table) == count
    named = [name for entry in table.values() for name in entry.names]
    assert len(named) == len(set(named)) == len(shapes)
    header = {key: shape_in_file(entry, shapes) for key, entry in table.items()}
    meta = {key: torch.empty(shape, device="meta") for key, shape in header.items()}
    unet = theirs.convert_ldm_unet_checkpoint(dict(meta), dict(configs["unet"]))
    wanted = {file_name(n[5:]): torch_shape(n, x.shape) for n, x in shapes.items() if n.startswith("unet.")}
    assert {name: tuple(x.shape) for name, x in unet.items()} == wanted
    vae = theirs.convert_ldm_vae_checkpoint(dict(meta), dict(configs["vae"]))
    wanted = {file_name(n[4:]): torch_shape(n, x.shape) for n, x in shapes.items() if n.startswith("vae.")}
    assert {name: tuple(x.shape) for name, x in vae.items()} == wanted
    assert theirs.infer_diffusers_model_type(meta) in ("v1", "v2", "xl_base")


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_reading_undoes_writing_and_sizes_follow_the_precision(kind, request, tmp_path):
    base = request.getfixturevalue(kind)
    layout = layout_of(base.pipeline.shapes, base.pipeline.models.configs)
    assert layout == {"sd15": SD1, "sd21": SD2}[kind]
    path = tmp_path / "model.safetensors"
    for dtype, exact in (("bfloat16", False), ("float16", False), ("float32", True)):
        write_single_file(path, base.params, layout, dtype=dtype, metadata={"format": "pt"})
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert path.stat().st_size - 8 - length == sum(x.size for x in base.params.values()) * (4 if exact else 2)
        found = read_single_file(path, base.pipeline.shapes, layout)
        assert found.keys() == base.params.keys()
        for name, value in base.params.items():
            assert found[name].dtype == np.float32 and found[name].shape == value.shape
            np.testing.assert_allclose(found[name], value, rtol=0 if exact else 1e-2, atol=0 if exact else 1e-3)
    assert sniff(path) == layout
    with safe_open(path, "numpy") as file:
        shape = file.get_slice("model.diffusion_model.input_blocks.1.1.proj_in.weight").get_shape()
    assert len(shape) == (4 if kind == "sd15" else 2)


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_diffusers_reads_every_part_to_the_bit(kind, request, tmp_path):
    base = request.getfixturevalue(kind)
    layout = layout_of(base.pipeline.shapes, base.pipeline.models.configs)
    write_single_file(tmp_path / "model.safetensors", base.params, layout, dtype="float32", metadata={"format": "pt"})
    opened = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(base.folder), local_files_only=True
    )
    for part in ("unet", "vae", "text_encoder"):
        ours, found = getattr(base.torch, part).state_dict(), getattr(opened, part).state_dict()
        assert ours.keys() == found.keys()
        assert not [name for name, value in ours.items() if not torch.equal(value, found[name])], part


def test_a_single_file_is_a_base_and_other_tools_files_are_read(sd21, tmp_path):
    path = tmp_path / "model.safetensors"
    write_single_file(path, sd21.params, SD2, dtype="float32", metadata={})
    tensors = load_file(path)
    # As original files are: buffers, averages, one more layer and heads of the text encoder, newer names of it.
    tensors |= {"betas": np.zeros(1000, np.float32), "model_ema.decay": np.zeros((), np.float32)}
    tensors |= {"cond_stage_model.model.logit_scale": np.zeros((), np.float32)}
    last = max(int(re.search(r"resblocks\.(\d+)", key)[1]) for key in tensors if "resblocks" in key)
    for key in list(tensors):
        if f"resblocks.{last}." in key:
            tensors[key.replace(f"resblocks.{last}.", f"resblocks.{last + 1}.")] = tensors[key]
    tensors = {key.replace("cond_stage_model.", "conditioner.embedders.0."): x for key, x in tensors.items()}
    other = tmp_path / "other.safetensors"
    save_file(tensors, other)
    pipeline = load_pipeline(f"{other}@{sd21.folder}")
    found = read_params(pipeline)
    for name, value in sd21.params.items():
        np.testing.assert_array_equal(found[name], value)
    assert pipeline.tokenize(["a dog"])["ids"].shape == (1, 16)
    assert split_base("tiny") == (None, "tiny") and split_base(f"{other}@tiny") == (other, "tiny")


def test_what_a_file_predicts_is_read_beside_it_in_it_or_from_a_bias(tmp_path):
    path = tmp_path / "model.safetensors"
    keys = ("model.diffusion_model.x", "cond_stage_model.model.transformer.resblocks.0.ln_1.bias")
    plain = {key: np.zeros(2, np.float32) for key in keys}
    bias = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    wide, narrow = ({bias: np.asarray([-spread, spread], np.float32)} for spread in (0.2, 0.01))
    for tensors, metadata, yaml, velocity in (
        ({}, {}, None, False),
        (wide, {}, None, True),
        (narrow, {}, None, False),
        (narrow, {"modelspec.prediction_type": "v"}, None, True),
        (wide, {"modelspec.prediction_type": "epsilon"}, None, False),
        (wide, {"modelspec.prediction_type": "v"}, "model:\n  params:\n    linear_start: 0.1\n", False),
        (narrow, {}, V_YAML, True),
    ):
        save_file(plain | tensors, path, metadata)
        path.with_suffix(".yaml").unlink(missing_ok=True)
        if yaml:
            path.with_suffix(".yaml").write_text(yaml)
        assert split_base(str(path)) == (path, SD21 if velocity else f"{SD21}-base"), (metadata, yaml)
    save_file(plain | {"conditioner.embedders.1.x": np.zeros(1), "v_pred": np.zeros(0)}, path)
    with pytest.raises(WeightsError, match=r"predicts the velocity .*@FOLDER"):
        split_base(str(path))
    assert split_base(f"{path}@/some/folder") == (path, "/some/folder")


def test_bad_files(sd15, sd21, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_single_file(path, sd15.params, SD1, dtype="float32", metadata={})
    with pytest.raises(WeightsError, match=r"is no SD 2\.x file of these configs: .*\n  missing: "):
        read_params(load_pipeline(f"{path}@{sd21.folder}"))
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    (tmp_path / "model.ckpt").touch()
    for name, message in (
        ("other.safetensors", "no single file of a Stable Diffusion model"),
        ("model.ckpt", "a pickle, which can run code"),
        ("gone.safetensors", "no such file"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_pipeline(str(tmp_path / name))
    monkeypatch.setattr(hub, "_fetch", lambda base, weights: 1 / 0)
    monkeypatch.setattr(hub, "_cached", lambda base: None)
    with pytest.raises(FileNotFoundError, match=rf"{path}': configs and tokenizer .* come from {SD15}.*{path}@/path"):
        load_pipeline(str(path))


@pytest.mark.slow
def test_a_run_as_one_file_paints_alike(finished, micro, tmp_path, capsys):
    path = tmp_path / "dog.safetensors"
    export.main(["--workdir", str(finished), "--output", str(path)])
    said = capsys.readouterr().out
    assert "none left over, weights differ by at most 0;" in said and "a checkpoint for ComfyUI" in said
    opened = StableDiffusionPipeline.from_single_file(str(path), config=micro, local_files_only=True)
    ours = painted_by_sample(tmp_path / "run", "--workdir", str(finished))
    assert np.abs(painted_by_diffusers(opened) - ours).max() <= 2e-3 + 0.5 / 255
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    assert (
        metadata["modelspec.architecture"] == "stable-diffusion-v1"
        and metadata["modelspec.trigger_phrase"] == "sks dog"
    )
    assert not path.with_suffix(".yaml").exists() and 'parameterization: "v"' in V_YAML


@pytest.mark.slow
def test_a_lora_of_a_full_fine_tuning(finished, tmp_path, capsys):
    """All differences are the run; of a rank that is high enough too; a lower rank loses what it says."""
    lost = {}
    for rank in (0, 2, 64):
        path = tmp_path / f"dog{rank}.safetensors"
        options = ["--format=kohya", *([f"--rank={rank}"] if rank else [])]
        export.main(["--workdir", str(finished), "--output", str(path), *options])
        said = capsys.readouterr().out
        assert "none left over" in said
        if rank:
            lost[rank] = float(re.search(r"([\d.]+)% of the change is lost", said)[1])
        else:
            assert "weights differ by at most" in said and "all differences" in said
            moved = float(re.search(r"weights differ by at most ([\d.e-]+)", said)[1])
            assert moved < 1e-6
    assert lost[64] < lost[2] < 100
    assert Path(tmp_path / "dog2.safetensors").stat().st_size < Path(tmp_path / "dog0.safetensors").stat().st_size
