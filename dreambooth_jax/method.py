"""What trains: a method is the choice of trainable parameters and how they join the frozen ones.

Loss, step, checkpoint and sampler know only `trainable`, `frozen` and `combine(frozen, trainable) -> params`.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

from ml_collections import ConfigDict

from dreambooth_jax.params import Params

Value = TypeVar("Value")


def trainable_pattern(config: ConfigDict) -> str:
    """Which parameters full fine-tuning trains: a regex for their names."""
    return r"^(unet|text_encoder)\." if config.train_text_encoder else r"^unet\."


def split(params: Mapping[str, Value], pattern: str) -> tuple[dict[str, Value], dict[str, Value]]:
    """(trainable, frozen): the parameters whose name `pattern` is found in, and the others."""
    trainable = {name: value for name, value in params.items() if re.search(pattern, name)}
    return trainable, {name: value for name, value in params.items() if name not in trainable}


def combine(frozen: Params, trainable: Params) -> Params:
    """All parameters under their names: the trained ones in the places of the base's."""
    return frozen | trainable
