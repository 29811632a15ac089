"""LDM single files by their keys: which layouts there are, and the base that opens each.

Nothing here imports JAX: a wrong file is refused at once.
"""

import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dreambooth_jax.files.sd2_config import is_of_velocity
from dreambooth_jax.files.weight_files import WeightsError, converting_command

SUFFIX = ".safetensors"
PEFT_FILE = "pytorch_lora_weights.safetensors"  # name by which diffusers finds an adapter in a folder
UNET = "model.diffusion_model."
SD1, SD2, XL = "SD 1.x", "SD 2.x", "SDXL"
# Layout -> published base whose configs and tokenizers open a file by default; SD 2.x that predicts the velocity has
# another.
_TEMPLATES = {
    SD1: "stable-diffusion-v1-5/stable-diffusion-v1-5",
    SD2: "stabilityai/stable-diffusion-2-1-base",
    XL: "stabilityai/stable-diffusion-xl-base-1.0",
}
_VELOCITY = "stabilityai/stable-diffusion-2-1"


def check_path(path: str | os.PathLike) -> Path:
    """The path of an existing safetensors file.

    Raises:
        WeightsError: it is a pickle (with the command that converts it), or does not exist.
    """
    path = Path(os.path.expanduser(path))
    if path.suffix in (".ckpt", ".pt", ".bin", ".pth"):
        raise WeightsError(
            f"{path}: a pickle, which can run code when opened and is refused. Convert it once, where PyTorch is:\n"
            f"  {converting_command(path, path.with_suffix(SUFFIX))}"
        )
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    return path


def split_weight(entry: str) -> tuple[str, float]:
    """(file, weight) of "FILE" or "FILE:WEIGHT"."""
    path, _, weight = entry.rpartition(":")
    return (path, float(weight)) if re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", weight) else (entry, 1.0)


def sniff(path: str | os.PathLike) -> str:
    """The layout of a file, from its keys.

    Raises:
        WeightsError: no safetensors file, or no LDM single file.
    """
    try:
        with safe_open(check_path(path), "numpy") as file:
            keys = set(file.keys())
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error}). Download it again.") from error
    if not any(key.startswith(UNET) for key in keys):
        raise WeightsError(f"{path}: no single file of a Stable Diffusion model: no tensor {UNET}*")
    if any(key.startswith(("conditioner.embedders.1.", f"{UNET}label_emb.")) for key in keys):
        return XL
    return SD2 if any(".resblocks." in key for key in keys) else SD1


def at_template(base: str) -> tuple[str, str]:
    """(FILE, TEMPLATE) of "FILE@TEMPLATE"; (base, "") of any other base. Folders may have an @ in their names."""
    found = re.fullmatch(r"(.+?\.(?:safetensors|ckpt))@(.*)", base, re.DOTALL)
    return (found[1], found[2]) if found else (base, "")


def split_base(base: str) -> tuple[Path | None, str]:
    """(single file, base that its configs and tokenizers are taken from) of "model.safetensors", or of
    "model.safetensors@TEMPLATE" with the folder or hub name of a base; (None, base) for other bases.

    Raises:
        WeightsError: no such file, a pickle, no model of these kinds, or one without a published template.
    """
    path, template = at_template(base)
    if not path.endswith((SUFFIX, ".ckpt")):
        return None, base
    file = check_path(path)
    return file, template or _template_of(file)


def _template_of(file: Path) -> str:
    layout = sniff(file)
    with safe_open(file, "numpy") as tensors:
        if layout == XL and "v_pred" in set(tensors.keys()):
            raise WeightsError(
                f"{file} predicts the velocity (its marker v_pred), {_TEMPLATES[XL]} the noise: give "
                f"{file}@FOLDER, a folder whose scheduler has prediction_type v_prediction"
            )
    return _VELOCITY if layout == SD2 and is_of_velocity(file) else _TEMPLATES[layout]
