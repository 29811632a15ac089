"""DreamBooth on five pictures of a dog. Every field of the library is here; override any with --config.FIELD=VALUE.

python -m dreambooth_jax.train --config configs/dog.py           # the embedded base, any laptop, no network
python -m dreambooth_jax.train --config configs/dog.py:sd15      # Stable Diffusion 1.5; also :sd14, :sd21, :sdxl
python -m dreambooth_jax.train --config configs/dog.py:sd15,lora # LoRA instead of full fine-tuning; also :tiny,dora ...
python -m dreambooth_jax.train --config configs/dog.py:paper     # the paper's own settings, on Stable Diffusion 1.5
python -m dreambooth_jax.train --config configs/dog.py:if        # DeepFloyd IF, the paper's kind of model: 64, then 256
                                                                 # pixels, one stage after the other; also :if_xl
python -m dreambooth_jax.train --config configs/dog.py:tiny_cascade # the same kind, embedded: 32, then 64 pixels, any
                                                                 # laptop; :tiny_stage1 is its stage I alone

Result: samples/step_000300.png in the workdir shows the dog of the photos in five settings, and "a dog" that is still
another dog. Time: two to three minutes on two CPU cores; `python -m dreambooth_jax.plan` estimates it for a TPU.
"""

from ml_collections import ConfigDict

HUB_MODELS = {
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "paper": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "if": "DeepFloyd/IF-I-M-v1.0",
    "if_xl": "DeepFloyd/IF-I-XL-v1.0",
}
# A third stage, to 1024 pixels: append "stabilityai/stable-diffusion-x4-upscaler" and its fields to these.
FURTHER_STAGES = {"if": ("DeepFloyd/IF-II-M-v1.0",), "if_xl": ("DeepFloyd/IF-II-L-v1.0",)}
EMBEDDED = ("tiny", "tiny_stage1", "tiny_cascade")


