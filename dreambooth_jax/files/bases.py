"""The config files of the bases that configs/ name, for planning where the model hub is out of reach.

What each published repository's `*/config.json` and `scheduler_config.json` say, less the fields that say nothing here.
"""

_UNET = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "_class_name": "UNet2DConditionModel",
}
_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 512,
    "_class_name": "AutoencoderKL",
}
_TEXT = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "torch_dtype": "float32",
    "vocab_size": 49408,
}
_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
}
_SD1 = {
    "unet": _UNET | {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64},
    "vae": _VAE,
    "text_encoder": _TEXT
    | {
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
    },
    "scheduler": _SCHEDULER | {"_class_name": "PNDMScheduler"},
    "index": {"_class_name": "StableDiffusionPipeline"},
}
_SD21 = {
    "unet": _UNET
    | {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "sample_size": 96,
        "use_linear_projection": True,
        "upcast_attention": True,
        "dual_cross_attention": False,
        "only_cross_attention": False,
        "num_class_embeds": None,
    },
    "vae": _VAE | {"sample_size": 768},
    "text_encoder": _TEXT
    | {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "projection_dim": 512,
    },
    "scheduler": _SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "index": {"_class_name": "StableDiffusionPipeline"},
}
_XL_TEXT = _TEXT | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
_SDXL = {
    "unet": _UNET
    | {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "sample_size": 128,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": _VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "text_encoder": _XL_TEXT | {"hidden_act": "quick_gelu", "projection_dim": 768},
    "text_encoder_2": _XL_TEXT
    | {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
    },
    "scheduler": _SCHEDULER
    | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "prediction_type": "epsilon"},
    "index": {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
}
_T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "dense_act_fn": "gelu_new",
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_heads": 64,
    "num_layers": 24,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}
_IF_UNET = {
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 64,
    "attention_head_dim": 64,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 6,
    "resnet_time_scale_shift": "scale_shift",
    "_class_name": "UNet2DConditionModel",
}
_IF_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": True,
    "dynamic_thresholding_ratio": 0.95,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.5,
    "thresholding": True,
    "variance_type": "learned_range",
}


def _if_stage_i(widths: list[int]) -> dict:
    """IF-I: M and L by their numbers of parameters, XL as a stored copy of its config has it."""
    unet = {
        "block_out_channels": widths,
        "cross_attention_dim": widths[-1],
        "down_block_types": ["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * 3,
        "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
        "in_channels": 3,
        "layers_per_block": 3,
        "sample_size": 64,
    }
    index = {"_class_name": "IFPipeline"}
    return {"unet": _IF_UNET | unet, "text_encoder": _T5_XXL, "scheduler": _IF_SCHEDULER, "index": index}


_IF_II_L = {
    "unet": _IF_UNET
    | {
        "block_out_channels": [160, 320, 640, 960, 1280],
        "class_embed_type": "timestep",
        "cross_attention_dim": 1280,
        "down_block_types": ["ResnetDownsampleBlock2D"] * 3 + ["SimpleCrossAttnDownBlock2D"] * 2,
        "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 2 + ["ResnetUpsampleBlock2D"] * 3,
        "in_channels": 6,
        "layers_per_block": [2, 2, 3, 5, 5],
        "mid_block_scale_factor": 1.4142271248762552,
        "resnet_out_scale_factor": 1.4142271248762552,
        "resnet_skip_time_act": True,
        "sample_size": 256,
        "time_embedding_act_fn": "gelu",
        "time_embedding_dim": 1280,
    },
    "text_encoder": _T5_XXL,
    "scheduler": _IF_SCHEDULER | {"sample_max_value": 1.0},
    "image_noising_scheduler": {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"},
    "index": {"_class_name": "IFSuperResolutionPipeline"},
}
_X4_BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
_X4 = {
    "unet": _UNET
    | {
        "block_out_channels": [256, 512, 512, 1024],
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
        "attention_head_dim": 8,
        "cross_attention_dim": 1024,
        "in_channels": 7,
        "num_class_embeds": 1000,
        "only_cross_attention": [True, True, True, False],
        "sample_size": 128,
        "use_linear_projection": True,
    },
    "vae": _VAE
    | {
        "block_out_channels": [128, 256, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "sample_size": 256,
        "scaling_factor": 0.08333,
    },
    "text_encoder": _SD21["text_encoder"],
    "scheduler": _SCHEDULER | _X4_BETAS | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "low_res_scheduler": _X4_BETAS | {"_class_name": "DDPMScheduler"},
    "index": {"_class_name": "StableDiffusionUpscalePipeline"},
}
CONFIGS = {
    "DeepFloyd/IF-I-M-v1.0": _if_stage_i([192, 384, 576, 768]),
    "DeepFloyd/IF-I-L-v1.0": _if_stage_i([320, 640, 960, 1280]),
    "DeepFloyd/IF-I-XL-v1.0": _if_stage_i([704, 1408, 2112, 2816]),
    "DeepFloyd/IF-II-L-v1.0": _IF_II_L,
    "stabilityai/stable-diffusion-x4-upscaler": _X4,
    "CompVis/stable-diffusion-v1-4": _SD1,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD1,
    "stabilityai/stable-diffusion-2-1": _SD21,
    "stabilityai/stable-diffusion-xl-base-1.0": _SDXL,
}
