"""Features of pictures equal PyTorch's, from files on disk, the resizing of photos included."""

import shlex
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from support.torch_folders import write_tokenizer
from support.torch_images import TorchEfficientNetLite0, TorchLPIPS
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.evaluation import features, transforms
from dreambooth_jax.files.hub import resolve_model
from dreambooth_jax.files.safetensors import read_model
from dreambooth_jax.files.weight_files import WeightsError
from dreambooth_jax.models.lpips import LPIPS
from dreambooth_jax.models.params import functional
from dreambooth_jax.models.spec import UnsupportedConfig

SIZES = ((70, 51), (48, 48), (301, 280))  # height, width


@pytest.fixture(scope="module")
def pictures():
    """Smooth and noisy pictures of several sizes."""
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in SIZES]
    smooth = [np.asarray(c.resize((w, h), Image.Resampling.BICUBIC)) for c, (h, w) in zip(coarse, SIZES, strict=True)]
    return [*smooth, rng.integers(0, 256, (*SIZES[0], 3), dtype=np.uint8)]


@pytest.fixture(scope="module")
def mesh():
    return make_mesh()


def random_weights(model, std=0.3):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def save_weights(model, folder):
    folder.mkdir(exist_ok=True)
    kept = {name: x.contiguous() for name, x in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(kept, folder / "model.safetensors")
    return folder


def unit(x):
    return (x / x.norm(dim=-1, keepdim=True)).numpy()


def channels_first(pixels):
    return torch.tensor(pixels.transpose(0, 3, 1, 2))


def write_vit(folder):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = random_weights(transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **sizes)))
    model.save_pretrained(folder)
    return model


def test_dino_with_the_hubs_preprocessor(tmp_path, pictures, mesh):
    theirs = write_vit(tmp_path)
    processor = ViTImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=transforms.IMAGENET[0], image_std=transforms.IMAGENET[1]
    )
    pixels = processor(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        wanted = unit(theirs(pixels).last_hidden_state[:, 0])
    ours = features.subject_features(tmp_path, mesh, transform="hub")
    np.testing.assert_allclose(ours.of(pictures), wanted, atol=1e-4)
    assert ours.says.endswith("squashed to 32 bilinear, crop 32")


def test_dino_with_the_authors_transform(tmp_path, pictures, mesh):
    """The short side to 8/7 of the crop, bicubic: as the class that CLIP's pictures go through does it."""
    theirs = write_vit(tmp_path)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 37}, crop_size=32, image_mean=transforms.IMAGENET[0], image_std=transforms.IMAGENET[1]
    )
    pixels = processor(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        wanted = unit(theirs(pixels).last_hidden_state[:, 0])
    ours = features.subject_features(tmp_path, mesh)
    np.testing.assert_allclose(ours.of(pictures), wanted, atol=1e-4)
    assert transforms.dino_official() == transforms.Transform(256, 224, "bicubic", *transforms.IMAGENET)
    assert "short side 37 bicubic, crop 32" in ours.says


def test_dinov2_with_interpolated_positions(tmp_path, pictures, mesh):
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14, layerscale_value=0.5
    )
    theirs = random_weights(transformers.Dinov2Model(config))
    theirs.save_pretrained(tmp_path)
    for size in (56, 28, 98):
        ours = features.subject_features(tmp_path, mesh, size=size)
        pixels = channels_first(transforms.prepare(transforms.dino_official(size), pictures))
        with torch.no_grad():
            wanted = unit(theirs(pixels).last_hidden_state[:, 0])
        np.testing.assert_allclose(ours.of(pictures), wanted, atol=1e-4)


