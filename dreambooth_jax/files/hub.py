"""From the name of a base to its folder on this machine: the one resolver of every command."""

from pathlib import Path

from huggingface_hub import snapshot_download

EMBEDDED = "tiny"
EMBEDDED_FOLDER = Path(__file__).parent.parent / "tiny" / "base"


def resolve_base(base: str) -> Path:
    """The local folder of a base: "tiny" (ships with the package), a folder, or a model hub name, which is fetched.
    Of "model.safetensors@TEMPLATE" (files/single_file.py) it is the template's.

    Raises:
        FileNotFoundError: neither a folder nor a hub name that can be fetched.
    """
    file = None
    if ".safetensors" in base or ".ckpt" in base:
        from dreambooth_jax.files.single_file import split_base  # here, as most bases need no JAX to be found

        file, base = split_base(base)
    if base == EMBEDDED:
        return EMBEDDED_FOLDER
    if Path(base).expanduser().is_dir():
        return Path(base).expanduser()
    if base.count("/") != 1 or base.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"base = {base!r}: no such folder. Give a diffusers folder, a hub name such as "
            f"'stable-diffusion-v1-5/stable-diffusion-v1-5', or '{EMBEDDED}' for the model that ships with the package."
        )
    patterns = ["model_index.json", "scheduler/*.json", "tokenizer*/*", "*/*.json"]
    patterns += ["*/*.safetensors"] if file is None else []
    try:
        folder = snapshot_download(base, allow_patterns=patterns, ignore_patterns=["*fp16*", "*non_ema*"])
    except Exception as error:  # offline, unknown or gated: the hub client has a type for each
        raise FileNotFoundError(
            f"base = {base!r}: no such folder, and the model hub did not give it ({error}). "
            "Check the name and the network, or give a local folder with --config.base=/path."
        ) from error
    return Path(folder)


def resolve_model(name: str) -> Path:
    """The local folder of a single model, such as DINO's: a folder, or a model hub name, which is fetched.

    Raises:
        FileNotFoundError: neither a folder nor a hub name that can be fetched.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "merges.txt"]))
    except Exception as error:  # offline, unknown or gated: the hub client has a type for each
        raise FileNotFoundError(
            f"{name!r}: no such folder, and the model hub did not give it ({error}). Check the name and the network, "
            "or give a local folder."
        ) from error
