"""LoRA files with PEFT's names, as diffusers writes and reads them: `unet.MODULE.lora_A.weight`, `.lora_B.weight`.

Readers without metadata take alpha for the rank, and some take the first module's alpha for all: all modules are
written with one rank, padded with zeros, and with alpha equal to it.
"""

import json
import os
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from dreambooth_jax.adapters.factors import MAGNITUDE, by_module, parse, rank_of
from dreambooth_jax.files.stream import as_tensor, write_tensors
from dreambooth_jax.models.params import Tensors


def to_file(factors: Tensors) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(key -> tensor, metadata) of a file with the factors, which have their scale multiplied in.

    Raises:
        ValueError: a factor is neither LoRA's nor DoRA's.
    """
    others = sorted({parse(name)[1] for name in factors} - {"lora_A", "lora_B", MAGNITUDE})
    if others:
        raise ValueError(f"PEFT files hold LoRA and DoRA, not {', '.join(others)}; write a kohya file (the default)")
    tensors: dict[str, np.ndarray] = {}
    configs: dict[str, Any] = {}
    modules = by_module(factors)
    for part in dict.fromkeys(module.partition(".")[0] for module in modules):
        own = {module: named for module, named in modules.items() if module.startswith(f"{part}.")}
        rank = max(rank_of(named) for named in own.values())
        for module, named in own.items():
            tensors |= {f"{module}.{leaf}": value for leaf, value in _tensors(named, rank).items()}
        dora = any(f"{MAGNITUDE}.scale" in named for named in own.values())
        # PEFT compares ends of names; transformers 5 has no "text_model." in them.
        targets = sorted(module.removeprefix(f"{part}.").removeprefix("text_model.") for module in own)
        configs |= {
            f"{part}.{name}": value
            for name, value in {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": rank,
                "use_dora": dora,
                "rank_pattern": {},
                "alpha_pattern": {},
                "target_modules": targets,
            }.items()
        }
    return tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(configs, sort_keys=True)}


def _tensors(named: Tensors, rank: int) -> dict[str, np.ndarray]:
    a, b = np.asarray(named["lora_A.kernel"]), np.asarray(named["lora_B.kernel"])
    missing = rank - b.shape[0]
    a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)])
    b = np.pad(b, [(0, missing), (0, 0)]).T
    found = {
        "lora_A.weight": a.T if a.ndim == 2 else a.transpose(3, 2, 0, 1),
        "lora_B.weight": b if a.ndim == 2 else b[..., None, None],
    }
    magnitude = named.get(f"{MAGNITUDE}.scale")
    if magnitude is not None:
        found["lora_magnitude_vector"] = np.asarray(magnitude).reshape((1, -1, 1, 1) if a.ndim == 4 else -1)
    return found


def write_peft(path: str | os.PathLike, factors: Tensors, *, dtype: DTypeLike) -> None:
    """Writes one file for diffusers; arguments and errors are those of `lora_kohya.write_kohya` and `to_file`."""
    tensors, metadata = to_file(factors)
    write_tensors(path, {key: as_tensor(value) for key, value in tensors.items()}, dtype=dtype, metadata=metadata)