def get_config(base_and_method: str = "tiny") -> ConfigDict:
    base, _, method = base_and_method.partition(",")
    config = ConfigDict()

    # What is learnt, from what
    config.base = "tiny"  # "tiny", "tiny_stage1", "tiny_stage2" ship with the package; else a folder or a hub name
    config.workdir = "runs/dog"  # checkpoints, class images, samples, metrics; local or gs://
    config.instance_images = "examples/subjects/dog"  # a folder, hub:OWNER/NAME or tfds:NAME:SPLIT (docs/data.md)
    config.subjects = ""  # many subjects in one program: a folder of folders of images, or a table (configs/many.py)
    config.identifier = "sks"  # a rare token: python -m dreambooth_jax.identifier proposes some
    config.class_noun = "dog"
    config.instance_prompt = "a photo of {identifier} {class_noun}"
    config.captions = "auto"  # "auto": the images' own captions where there are any; "template": always the prompt
    config.shuffle_tags = 0  # orders of a caption's tags, one drawn per step; the first tag stays; 0: as written
    config.caption_dropout = 0.0  # probability of the empty caption
    config.masked_loss = False  # loss inside masks alone: NAME-masklabel.png, or an image's opacity
    config.resolution = 0  # pixels, 0 for the base's own; images are resized (Lanczos) and cropped to squares
    config.buckets = False  # photos keep about their ratio of sides, in one of some shapes of the square's area
    config.crop = "center"  # or "random"
    config.flip = False  # mirror half of the views
    config.views = 1  # augmented views drawn of each image, for random crops and flips
    config.seed = 0

    # Cascades: stage I paints small pictures, every further stage enlarges those of the one before
    config.stage = 0  # stage to train; 0 for all, one after the other in one workdir, or for a base that is no cascade
    config.stages = ()  # bases of the further stages; `base` is stage I
    config.stage_fields = ()  # values of other fields in stage II, III, ...: ((("steps", 100), ...), ...)
    config.sr_noise = "1e-5"  # variance of the noise on low-resolution pictures, or "uniform": any level of the base's
    config.sr_crop = 0  # side in pixels of the random crops for a super-resolution stage; 0 for whole pictures

    # Prior preservation (arXiv 2208.12242, section 3.3)
    config.prior_preservation = True
    config.prior_weight = 1.0  # lambda
    config.prior_target = "noise"  # or "base": the frozen model's prediction at the class prompt; needs no class images
    config.class_prompt = "a photo of {class_noun}"
    config.class_images = ""  # folder of class images; "" is workdir/class_images, also for what the folder lacks
    config.create_class_images = False  # paint a new class_images folder, to share between runs
    config.num_class_images = 100  # the frozen base paints what is missing
    config.class_batch_size = 20  # most pictures painted at once, over all devices

    # Training
    config.method = "full"  # fine-tuning of all weights; low-rank differences: "lora", "dora", "loha", "lokr"; a new
    # token for the identifier: "inversion" (alone), "pivotal" (with LoRA), "custom" (with cross-attention's k and v)
    config.lora_rank = 8
    config.lora_alpha = 8.0  # the difference is scaled by alpha / rank
    config.lora_targets = "attention"  # or "cross", "transformer", "all"; or a regex for the ends of modules' names
    config.lora_ranks = ()  # exceptions, the first match holds: (("^text_encoder", 4, 4.0), ...): regex, rank, alpha
    config.lora_scaling = "standard"  # or "stabilized": alpha / sqrt(rank) (arXiv 2312.03732)
    config.lora_plus_ratio = 1.0  # learning rate of the second factor over that of the first (arXiv 2402.12354)
    config.init_adapter = ""  # adapter file to go on from, of the same modules and ranks
    config.init_embedding = ""  # embedding file that the new token starts as, with as many vectors
    config.token_vectors = 1  # vectors of the new token
    config.token_start = ""  # words whose vectors it starts as; "" for the class noun
    config.templates = ""  # or "object", "style": captions of many wordings (arXiv 2208.01618) in place of the prompt
    config.pivotal_fraction = 0.5  # share of the steps after which the token's vectors stay ("pivotal")
    config.steps = 300
    config.batch_size = 4  # instance images per step over all devices; as many class images join them
    config.accumulate = 1  # parts in which a batch is computed, one after the other
    config.train_text_encoder = True
    config.text_encoder_multiplier = 0.1  # of the learning rate, for the text encoder
    config.optimizer = "adamw"  # or "adafactor", or "muon": matrices with orthogonal updates, the others by AdamW
    config.moment_dtype = "float32"  # of the first moment of AdamW or Muon; "bfloat16" saves two bytes per trained
    # parameter, "int8" three (AdamW alone)
    config.second_moment_dtype = "float32"  # of AdamW's second moment; "bfloat16" and "int8", rounded at random, too
    config.learning_rate = 2e-4
    config.lr_schedule = "constant"  # or "linear", "cosine": to 0 at the last step
    config.lr_warmup_steps = 0
    config.weight_decay = 1e-2
    config.clip_norm = 1.0  # global norm of the gradient; 0 for no clipping
    config.snr_gamma = 0.0  # min-SNR-gamma (arXiv 2303.09556); 0 for none
    config.ema_decay = 0.0  # running average of the trained weights, used for pictures; 0 for none

    # Hardware
    config.dtype = "float32"  # of the computation; "bfloat16" on TPUs. Trained weights are always float32
    config.frozen_dtype = ""  # "int8": frozen kernels in eight bits, half of bfloat16's memory; "": in `dtype`
    config.remat = "nothing"  # or "elementwise", "layers": recomputed in the backward pass; less memory, more time
    config.mesh_data = -1  # devices along each mesh axis; -1 takes what the other leaves
    config.mesh_fsdp = 1  # parameters and optimizer state are split over this axis
    config.steps_per_call = 10  # steps on the device between two looks of the host

    # What is kept and shown
    config.save_every = 100  # steps; the last step is always saved
    config.keep_last = 2  # newest checkpoints; a damaged one is set aside and the one before it is taken
    config.keep_every = 0  # besides those, every checkpoint at a multiple of this; 0 for none
    config.sample_every = 100
    config.sample_prompts = (
        "a {identifier} {class_noun} in the snow",
        "a {identifier} {class_noun} on the beach",
        "a {identifier} {class_noun} in front of a brick wall",
        "a {identifier} {class_noun} in the jungle",
        "a {identifier} {class_noun} on a red background",
        "a {class_noun}",
    )
    config.sample_count = 6  # pictures per prompt
    config.evaluate_every = 0  # steps between scores of the sample pictures, a multiple of sample_every; 0 for none
    config.held_out_images = ""  # kept out of training, their loss measured: the number of last photos, or a folder
    config.keep_best = False  # keep the weights with the highest DINO of all scored steps in workdir/best
    config.best_max_prompt_loss = 0.02  # of those that lose no more CLIP-T than this against the base
    config.best_max_copy = 0.0  # and paint nothing as similar to a photo (cosine in DINO); 0: the copy detector's limit
    config.patience = 0  # scores without a better one that end the training; 0: never
    config.judge_dino = "facebook/dino-vits16"  # folders or hub names of the models that score; the embedded base is
    config.judge_clip = "openai/clip-vit-base-patch32"  # scored by the models beside it
    config.sampler = "dpm++"  # or "ddim", "euler", and ancestral "ddpm", "euler_a"; also paints the class images
    config.sampling_steps = 20
    config.reuse_features = 1  # steps of a sheet's picture that share the deep features of the first; 1: none do
    config.guidance_scale = 2.5
    config.negative_prompt = ""

    if base not in (*EMBEDDED, *HUB_MODELS):
        raise ValueError(f"dog.py:{base}: expected one of {', '.join((*EMBEDDED, *HUB_MODELS))}")
    if base in HUB_MODELS:
        config.base = HUB_MODELS[base]
        config.num_class_images = 200
        config.class_batch_size = 8
        config.steps = 800
        config.batch_size = 1
        config.learning_rate = 2e-6
        config.text_encoder_multiplier = 1.0
        config.dtype = "bfloat16"
        config.remat = "elementwise"
        config.save_every = 400
        config.sample_every = 200
        config.sample_count = 2
        config.sampling_steps = 25
        config.guidance_scale = 7.5
    if base == "paper":  # arXiv 2208.12242, sections 3.3 and 4
        config.instance_prompt = "a {identifier} {class_noun}"
        config.class_prompt = "a {class_noun}"
        config.num_class_images = 1000
        config.sampler = "ddpm"  # ancestral sampling
        config.sampling_steps = 100
        config.steps = 1000
        config.learning_rate = 5e-6
    if base == "sdxl":  # 1024 px
        config.class_batch_size = 4
        config.learning_rate = 1e-6
        config.train_text_encoder = False
        config.moment_dtype = "bfloat16"
        config.remat = "layers"
        config.sample_count = 1
        config.guidance_scale = 5.0
    if base in FURTHER_STAGES:  # arXiv 2208.12242: 1,000 steps at 1e-5, T5 frozen, the ancestral sampler
        config.stages = FURTHER_STAGES[base]
        config.stage_fields = (
            (("learning_rate", 5e-6), ("guidance_scale", 4.0), ("sampling_steps", 50), ("class_batch_size", 4)),
        )
        config.steps = 1000
        config.learning_rate = 1e-5
        config.train_text_encoder = False
        config.sampler = "ddpm"
        config.sampling_steps = 100
        config.guidance_scale = 7.0
    if base in ("tiny_stage1", "tiny_cascade"):
        config.base = "tiny_stage1"
        config.train_text_encoder = False
        config.sampler = "ddpm"
        config.sampling_steps = 50
        config.steps = 400
        config.learning_rate = 3e-4
    if base == "tiny_cascade":
        config.stages = ("tiny_stage2",)
        config.stage_fields = (
            (("steps", 200), ("learning_rate", 2e-4), ("guidance_scale", 1.5), ("sampling_steps", 25)),
        )
    if method:
        rates = {
            "lora": 1e-4,
            "dora": 1e-4,
            "loha": 1e-4,
            "lokr": 1e-4,
            "inversion": 5e-3,
            "pivotal": 1e-4,
            "custom": 1e-5,
        }
        if method not in rates:
            raise ValueError(f"dog.py:{base_and_method}: expected nothing after the base, or one of {', '.join(rates)}")
        config.method = method
        config.learning_rate = rates[method]
        if base not in HUB_MODELS:
            config.learning_rate = 1e-2 if method == "inversion" else 2e-3
        if method in ("inversion", "pivotal", "custom"):
            config.identifier = "<sks>"  # a new word
            config.templates = "object"
            config.train_text_encoder = False  # apart from the word's vectors, which take the whole rate
            config.text_encoder_multiplier = 1.0
        if method == "inversion":  # the model itself, and with it the class, stays as it is
            config.prior_preservation = False
    return config
