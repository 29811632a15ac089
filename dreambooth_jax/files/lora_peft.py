"""LoRA files with PEFT's names, as diffusers writes and reads them: `unet.MODULE.lora_A.weight`, `.lora_B.weight`."""

import jax.numpy as jnp

from dreambooth_jax.adapters.factors import by_module
from dreambooth_jax.models.params import Params

FILE = "pytorch_lora_weights.safetensors"


def lora_for_files(params: Params) -> Params:
    """The factors of `params` as PEFT files store them. A convolution's B becomes a 1x1 convolution.

    The scale alpha / rank is in B already (`combine`), as these files have no alpha and readers assume alpha = rank.
    """
    factors = {name: value for name, value in params.items() if ".lora_" in name}
    for module, named in by_module(params).items():
        window = (1,) * (named["lora_A.kernel"].ndim - 2)
        factors[f"{module}.lora_B.kernel"] = jnp.reshape(
            named["lora_B.kernel"], (*window, *named["lora_B.kernel"].shape)
        )
    return factors
