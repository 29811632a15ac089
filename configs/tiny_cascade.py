"""The embedded cascade: Imagen's recipe at 1/1000 of its size, 32 pixels, then 64, on the world of the embedded base.

python -m dreambooth_jax.pretrain --config configs/tiny_cascade.py       # six nouns; what ships; a CPU, hours
python -m dreambooth_jax.pretrain --config configs/tiny_cascade.py --config.start=tiny_stage1  # its stage II alone
python -m dreambooth_jax.pretrain --config configs/tiny_cascade.py:gpu   # wider, 77 nouns, for one accelerator

The settings of XLA_FLAGS and GLIBC_TUNABLES in configs/tiny_base.py help here too.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config(budget: str = "cpu") -> ConfigDict:
    config = ConfigDict()
    config.workdir = "runs/tiny_cascade"  # checkpoints of every part; a killed run goes on from them
    config.output = "runs/tiny_cascade/base"  # folders stage1 and stage2
    config.world = ""  # folder with the three npm tarballs; "" fetches them
    config.start = ""  # a stage I to take UNet and T5 from; "" trains both first
    config.seed = 0
    config.vocabulary = "examples"  # or "core", "all": the 6 class nouns of examples/subjects, 77, or 581
    config.resolution = 64  # of stage II
    config.factor = 2  # side of stage II's pictures over that of stage I's
    config.max_length = 77  # tokens of a prompt, of which the UNets read all
    config.unconditional = 0.1  # share of examples without caption, for classifier-free guidance
    config.subject_share = 0.5  # of the draws: classes of DreamBooth's data set
    config.dtype = "float32"  # of the computation; trained weights are always float32
    config.steps_per_call = 20
    config.save_seconds = 240  # between checkpoints
    config.scheduler = {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": True,
        "dynamic_thresholding_ratio": 0.95,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "sample_max_value": 1.5,
        "thresholding": True,
        "timestep_spacing": "trailing",
        "variance_type": "fixed_small",
    }
    config.noising = {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "num_train_timesteps": 1000,
    }
    config.text = {
        "d_ff": 256,
        "d_kv": 32,
        "d_model": 128,
        "feed_forward_proj": "gated-gelu",
        "num_heads": 4,
        "num_layers": 4,
    }

    config.stage1 = ConfigDict()
    config.stage1.steps = 2000
    config.stage1.decay_steps = 1400  # the last ones, over which the learning rate falls to 0
    config.stage1.batch_size = 64
    config.stage1.learning_rate = 2e-3
    config.stage1.weight_decay = 1e-2
    config.stage1.ema_decay = 0.998  # average of the weights, which is what is written
    config.stage1.level_power = 1.0  # stage II: noise level of the small picture T u^level_power, u uniform
    config.stage1.model = _unet((32, 64, 96), 1, sample_size=32, in_channels=3)

    config.rare_words = ConfigDict()  # T5 once more, to tell apart words that no caption has (tiny/rare_words.py)
    config.rare_words.steps = 1500
    config.rare_words.batch_size = 64
    config.rare_words.learning_rate = 2e-3
    config.rare_words.lr_schedule = "cosine"
    config.rare_words.ema_decay = 0.0

    config.stage2 = config.stage1.copy_and_resolve_references()
    config.stage2.update(steps=2600, decay_steps=1300, level_power=2.0)
    config.stage2.model = _unet((16, 32, 64), 2, sample_size=64, in_channels=6, class_embed_type="timestep")
    config.stage2.model.norm_num_groups = 4  # groups of one channel lose its mean, and with it the colour

    if budget == "gpu":
        config.vocabulary = "core"
        config.dtype = "bfloat16"
        config.steps_per_call = 50
        config.save_seconds = 120
        config.stage1.update(batch_size=512, steps=8000, decay_steps=1500, learning_rate=1e-3, ema_decay=0.999)
        config.stage1.model.block_out_channels = [48, 96, 144]
        config.stage2.update(batch_size=256, steps=3000, decay_steps=500, learning_rate=1e-3, ema_decay=0.999)
        config.stage2.model.block_out_channels = [32, 48, 64]
    elif budget != "cpu":
        raise ValueError(f"tiny_cascade.py:{budget}: expected cpu or gpu")
    return config


def _unet(widths: tuple[int, ...], plain: int, **fields: Any) -> dict[str, Any]:
    """IF's UNet, without attention at its `plain` highest resolutions."""
    deeper = len(widths) - plain
    return {
        "_class_name": "UNet2DConditionModel",
        "out_channels": 6,
        "block_out_channels": list(widths),
        "down_block_types": ["ResnetDownsampleBlock2D"] * plain + ["SimpleCrossAttnDownBlock2D"] * deeper,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ["SimpleCrossAttnUpBlock2D"] * deeper + ["ResnetUpsampleBlock2D"] * plain,
        "layers_per_block": 1,
        "act_fn": "silu",
        "norm_num_groups": 16,
        "attention_head_dim": 32,
        "cross_attention_dim": 128,
        "cross_attention_norm": "group_norm",
        "encoder_hid_dim": 128,
        "encoder_hid_dim_type": "text_proj",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 4,
        "resnet_time_scale_shift": "scale_shift",
        **fields,
    }
