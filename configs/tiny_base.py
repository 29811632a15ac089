"""The embedded base: Stable Diffusion's recipe at 1/100 of its size, on a picture world of openly licensed sprites.

    python -m dreambooth_jax.pretrain --config configs/tiny_base.py

On a CPU, one device per core with single-threaded matrix products is 1.5 times as fast, and huge pages help too:

    export XLA_FLAGS="--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false"
    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4000000000
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.workdir = "runs/tiny_base"  # checkpoints of every part; a killed run goes on from them
    config.output = "dreambooth_jax/tiny/base"  # the folder that is written at the end
    config.world = ""  # folder with the two npm tarballs; "" fetches them
    config.seed = 0
    config.vocabulary = "core"  # or "all": 224 or 581 class nouns
    config.num_images = 60_000  # rendered once, resident
    config.resolution = 64
    config.max_length = 24  # tokens of a prompt
    config.unconditional = 0.1  # share of examples without caption, for classifier-free guidance
    config.subject_weight = 4.0  # how many times as often as others the classes of DreamBooth's data set are shown
    config.steps_per_call = 20
    config.save_seconds = 240  # between checkpoints

    config.vae = ConfigDict()
    config.vae.steps = 3000
    config.vae.batch_size = 24
    config.vae.learning_rate = 2e-3
    config.vae.lr_schedule = "cosine"
    config.vae.kl_weight = 1e-6
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
        "scaling_factor": 1.0,  # replaced by the measured one
    }

    config.clip = ConfigDict()
    config.clip.steps = 1600
    config.clip.decay_steps = 1560  # the last ones, over which the learning rate falls to 0
    config.clip.batch_size = 128
    config.clip.learning_rate = 2e-3
    config.clip.weight_decay = 1e-2
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
    config.vit.steps = 700
    config.vit.decay_steps = 680
    config.vit.batch_size = 128  # 64 pairs
    config.vit.learning_rate = 2e-3
    config.vit.weight_decay = 1e-2
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
    config.unet.steps = 9_300
    config.unet.decay_steps = 900  # the last ones, over which the learning rate falls to 0
    config.unet.batch_size = 96
    config.unet.learning_rate = 1e-3
    config.unet.weight_decay = 1e-2
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
    return config
