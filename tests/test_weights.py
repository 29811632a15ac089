"""Weight files as diffusers, transformers and their older releases write them, read exactly and refused loudly."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.torch_folders import write_folder

from dreambooth_jax.devices.sharding import make_mesh, param_sharding, split_largest
from dreambooth_jax.files.safetensors import read_model, save_model
from dreambooth_jax.files.weight_files import WEIGHT_FILES, WeightsError
from dreambooth_jax.models.params import under_prefix

UNET_FILE, TEXT_FILE = WEIGHT_FILES


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def rewrite(source: Path, target: Path, change, file: str):
    """The file of `source` with `change(name, array) -> (name, array)` applied, in the folder `target`."""
    target.mkdir(exist_ok=True)
    save_file(dict(change(name, array) for name, array in load_file(source / file).items()), target / file)
    return target


@pytest.mark.parametrize(("part", "file"), [("unet", UNET_FILE), ("vae", UNET_FILE), ("text_encoder", TEXT_FILE)])
def test_load_save_load_is_the_identity_and_so_is_the_file(sd21, tmp_path, part, file):
    shapes, params = sd21.pipeline.models.functions[part].shapes, under_prefix(f"{part}.", sd21.params)
    save_model(tmp_path, params, sd21.pipeline.models.configs[part], file=file)
    assert_same(read_model(tmp_path, shapes), params)
    assert json.loads((tmp_path / "config.json").read_text()) == sd21.pipeline.models.configs[part]
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", file}
    written, original = load_file(tmp_path / file), load_file(sd21.folder / part / file)
    if part == "text_encoder":  # transformers 5 leaves out the wrapper's name, and reads either
        written = {name.removeprefix("text_model."): array for name, array in written.items()}
        original = {name.removeprefix("text_model."): array for name, array in original.items()}
    assert_same(written, original)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(sd15, tmp_path, dtype):
    model = type(sd15.torch.unet).from_pretrained(sd15.folder / "unet").to(dtype)
    model.save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "rounded")
    shapes = sd15.pipeline.models.functions["unet"].shapes
    read = read_model(tmp_path / "half", shapes)
    assert {value.dtype for value in read.values()} == {jnp.dtype("float32")}
    assert_same(read, read_model(tmp_path / "rounded", shapes))
    with pytest.raises(AssertionError):
        assert_same(read, under_prefix("unet.", sd15.params))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_written_as_pytorch_rounds(sd15, tmp_path, dtype):
    params = under_prefix("vae.", sd15.params)
    save_model(tmp_path, params, sd15.pipeline.models.configs["vae"], dtype=dtype, file=UNET_FILE)
    model = type(sd15.torch.vae).from_pretrained(tmp_path, torch_dtype=getattr(torch, dtype))
    for name, value in sd15.torch.vae.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.to(getattr(torch, dtype))), name


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_with_an_index(sd15, tmp_path, variant):
    sd15.torch.unet.save_pretrained(tmp_path, max_shard_size="100KB", variant=variant)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    shapes = sd15.pipeline.models.functions["unet"].shapes
    assert_same(read_model(tmp_path, shapes), under_prefix("unet.", sd15.params))
    next(tmp_path.glob("*-00002-of-*")).unlink()
    with pytest.raises(WeightsError, match=r"shards that are not there.*00002"):
        read_model(tmp_path, shapes)


def test_variants(sd15, tmp_path):
    shapes, plain = sd15.pipeline.models.functions["vae"].shapes, under_prefix("vae.", sd15.params)
    sd15.torch.vae.save_pretrained(tmp_path, variant="fp16")
    assert_same(read_model(tmp_path, shapes), plain)
    sd15.torch.vae.save_pretrained(tmp_path, variant="non_ema")
    with pytest.raises(WeightsError, match=r"several weight files.*fp16\.safetensors.*non_ema\.safetensors"):
        read_model(tmp_path, shapes)
    changed = {name: value + 1 for name, value in plain.items()}
    save_model(tmp_path, changed, {}, file=UNET_FILE)
    assert_same(read_model(tmp_path, shapes), changed)


@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_tensors_of_every_rank(tmp_path, stored):
    """Whole and in shards of sizes that no strip of rows divides."""
    rng = np.random.default_rng(0)
    shapes = {
        "a": (),
        "b.bias": (37,),
        "c.scale": (40,),
        "d.embedding": (56, 3),
        "e.kernel": (24, 40),
        "f.kernel": (3, 3, 5, 40),
    }
    shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    values = {name: rng.standard_normal(s.shape).astype(stored).astype(np.float32) for name, s in shapes.items()}
    save_model(tmp_path, values, {}, dtype=stored, file=TEXT_FILE)
    in_file = load_file(tmp_path / TEXT_FILE)
    assert in_file["f.weight"].shape == (40, 5, 3, 3) and in_file["e.weight"].shape == (40, 24)
    assert_same(read_model(tmp_path, shapes), values)
    mesh = make_mesh(1, 8)
    split = lambda name, shape: jax.NamedSharding(mesh, split_largest(shape, 8))  # noqa: E731
    assert_same(read_model(tmp_path, shapes, split), values)


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_autoencoder_attention(sd15, tmp_path, convolutions):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def age(name, array):
        for today, before in old.items():
            if f".{today}." in name:
                conv = convolutions and array.ndim == 2
                return name.replace(today, before), array[..., None, None] if conv else array
        return name, array

    folder = rewrite(sd15.folder / "vae", tmp_path, age, UNET_FILE)
    assert any("proj_attn" in name for name in load_file(folder / UNET_FILE))
    assert_same(read_model(folder, sd15.pipeline.models.functions["vae"].shapes), under_prefix("vae.", sd15.params))


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoder_with_and_without_wrapper_and_position_ids(sd15, tmp_path, prefix):
    folder = rewrite(
        sd15.folder / "text_encoder", tmp_path, lambda n, a: (prefix + n.removeprefix("text_model."), a), TEXT_FILE
    )
    tensors = load_file(folder / TEXT_FILE) | {f"{prefix}embeddings.position_ids": np.arange(16)[None]}
    save_file(tensors, folder / TEXT_FILE)
    assert_same(
        read_model(folder, sd15.pipeline.models.functions["text_encoder"].shapes),
        under_prefix("text_encoder.", sd15.params),
    )


def test_whatever_does_not_fit_is_named(sd15, tmp_path):
    shapes = sd15.pipeline.models.functions["unet"].shapes
    tensors = load_file(sd15.folder / "unet" / UNET_FILE)
    del tensors["conv_in.bias"], tensors["mid_block.resnets.1.norm2.weight"]
    tensors["lora.down"], tensors["position"] = np.zeros(2, np.float32), np.zeros(3, np.float32)
    tensors["conv_out.weight"] = tensors["conv_out.weight"][:, :-1].copy()
    # Transposed: the same number of values, and yet wrong.
    wide = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.weight"
    tensors[wide] = tensors[wide].T.copy()
    save_file(tensors, tmp_path / UNET_FILE)
    with pytest.raises(WeightsError) as error:
        read_model(tmp_path, shapes)
    lines = str(error.value).splitlines()
    assert "6 tensors" in lines[0]
    for kind, names in {
        "missing": ["conv_in.bias", "mid_block.resnets.1.norm2.weight"],
        "unexpected": ["lora.down", "position"],
        "mis-shaped": ["conv_out.weight", wide],
    }.items():
        assert sum(kind in line for line in lines) == len(names)
        assert all(any(kind in line and name in line for line in lines) for name in names)


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_truncated_file(sd15, tmp_path, left):
    content = (sd15.folder / "vae" / UNET_FILE).read_bytes()
    (tmp_path / UNET_FILE).write_bytes(content[:left])
    with pytest.raises(WeightsError, match=r"diffusion_pytorch_model.*not a readable safetensors file.*again"):
        read_model(tmp_path, sd15.pipeline.models.functions["vae"].shapes)


def test_absent_weights(sd15, tmp_path):
    with pytest.raises(WeightsError, match=r"no weights. Expected diffusion_pytorch_model\.safetensors"):
        read_model(tmp_path, sd15.pipeline.models.functions["vae"].shapes)
    with pytest.raises(WeightsError, match="nothing-here: no such folder"):
        read_model(tmp_path / "nothing-here", sd15.pipeline.models.functions["vae"].shapes)


def test_pickles_are_refused_with_a_command_that_converts_them(sd15, tmp_path, monkeypatch):
    base = tmp_path / 'it\'s "$HOME" base'
    write_folder(base, safe_serialization=False)
    folder = base / "unet"
    with pytest.raises(WeightsError, match=r"diffusion_pytorch_model\.bin") as error:
        read_model(folder, sd15.pipeline.models.functions["unet"].shapes)
    # `python -c "..." ARGUMENTS`, run here to save importing PyTorch once more.
    _, _, program, *arguments = shlex.split(str(error.value).splitlines()[-1])
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(program, {})
    assert_same(
        read_model(base.with_name(f"{base.name}-safetensors") / "unet", sd15.pipeline.models.functions["unet"].shapes),
        under_prefix("unet.", sd15.params),
    )


def test_onto_a_mesh(sd15):
    """Every tensor arrives in its shards, and replicas that came from one read are memory of their own."""
    mesh = make_mesh(2, 4)
    shapes = sd15.pipeline.models.functions["unet"].shapes
    read = read_model(sd15.folder / "unet", shapes, lambda name, shape: param_sharding(mesh, name, shape))
    plain = under_prefix("unet.", sd15.params)
    assert_same(read, plain)
    kernel = read["mid_block.resnets.0.conv1.kernel"]
    assert kernel.sharding == param_sharding(mesh, "mid_block.resnets.0.conv1.kernel", kernel.shape)
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 4}
    doubled = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0)(read)
    assert_same(doubled, {name: 2 * value for name, value in plain.items()})
    for name, value in doubled.items():
        assert all(np.array_equal(s.data, 2 * np.asarray(plain[name])[s.index]) for s in value.addressable_shards)


MEASURE = """
import sys
import jax, jax.numpy as jnp
from dreambooth_jax.devices.sharding import make_mesh, param_sharding, split_largest
from dreambooth_jax.files.safetensors import read_model

