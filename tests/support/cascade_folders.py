"""Small folders of a pixel cascade with random weights, written by PyTorch diffusers."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    IFPipeline,
    IFSuperResolutionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

from support.cascade_models import IF_STAGE_I, IF_STAGE_II, T5
from support.torch_folders import TEXT_15, UNET_15, VAE, randomise, write_tokenizer

SENTENCES = ["a photo of a sks dog", "a photo of a dog", "a dog in the snow", "a cat on the beach", "of the red wall"]
SCHEDULER = {
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
    "prediction_type": "epsilon",
}
X4 = UNET_15 | {
    "in_channels": 7,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "only_cross_attention": [False, True],
    "num_class_embeds": 1000,
    "use_linear_projection": True,
}
X4_VAE = VAE | {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
}


def t5_tokenizer() -> T5Tokenizer:
    """A SentencePiece-like unigram tokenizer of a few words; pad 0, end 1, unknown 2."""
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.Sequence([])
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    trained.train_from_iterator(SENTENCES * 20, trainer)
    import json

    vocab = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def t5_encoder() -> T5EncoderModel:
    torch.manual_seed(0)
    return randomise(T5EncoderModel(T5Config(**T5)), 3)


def write_stage_i(folder: Path, **unet) -> IFPipeline:
    pipe = IFPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        unet=randomise(UNet2DConditionModel(**IF_STAGE_I | unet), 1),
        scheduler=DDPMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    return _saved(pipe, folder)


def write_stage_ii(folder: Path, **unet) -> IFSuperResolutionPipeline:
    """Of 64 pixels for those of 16."""
    pipe = IFSuperResolutionPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        unet=randomise(UNet2DConditionModel(**IF_STAGE_II | {"sample_size": 64} | unet), 2),
        scheduler=DDPMScheduler(**SCHEDULER | {"sample_max_value": 1.0}),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    return _saved(pipe, folder)


def write_upscaler(folder: Path) -> StableDiffusionUpscalePipeline:
    """Of 64 pixels for those of 16."""
    tokenizer = write_tokenizer(folder / "tokenizer", 16)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1}
    text = CLIPTextModel(CLIPTextConfig(max_position_embeddings=16, **ids, **TEXT_15))
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
    pipe = StableDiffusionUpscalePipeline(
        vae=randomise(AutoencoderKL(**X4_VAE, scaling_factor=0.08333), 1),
        text_encoder=randomise(text, 2),
        tokenizer=tokenizer,
        unet=randomise(UNet2DConditionModel(**X4), 3),
        low_res_scheduler=DDPMScheduler(**betas),
        scheduler=DDIMScheduler(
            **betas, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        max_noise_level=350,
    )
    return _saved(pipe, folder)


def _saved(pipe, folder: Path):
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe
