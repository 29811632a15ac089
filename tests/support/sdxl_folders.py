"""Small SDXL folders with random weights, written by PyTorch diffusers."""

from pathlib import Path

from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from support.torch_folders import SCHEDULE, VAE, randomise, write_tokenizer

UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 56,
    "use_linear_projection": True,
    "norm_num_groups": 8,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT_2 = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "hidden_act": "gelu",
    "projection_dim": 20,
}


def write_sdxl(folder: Path, length: int = 16, **unet) -> StableDiffusionXLPipeline:
    """Writes a StableDiffusionXLPipeline folder, end token 2 in the second tower's config as in the published one, and
    "!" as the padding of its tokenizer; returns the PyTorch pipeline."""
    tokenizer = write_tokenizer(folder / "tokenizer", length)
    second = write_tokenizer(folder / "tokenizer_2", length)
    second.pad_token = "!"
    ids = {"vocab_size": len(tokenizer), "max_position_embeddings": length, "bos_token_id": len(tokenizer) - 2}
    one = CLIPTextConfig(**TEXT, **ids, eos_token_id=len(tokenizer) - 1)
    two = CLIPTextConfig(**TEXT_2, **ids, eos_token_id=2)
    scheduler = {name: value for name, value in SCHEDULE.items() if name != "set_alpha_to_one"}
    pipe = StableDiffusionXLPipeline(
        vae=randomise(AutoencoderKL(**VAE, scaling_factor=0.13025, force_upcast=True), 1),
        text_encoder=randomise(CLIPTextModel(one), 2),
        text_encoder_2=randomise(CLIPTextModelWithProjection(two), 3),
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=randomise(UNet2DConditionModel(**UNET | unet), 4),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **scheduler),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe
