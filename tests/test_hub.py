"""Bases as people have them: one resolver for folders and hubs, one rule of what is accepted."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.numpy import load_file, save_file
from support.model_hub import serve

from dreambooth_jax import identifier
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.files.diffusers_folder import components
from dreambooth_jax.files.hub import EMBEDDED_FOLDER, resolve_base
from dreambooth_jax.files.weight_files import WeightsError
from dreambooth_jax.models.spec import UnsupportedConfig

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on localhost; returns the folder of its repositories."""
    (tmp_path / "hub").mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve(tmp_path / "hub") as address:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield tmp_path / "hub"


@pytest.fixture
def copy(sd15, tmp_path):
    return shutil.copytree(sd15.folder, tmp_path / "base")


def change(path, function) -> None:
    """Rewrites a JSON file, or a safetensors file."""
    if path.suffix == ".json":
        config = json.loads(path.read_text())
        function(config)
        path.write_text(json.dumps(config))
    else:
        tensors = load_file(path)
        function(tensors)
        save_file(tensors, path)


@pytest.mark.parametrize("shards", [None, pytest.param("30KB", marks=pytest.mark.slow)])
def test_half_precision_repositories_train_from_folder_and_hub_alike(sd15, hub, shards):
    half = StableDiffusionPipeline.from_pretrained(sd15.folder, torch_dtype=torch.float16)
    half.save_pretrained(hub / "fp16", variant="fp16", **{"max_shard_size": shards} if shards else {})
    assert bool(list((hub / "fp16" / "unet").glob("*index*"))) == bool(shards)
    found = [read_params(load_pipeline(base)) for base in (str(hub / "fp16"), "me/fp16")]
    for params in found:
        for name, value in sd15.params.items():
            np.testing.assert_array_equal(params[name], np.asarray(value).astype(np.float16).astype(np.float32))


def test_only_what_is_read_is_fetched(sd15, hub):
    shutil.copytree(sd15.folder, hub / "much")
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "v1-5.ckpt"):
        (hub / "much" / name).write_bytes(b"large")
    (hub / "much" / "safety_checker").mkdir()
    (hub / "much" / "safety_checker" / "model.safetensors").write_bytes(b"large")
    folder = resolve_base("me/much")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"model_index.json", UNET, TEXT, "tokenizer/merges.txt", "scheduler/scheduler_config.json"} <= names
    assert not [name for name in names if "fp16" in name or "safety" in name or name.endswith((".bin", ".ckpt"))]


@pytest.mark.slow
def test_a_base_that_was_fetched_opens_without_the_network(sd15, hub, monkeypatch):
    shutil.copytree(sd15.folder, hub / "once")
    folder = resolve_base("me/once")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve_base("me/once") == folder
    with pytest.raises(FileNotFoundError, match=r"me/never.*Check the name and the network"):
        resolve_base("me/never")


def test_pickles_get_the_command_that_converts_them(sd15, hub, tmp_path):
    shutil.copytree(sd15.folder, hub / "pickled")
    for path in (hub / "pickled").rglob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(WeightsError, match=r"python -c .* me/pickled me--pickled-safetensors$"):
        load_pipeline("me/pickled")
    pipeline = load_pipeline(str(hub / "pickled"))
    with pytest.raises(WeightsError, match="only pickled weights"):
        read_params(pipeline)


def test_the_identifier_command_opens_any_base(sd15, hub, capsys):
    shutil.copytree(sd15.folder, hub / "words")
    for base in ("tiny", str(EMBEDDED_FOLDER)):
        identifier.main(["--base", base, "--count", "3"])
        assert "3 rare tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # five merges hold no rare word, but the tokenizer was found
        identifier.main(["--base", "me/words", "--ranks", "0:5"])
    assert "No tokenizer" not in capsys.readouterr().err


EXTRA_LAYER = {"encoder.layers.1.mlp.fc1.bias": np.zeros(3, np.float32)}
SPARE = {"text_projection.weight": np.eye(32, dtype=np.float32)}
OLD = {"max_length": 20, "do_sample": False, "num_beams": 1, "temperature": 1.0, "add_cross_attention": False}
AVERAGED = {"decay": 0.9999, "inv_gamma": 1.0, "optimization_step": 100, "use_ema_warmup": False}


