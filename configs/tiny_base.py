"""The embedded base: Stable Diffusion's recipe at 1/100 of its size, on a picture world of openly licensed sprites.

python -m dreambooth_jax.pretrain --config configs/tiny_base.py       # 18 nouns, a CPU, two hours
python -m dreambooth_jax.pretrain --config configs/tiny_base.py:gpu   # 77 nouns, larger batches, for one accelerator
python -m dreambooth_jax.pretrain --config configs/tiny_base.py:more  # the shipped base further on this world, a CPU

The perceptual loss reads LPIPS weights: python benchmarks/convert_weights.py lpips-alex

On a CPU, one device per core with single-threaded matrix products is 1.5 times as fast, and huge pages help too:

    export XLA_FLAGS="--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false"
    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4000000000
"""

from ml_collections import ConfigDict


def get_config(budget: str = "cpu") -> ConfigDict:
    config = ConfigDict()
    config.workdir = "runs/tiny_base"  # checkpoints of every part; a killed run goes on from them
    config.output = "runs/tiny_base/base"  # folder of the result
    config.world = ""  # folder with the three npm tarballs; "" fetches them
    config.lpips = "~/.cache/dreambooth_jax/lpips-alex"  # folder of LPIPS weights; "" for none
    config.seed = 0
    config.vocabulary = "subjects"  # DreamBooth's classes, 18; or "examples" (6), "core" (77), "all" (581)
    config.resolution = 64
    config.max_length = 24  # tokens of a prompt
    config.unconditional = 0.1  # share of examples without caption, for classifier-free guidance
    config.subject_share = 0.5  # of the draws: classes of DreamBooth's data set
    config.dtype = "float32"  # of autoencoder, UNet and its text tower; trained weights are always float32
    config.steps_per_call = 20
    config.save_seconds = 240  # between checkpoints
    config.scheduler = {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "timestep_spacing": "trailing",
    }

    config.vae = ConfigDict()
    config.vae.start = ""  # base whose weights the part begins with; "" for random ones
    config.vae.steps = 1600
    config.vae.decay_steps = 800  # the last ones, over which the learning rate falls to 0
    config.vae.batch_size = 32
    config.vae.learning_rate = 2e-3
    config.vae.weight_decay = 1e-4
    config.vae.ema_decay = 0.0
    config.vae.kl_weight = 1e-6
    config.vae.lpips_weight = 0.5
    config.vae.trainable = ""  # regular expression of the trained parameters; "" for all
    config.vae.model = {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [16, 32, 64, 128],
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 8,
        "sample_size": 64,
        "scaling_factor": 1.0,  # the latents themselves are normalised
    }

    config.clip = ConfigDict()
    config.clip.start = "tiny"  # its text tower is taken too, as the UNet's
    config.clip.steps = 0  # 1600 from random weights
    config.clip.decay_steps = 1560
    config.clip.batch_size = 128
    config.clip.learning_rate = 2e-3
    config.clip.weight_decay = 1e-2
    config.clip.ema_decay = 0.0
    config.clip.projection_dim = 128
    config.clip.text = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "hidden_act": "quick_gelu",
    }
    config.clip.vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "hidden_act": "quick_gelu",
    }

    config.vit = ConfigDict()
    config.vit.start = "tiny"
    config.vit.steps = 0  # 700 from random weights
    config.vit.decay_steps = 680
    config.vit.batch_size = 128  # 64 pairs
    config.vit.learning_rate = 2e-3
    config.vit.weight_decay = 1e-2
    config.vit.ema_decay = 0.0
    config.vit.temperature = 0.1
    config.vit.model = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "image_size": 64,
        "patch_size": 8,
    }

    config.unet = ConfigDict()
    config.unet.start = ""
    config.unet.steps = 2700
    config.unet.decay_steps = 1200
    config.unet.batch_size = 64
    config.unet.learning_rate = 2e-3
    config.unet.weight_decay = 1e-2
    config.unet.ema_decay = 0.998  # average of the weights, which is what is written
    config.unet.t_power = 1.0  # t = T u^t_power, u uniform: above 1, fewer draws at the noisiest levels
    config.unet.model = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 8,
        "in_channels": 16,
        "out_channels": 16,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [96, 192],
        "layers_per_block": 1,
        "cross_attention_dim": 128,
        "attention_head_dim": [3, 6],
        "norm_num_groups": 16,
    }

    if budget == "gpu":
        config.vocabulary = "core"
        config.dtype = "bfloat16"
        config.steps_per_call = 50
        config.save_seconds = 120
        config.vae.batch_size, config.vae.steps, config.vae.decay_steps = 256, 4000, 2000
        config.clip.update(start="", steps=1600, batch_size=512)
        config.vit.update(start="", steps=700, batch_size=512)
        config.unet.update(batch_size=512, steps=12_000, decay_steps=2000, learning_rate=1e-3, ema_decay=0.999)
        config.unet.model.update(block_out_channels=[128, 224], attention_head_dim=[4, 7])
    elif budget == "more":
        _continue_shipped_base(config)
    elif budget != "cpu":
        raise ValueError(f"tiny_base.py:{budget}: expected cpu, gpu or more")
    return config


def _continue_shipped_base(config: ConfigDict) -> None:
    """The architecture of the shipped base. Its encoder, CLIP and ViT stay: features remain comparable."""
    config.vocabulary = "core"
    config.vae.start = config.unet.start = "tiny"
    config.scheduler.update(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    config.vae.update(trainable="decoder|post_quant", steps=3000, decay_steps=2000, learning_rate=5e-4)
    config.vae.model = {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [16, 32, 64],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": 64,
        "scaling_factor": 0.6580073237419128,
    }
    config.unet.update(steps=4000, decay_steps=0, batch_size=48, learning_rate=5e-4, ema_decay=0.998, t_power=1.3)
    config.unet.model = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [64, 128, 192],
        "layers_per_block": 1,
        "cross_attention_dim": 128,
        "attention_head_dim": [2, 4, 6],
        "norm_num_groups": 16,
    }
