"""A LoRA for each of many subjects, all trained in one program over one frozen base.

python -m dreambooth_jax.train --config configs/many.py --config.subjects=photos  # photos/NAME/*.jpg
python -m dreambooth_jax.train --config configs/many.py:sd15 --config.subjects=subjects.csv

A table has the columns name, photos, identifier, class_noun, steps, learning_rate and lora_rank; the config's values
stand for those that it lacks. Every subject's file, workdir/NAME.safetensors, is written when its steps are done; paint
with `sample --lora`, and see how much subjects mix with `evaluate --workdir`.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def get_config(base: str = "tiny") -> ConfigDict:
    """The config of dog.py with LoRA, and fields of its own."""
    spec = importlib.util.spec_from_file_location("dog", Path(__file__).with_name("dog.py"))
    dog = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dog)
    config = dog.get_config(f"{base},lora")
    config.workdir = "runs/many"
    config.subjects = "examples/subjects"
    config.sample_prompts = ()
    config.batch_size = 1
    return config