@pytest.mark.parametrize(
    ("file", "function", "said"),
    [
        ("text_encoder/config.json", lambda c: c.update(OLD), "do_sample, max_length"),
        ("text_encoder/config.json", lambda c: c.update(num_hidden_layers=1), "layers 1"),
        (TEXT, lambda tensors: tensors.update(SPARE), "text_projection"),
        ("unet/config.json", lambda c: c.update(AVERAGED), "decay, inv_gamma"),
        ("unet/config.json", lambda c: c.update(only_cross_attention=[False, False]), None),
        ("model_index.json", lambda c: c.update(_class_name="StableDiffusionImg2ImgPipeline"), None),
        ("model_index.json", lambda c: c.update(_class_name="StableDiffusionInpaintPipeline"), None),
    ],
    ids=["old defaults", "clip skip", "projection", "average", "list of falses", "image to image", "inpainting"],
)
def test_fields_that_training_does_not_read_are_ignored_with_one_line(copy, file, function, said, caplog):
    change(copy / file, function)
    params = read_params(load_pipeline(str(copy)))
    assert all(np.isfinite(value).all() for value in params.values())
    lines = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    assert len(lines) == (said is not None) and all(said in line for line in lines)


def test_a_unet_without_middle_is_read(copy):
    """As BK-SDM has it."""
    change(copy / "unet/config.json", lambda c: c.update(mid_block_type=None))
    change(copy / UNET, lambda t: [t.pop(name) for name in list(t) if name.startswith("mid_block")])
    pipeline = load_pipeline(str(copy))
    assert not [name for name in read_params(pipeline) if name.startswith("unet.mid_block")]


def set_nan(tensors):
    tensors["conv_out.bias"][0] = np.nan


def set_int(tensors):
    tensors["conv_out.bias"] = np.zeros(4, np.int32)


@pytest.mark.parametrize(
    ("file", "function", "message"),
    [
        ("unet/config.json", lambda c: c.update(in_channels=9), "in_channels = 9: an inpainting model"),
        ("unet/config.json", lambda c: c.update(in_channels=3), "UNet in_channels 3.*VAE latent_channels 4"),
        ("text_encoder/config.json", lambda c: c.update(vocab_size=99), "tokens.*has embeddings for 99"),
        ("tokenizer/tokenizer.json", lambda c: c["model"]["vocab"].update({"a</w>": 5000}), "ids up to 5000"),
        ("tokenizer/tokenizer_config.json", lambda c: c.update(tokenizer_class="os.system"), "os.system.*implemented"),
        (UNET, set_nan, "conv_out.bias holds numbers that are not finite"),
        (UNET, set_int, "not floating: conv_out.bias is I32"),
    ],
    ids=["inpainting", "channels", "vocabulary", "gap", "class", "nan", "integers"],
)
def test_what_does_not_fit_is_refused_by_name(copy, file, function, message):
    change(copy / file, function)
    with pytest.raises((UnsupportedConfig, WeightsError), match=message):
        read_params(load_pipeline(str(copy)))


@pytest.mark.parametrize("file", ["unet/config.json", "model_index.json", "tokenizer/tokenizer_config.json"])
def test_broken_json_names_its_file(copy, file):
    (copy / file).write_text('{"sample_size": 16,}')
    with pytest.raises(UnsupportedConfig, match=file):
        load_pipeline(str(copy))


def test_an_index_with_an_empty_entry_names_no_component():
    assert components({"unet": [], "vae": ["diffusers", "AutoencoderKL"], "image_encoder": [None, None]}) == ["vae"]


def test_an_index_may_not_leave_its_folder(copy, tmp_path):
    (copy / UNET).rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"conv_in.weight": "../../outside.safetensors"}}
    (copy / f"{UNET}.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"outside of its folder.*\.\./\.\./outside"):
        read_params(load_pipeline(str(copy)))


@pytest.mark.parametrize("function", [lambda c: c.pop("model_max_length"), lambda c: c.update(model_max_length=10**30)])
def test_prompts_are_as_long_as_the_encoder_reads(copy, function):
    change(copy / "tokenizer/tokenizer_config.json", function)
    assert load_pipeline(str(copy)).tokenize(["a dog"])["ids"].shape == (1, 16)
    (copy / "tokenizer/tokenizer_config.json").unlink()
    assert load_pipeline(str(copy)).tokenize(["a dog"])["ids"].shape == (1, 16)


def test_the_embedded_folder_opens_in_diffusers_without_a_word_on_dtype(capsys):
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED_FOLDER)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    assert "_guidance_scale" not in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe("a dog", num_inference_steps=1, output_type="np")
