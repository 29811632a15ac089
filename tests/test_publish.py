"""Exports on a hub, one on localhost: the files arrive as they are, with a card that says how to use them."""

from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from support.fake_hub import hub
from support.runs import config_of

from dreambooth_jax.families.pipeline import load_pipeline
from dreambooth_jax.files.diffusers_folder import folder_files
from dreambooth_jax.runs.exports import Subject, Written
from dreambooth_jax.runs.publish import model_card, publish
from dreambooth_jax.runs.workdir import Trained


def test_files_and_card_arrive(micro, tmp_path):
    config = config_of(tmp_path, base=micro, method="lora")
    method = SimpleNamespace(adapter=dict, says="LoRA of rank 8 on unet")
    subject = Subject(Trained(config, load_pipeline(micro), method, {}), {}, {}, {})
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step_000010.png").write_bytes(b"old")
    (tmp_path / "samples" / "step_000020.png").write_bytes(b"new")
    path = tmp_path / "sks_dog.safetensors"
    path.write_bytes(b"weights")
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_bytes(b"{}")
    (folder / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    for name in ("checkpoints/60/state", "unet/.cache/page", "photo.png", ".git/config"):  # a workdir's own
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"private")
    whole = Written(folder, dict, "a folder for diffusers", "all of it", files=tuple(folder_files(folder)))
    written = [Written(path, dict, "a LoRA for ComfyUI"), whole]
    with hub() as (address, uploaded):
        api = HfApi(endpoint=address, token="hf_none")
        url = publish("me/dog", subject, written, tmp_path, api)
        assert url.endswith("me/dog")
        publish("me/dog", subject, written[:1], tmp_path, api)  # once more: the repository is there already
    files = uploaded["me/dog"]
    assert files.keys() == {"README.md", "samples.png", "sks_dog.safetensors", "model_index.json", "unet/config.json"}
    assert files["sks_dog.safetensors"] == b"weights" and files["samples.png"] == b"new"
    card = files["README.md"].decode()
    parts = ["on micro, 60 steps", 'instance_prompt: "sks dog"', "- lora", "license: creativeml-openrail-m"]
    parts += ["`sks_dog.safetensors`: a LoRA for ComfyUI", "a sks dog in the snow", "<lora:NAME:1>", "![samples]"]
    for part in parts:
        assert part in card, part
    assert str(tmp_path) not in card and "base_model" not in card  # a hub knows no places of this machine


def test_without_a_network_the_export_is_named(micro, tmp_path):
    method = SimpleNamespace(adapter=dict, says="LoRA of rank 8 on unet")
    run = Trained(config_of(tmp_path, base=micro), load_pipeline(micro), method, {})
    (tmp_path / "dog.safetensors").write_bytes(b"weights")
    written = [Written(tmp_path / "dog.safetensors", dict, "a LoRA")]
    with pytest.raises(OSError, match=rf"me/dog: the model hub .*complete, at {tmp_path}/dog\.safetensors"):
        publish("me/dog", Subject(run, {}, {}, {}), written, tmp_path, HfApi(endpoint="http://localhost:9"))


def test_a_card_names_the_base_and_its_licence(micro, tmp_path):
    pipeline, written = load_pipeline(micro), [Written(tmp_path, dict, "a folder")]
    names = {"unet.a.kernel": 0, "text_encoder.b.kernel": 0}
    for base, shapes, front in (
        (
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            pipeline.shapes,
            ("base_model: stable-", "creativeml-openrail-m"),
        ),
        ("tiny", pipeline.shapes, ("on tiny", "license: apache-2.0")),
        ("DeepFloyd/IF-I-M-v1.0", names, ("base_model: DeepFloyd/IF-I-M-v1.0", "license: other")),
    ):
        config = config_of(tmp_path, base=base, identifier='"sks"')
        method = SimpleNamespace(adapter=None, says="full fine-tuning")
        run = Trained(config, SimpleNamespace(shapes=shapes, models=pipeline.models), method, {})
        card = model_card(Subject(run, {}, {}, {}), written, False)
        assert all(part in card for part in front) and 'instance_prompt: "\\"sks\\" dog"' in card, card
