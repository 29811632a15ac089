"""Folders that PyTorch diffusers writes, with random weights: the reference that parity tests compare with."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

torch.set_num_threads(1)  # models this small only lose time to threads

UNET_15 = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
UNET_21 = UNET_15 | {"attention_head_dim": [4, 2], "use_linear_projection": True, "upcast_attention": True}
TEXT_15 = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT_21 = TEXT_15 | {"hidden_act": "gelu", "num_hidden_layers": 3}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (16, 32),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": 32,
}
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Gives every parameter a value that matters: untouched initialisations hide swapped norms and missing biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise if parameter.ndim == 1 else 0.02 * noise)
    return model.eval()


def write_tokenizer(folder: Path, length: int = 16) -> CLIPTokenizer:
    """A CLIP tokenizer of bytes and a few merges."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = [("d", "o"), ("do", "g</w>"), ("c", "a"), ("ca", "t</w>"), ("s", "k"), ("sk", "s</w>"), ("o", "f</w>")]
    words = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges]
    vocab = {word: rank for rank, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=length
    )
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def make_parts(unet: dict, text: dict, vae: dict, vocab: int, length: int = 16):
    """Seeded random (unet, vae, text_encoder) in float32."""
    torch.manual_seed(0)
    text_config = CLIPTextConfig(
        vocab_size=vocab, max_position_embeddings=length, bos_token_id=vocab - 2, eos_token_id=vocab - 1, **text
    )
    return (
        randomise(UNet2DConditionModel(**unet), 1),
        randomise(AutoencoderKL(**vae), 2),
        randomise(CLIPTextModel(text_config), 3),
    )


def write_folder(
    folder: Path, *, unet=None, text=None, vae=None, scheduler=None, length: int = 16, **save
) -> StableDiffusionPipeline:
    """Writes a whole StableDiffusionPipeline folder and returns the PyTorch pipeline."""
    tokenizer = write_tokenizer(folder / "tokenizer", length)
    unet, vae, text = make_parts(unet or UNET_15, text or TEXT_15, vae or VAE, len(tokenizer), length)
    pipe = StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        scheduler=scheduler or DDIMScheduler(clip_sample=False, **SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder, **save)
    return pipe


@contextlib.contextmanager
def unchanged(*references: DiffusionPipeline) -> Iterator[None]:
    """Raises AssertionError at the end if a test has trained a model that other tests compare with."""
    tensors = {
        (number, part, name): value
        for number, reference in enumerate(references)
        for part, model in reference.components.items()
        if isinstance(model, torch.nn.Module)
        for name, value in model.state_dict().items()
    }
    before = {key: value.clone() for key, value in tensors.items()}
    yield
    changed = [key for key, value in tensors.items() if not torch.equal(value, before[key])]
    assert not changed, changed[:3]