def peak():  # resident bytes, mapped files included; ru_maxrss would begin at what the parent process had
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

shapes = {f"layers.{i}.kernel": jax.ShapeDtypeStruct((3, 3, 512, 512), jnp.float32) for i in range(22)}
mesh = make_mesh(1, 8)
jax.block_until_ready(jax.device_put(jnp.ones((8, 8)) + 1, param_sharding(mesh, "kernel", (8, 8))))
before = peak()
place = (lambda name, shape: param_sharding(mesh, name, shape)) if sys.argv[2] == "mesh" else None
jax.block_until_ready(read_model(sys.argv[1], shapes, place))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak")
@pytest.mark.parametrize("place", ["one device", "mesh"])
def test_peak_host_memory(tmp_path, place):
    """Of 200 MB: the parameters themselves are in host memory here, so that the loader may add only little. A copy of
    the file, or all of it mapped at once, would double it."""
    tensors = {f"layers.{i}.weight": np.full((512, 512, 3, 3), i, np.float32) for i in range(22)}
    save_file(tensors, tmp_path / TEXT_FILE)
    size = (tmp_path / TEXT_FILE).stat().st_size
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", MEASURE, str(tmp_path), place]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert 0.9 * size < int(run.stdout) < 1.3 * size + 64e6
