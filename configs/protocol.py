"""The paper's protocol (arXiv 2208.12242, section 4.2): every subject of a data set trained, painted and scored.

git clone https://github.com/google/dreambooth                     # 30 subjects
python -m dreambooth_jax.evaluate --config configs/protocol.py:sd15       # Stable Diffusion 1.5; also :sd14, :sd15,lora
python -m dreambooth_jax.evaluate --config configs/protocol.py            # the embedded base on its own six subjects

The same command goes on where it was stopped. The tables and a page are in the workdir.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

DOG = Path(__file__).parent / "dog.py"


def get_config(base_and_method: str = "tiny") -> ConfigDict:
    config = ConfigDict()
    dog = runpy.run_path(str(DOG))
    embedded = base_and_method.split(",")[0] in dog["EMBEDDED"]

    # Subjects
    config.dataset = "examples/subjects" if embedded else "dreambooth/dataset"  # NAME/*.jpg, prompts_and_classes.txt
    config.subjects = ()  # names of the subjects; () for all
    config.workdir = "runs/protocol"  # a run per subject, class images per class, tables, page
    config.keep_checkpoints = embedded  # of scored subjects; False: deleted to save space
    config.at_once = 1  # subjects in one program, for adapters: tiny,lora or sd15,lora

    # Scores
    config.prompts = "world" if embedded else "paper"  # 25 in the embedded base's words, or the data set's
    config.count = 4  # pictures per prompt
    config.class_count = 16  # pictures of the bare class, for PRES and drift
    config.judge = "auto"  # "auto": the models beside the embedded base for it, else "published"
    config.dino = "facebook/dino-vits16"  # folder or hub name
    config.clip = "openai/clip-vit-base-patch32"  # folder or hub name
    config.transform = "official"  # of DINO's pictures, or "hub"
    config.lpips = ""  # folder of benchmarks/convert_weights.py, for DIV; "": DINO's patches without learnt weights
    config.backbone = "alex"  # of LPIPS, or "vgg"

    # Training: every field of configs/dog.py; workdir, photos and class noun are set per subject. "{class_noun}" in
    # class_images is the noun; "" is workdir/class_images/NOUN
    config.train = dog["get_config"](base_and_method)
    config.train.sample_prompts = ()
    return config