def test_clip_pictures_and_texts(tmp_path, pictures, mesh):
    torch.manual_seed(0)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    # As in OpenAI's files, `eos_token_id` is 2, for which transformers pools at the largest id.
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config=sizes | text, vision_config=sizes | {"image_size": 32, "patch_size": 8}, projection_dim=24
    )
    theirs = random_weights(transformers.CLIPModel(config), std=0.1)
    theirs.save_pretrained(tmp_path)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    prompts = ["a dog in the snow", "sks cat", ""]
    ids = torch.tensor(tokenizer(prompts, padding="max_length", max_length=16).input_ids)
    with torch.no_grad():
        out = theirs(input_ids=ids, pixel_values=processor(pictures, return_tensors="pt").pixel_values)
    images, texts = features.clip_features(tmp_path, mesh, tokenizer)
    np.testing.assert_allclose(images.of(pictures), out.image_embeds, atol=1e-4)
    np.testing.assert_allclose(texts.of(prompts), out.text_embeds, atol=1e-4)


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_lpips_distances(tmp_path, pictures, mesh, backbone):
    torch.manual_seed(0)
    theirs = TorchLPIPS(backbone)
    ours = features.lpips_features(save_weights(theirs, tmp_path), backbone, mesh, size=64)
    pixels = channels_first(transforms.prepare(transforms.square(64), pictures[:2]))
    with torch.no_grad():
        wanted = theirs(pixels[:1], pixels[1:])[0]
    found = features.distances(ours.of(pictures[:2]))
    np.testing.assert_allclose(found, [[0, wanted], [wanted, 0]], rtol=1e-4, atol=1e-7)


def test_lpips_in_bfloat16(tmp_path):
    """Of float32 pictures, as the training of the embedded base asks for it."""
    weights = save_weights(TorchLPIPS("alex"), tmp_path)
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 2, 64, 64, 3)), jnp.float32)
    exact, half = (
        functional(lambda rngs, dtype=dtype: LPIPS("alex", dtype=dtype, rngs=rngs))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    params = read_model(weights, exact.shapes)
    np.testing.assert_allclose(half.apply(params, *images), exact.apply(params, *images), rtol=0.02)


def test_lpips_backbones_have_names(tmp_path, mesh):
    with pytest.raises(ValueError, match="expected one of alex, vgg"):
        features.lpips_features(tmp_path, "squeeze", mesh)


def test_imagenet_features(tmp_path, pictures, mesh):
    torch.manual_seed(0)
    theirs = TorchEfficientNetLite0()
    for name, x in theirs.state_dict().items():  # statistics as training leaves them: none is 0 or 1
        if "running" in name:
            x.copy_(torch.rand_like(x) + 0.5)
    theirs.eval()
    ours = features.imagenet_features(save_weights(theirs, tmp_path), mesh)
    pixels = channels_first(transforms.prepare(transforms.square(224), pictures[:2]))
    with torch.no_grad():
        wanted = theirs.extract(pixels).numpy()
    np.testing.assert_allclose(ours.of(pictures[:2]), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_many_pictures_are_computed_in_parts(tmp_path, mesh):
    write_vit(tmp_path)
    ours = features.subject_features(tmp_path, mesh)
    many = list(np.random.default_rng(0).integers(0, 256, (features.BATCH + 3, 40, 40, 3), dtype=np.uint8))
    together = ours.of(many)
    np.testing.assert_allclose(together[[0, -1]], np.concatenate([ours.of(many[:1]), ours.of(many[-1:])]), atol=1e-5)


def test_a_folder_of_another_model_is_refused(tmp_path, mesh):
    with pytest.raises(FileNotFoundError, match=r"config\.json is not there"):
        features.subject_features(tmp_path, mesh)
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(UnsupportedConfig, match="resnet"):
        features.subject_features(tmp_path, mesh)


def test_a_pickled_model_is_refused_and_the_command_in_the_message_converts_it(pictures, mesh, tmp_path, monkeypatch):
    write_vit(tmp_path / "vit")
    stored = tmp_path / "vit" / "model.safetensors"
    expected = features.subject_features(resolve_model(str(tmp_path / "vit")), mesh).of(pictures)
    torch.save(load_file(stored), tmp_path / "vit" / "pytorch_model.bin")
    stored.unlink()
    with pytest.raises(WeightsError, match="no weights as safetensors") as refused:
        resolve_model(str(tmp_path / "vit"))
    python, flag, code, *arguments = shlex.split(str(refused.value).splitlines()[-1])
    assert (python, flag) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(code, {})
    np.testing.assert_array_equal(
        features.subject_features(resolve_model(str(tmp_path / "vit")), mesh).of(pictures), expected
    )
