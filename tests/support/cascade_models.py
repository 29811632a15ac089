"""Small configs of the pixel cascade's models, in every variant that published files have."""

IF_STAGE_I = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 16,
    "cross_attention_dim": 64,
    "encoder_hid_dim": 32,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "act_fn": "gelu",
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "norm_num_groups": 16,
}
IF_STAGE_II = IF_STAGE_I | {
    "sample_size": 32,
    "in_channels": 6,
    "class_embed_type": "timestep",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.4142271248762552,
    "mid_block_scale_factor": 1.4142271248762552,
    "time_embedding_act_fn": "gelu",
    "time_embedding_dim": 48,
    "layers_per_block": (1, 2),
}
T5 = {
    "vocab_size": 128,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 3,  # heads of 24 together: not the model's width
    "feed_forward_proj": "gated-gelu",
}
_II = {name: value for name, value in IF_STAGE_II.items() if value != IF_STAGE_I.get(name)}
# Published configs (deep-floyd and derivatives), less what they share with IF_STAGE_I.
_FULL = IF_STAGE_I | {
    "attention_head_dim": 64,
    "encoder_hid_dim": 4096,
    "addition_embed_type_num_heads": 64,
    "norm_num_groups": 32,
}
_I_BLOCKS = {
    "sample_size": 64,
    "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
    "layers_per_block": 3,
}
FULL_SIZE = {
    "IF-I-M": _FULL | _I_BLOCKS | {"block_out_channels": (192, 384, 576, 768), "cross_attention_dim": 768},
    "IF-I-L": _FULL | _I_BLOCKS | {"block_out_channels": (320, 640, 960, 1280), "cross_attention_dim": 1280},
    "IF-I-XL": _FULL | _I_BLOCKS | {"block_out_channels": (704, 1408, 2112, 2816), "cross_attention_dim": 2816},
    "IF-II-L": _FULL
    | _II
    | {
        "sample_size": 256,
        "block_out_channels": (160, 320, 640, 960, 1280),
        "down_block_types": (*("ResnetDownsampleBlock2D",) * 3, *("SimpleCrossAttnDownBlock2D",) * 2),
        "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 2, *("ResnetUpsampleBlock2D",) * 3),
        "layers_per_block": (2, 2, 3, 5, 5),
        "cross_attention_dim": 1280,
        "time_embedding_dim": 1280,
    },
}
X4 = {
    "sample_size": 128,
    "in_channels": 7,
    "out_channels": 4,
    "block_out_channels": (256, 512, 512, 1024),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
    "attention_head_dim": 8,
    "cross_attention_dim": 1024,
    "only_cross_attention": [True, True, True, False],
    "num_class_embeds": 1000,
    "use_linear_projection": True,
}
