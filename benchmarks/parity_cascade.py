"""DeepFloyd IF, T5 and the x4 upscaler in full size, beside PyTorch diffusers and transformers: values and gradients.

    python benchmarks/parity_cascade.py                          # 15 GB of memory, 10 GB of disk
    python benchmarks/parity_cascade.py --part "IF-I-M" "x4"

The weights are random and written by PyTorch. Every model runs in a process of its own, the reference before ours, so
that one at a time is in memory. Errors are ||ours - reference|| / ||reference||, float32 throughout. Of T5-XXL half of
the 24 layers are compared and of IF-I-XL one layer a block instead of three: 24 GB of memory hold no more.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from parity import alone, relative

from dreambooth_jax.files.bases import CONFIGS
from dreambooth_jax.files.safetensors import read_model
from dreambooth_jax.models.params import Functional, functional
from dreambooth_jax.models.pixel_unet import PixelUNet, PixelUNetSpec
from dreambooth_jax.models.t5 import T5EncoderModel, T5Spec
from dreambooth_jax.models.unet import UNet2DConditionModel, UNetSpec
from dreambooth_jax.models.vae import AutoencoderKL, VAESpec

IF, X4 = "DeepFloyd/IF-{}-v1.0", "stabilityai/stable-diffusion-x4-upscaler"


class Part(NamedTuple):
    """A model to compare.

    Attributes:
        base: whose config in `bases.CONFIGS` it has.
        kind: its folder there.
        side: of the pictures or latents that go in; 0 for a text encoder.
        fields: of the config that differ.
        gradient: whether the gradients of all parameters are compared too.
    """

    base: str
    kind: str
    side: int
    fields: Mapping[str, Any] = {}
    gradient: bool = False


PARTS = {
    "IF-I-M": Part(IF.format("I-M"), "unet", 64),
    "IF-I-M, gradients": Part(IF.format("I-M"), "unet", 16, gradient=True),
    "IF-I-L": Part(IF.format("I-L"), "unet", 64),
    "IF-I-XL, one layer a block": Part(IF.format("I-XL"), "unet", 64, {"layers_per_block": 1}),
    "IF-II-L": Part(IF.format("II-L"), "unet", 256),
    "x4": Part(X4, "unet", 64),
    "x4, gradients": Part(X4, "unet", 16, gradient=True),
    "x4, autoencoder": Part(X4, "vae", 32),
    "T5-XXL, 12 layers": Part(IF.format("I-M"), "text_encoder", 0, {"num_layers": 12}),
}


def config_of(part: Part) -> dict[str, Any]:
    """The model's config.json."""
    return CONFIGS[part.base][part.kind] | dict(part.fields)


def inputs(part: Part) -> dict[str, np.ndarray]:
    """The same for both sides; images and latents [b, h, w, c]."""
    config, rng = config_of(part), np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    if part.kind == "text_encoder":
        return {"ids": rng.integers(0, config["vocab_size"], (2, 77))}
    if part.kind == "vae":
        return {"x": normal(1, part.side, part.side, config["latent_channels"])}
    width = config.get("encoder_hid_dim", config["cross_attention_dim"])
    given = {"x": normal(1, part.side, part.side, config["in_channels"]), "t": np.float32([741])}
    given["states"] = normal(1, 77, width)
    if "num_class_embeds" in config:
        given["level"] = np.int32([20])
    elif config.get("class_embed_type"):
        given["level"] = np.float32([13])
    return given


def write_reference(part: Part, folder: str) -> None:
    """A random model's files in `folder`/model, what it makes of the inputs, and gradients of its weighted mean."""
    import torch
    from diffusers import AutoencoderKL as TorchVAE
    from diffusers import UNet2DConditionModel as TorchUNet
    from safetensors.torch import save_file
    from transformers import T5Config
    from transformers import T5EncoderModel as TorchT5

    torch.manual_seed(0)
    config = {name: value for name, value in config_of(part).items() if name not in ("_class_name", "architectures")}
    build = {"unet": lambda: TorchUNet(**config), "vae": lambda: TorchVAE(**config)}
    model = build.get(part.kind, lambda: TorchT5(T5Config(**config)))()
    with torch.no_grad():  # scales of 1 and biases of 0 would hide norms that are swapped and biases that are missing
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(Path(folder, "model"), max_shard_size="40GB")
    given = {name: torch.from_numpy(value) for name, value in inputs(part).items()}
    with torch.set_grad_enabled(part.gradient):
        if part.kind == "text_encoder":
            out = model(given["ids"]).last_hidden_state
        elif part.kind == "vae":
            out = model.decode(given["x"].movedim(-1, 1)).sample.movedim(1, -1)
        else:
            x = given["x"].movedim(-1, 1)
            out = model(x, given["t"], given["states"], class_labels=given.get("level")).sample.movedim(1, -1)
    np.save(Path(folder, "out.npy"), out.detach().numpy())
    if part.gradient:
        (out * torch.from_numpy(weights(tuple(out.shape)))).mean().backward()
        Path(folder, "gradient").mkdir()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        save_file(gradients, Path(folder, "gradient", "diffusion_pytorch_model.safetensors"))


def weights(shape: tuple[int, ...]) -> np.ndarray:
    """Of the outputs in the mean whose gradient is compared."""
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def ours(part: Part, folder: str) -> Functional:
    """The model as functions over flat params, its sizes from the file that PyTorch wrote."""
    kinds: dict[str, tuple[Any, Callable]] = {
        "text_encoder": (T5Spec, T5EncoderModel),
        "vae": (VAESpec, AutoencoderKL),
        "unet": (PixelUNetSpec, PixelUNet) if part.base != X4 else (UNetSpec, UNet2DConditionModel),
    }
    spec_class, module = kinds[part.kind]
    spec = spec_class.from_config(json.loads(Path(folder, "model", "config.json").read_text()))
    return functional(lambda rngs: module(spec, rngs=rngs))


def compare(name: str, folder: str) -> list[tuple[str, str, str]]:
    """Rows (what, error, limit)."""
    part = PARTS[name]
    model, given = ours(part, folder), inputs(part)
    params = read_model(Path(folder, "model"), model.shapes)
    method = {"method": "decode"} if part.kind == "vae" else {}
    expected = np.load(Path(folder, "out.npy"))

    def total(params: dict, arguments: tuple) -> tuple[jax.Array, jax.Array]:
        out = model.apply(params, *arguments, **method)
        return (out * weights(expected.shape)).mean(), out

    millions = sum(shape.size for shape in model.shapes.values()) / 1e6
    size = "x".join(map(str, next(iter(given.values())).shape))
    if not part.gradient:
        _, out = jax.jit(total)(params, tuple(given.values()))
        return [(f"{name} ({millions:.1f} M), from {size}", f"{relative(out, expected):.1e}", "1e-4")]
    grads, out = jax.jit(jax.grad(total, has_aux=True))(params, tuple(given.values()))
    del params
    reference = read_model(Path(folder, "gradient"), model.shapes)
    # Adding a constant to all keys changes no softmax: the gradient of their bias is rounding and nothing else.
    small = {key for key in reference if key.endswith("pool.k_proj.bias")}
    errors = {key: relative(grads[key], value) for key, value in reference.items() if key not in small}
    worst = max(errors, key=lambda key: errors[key])
    return [
        (f"{name} ({millions:.1f} M), from {size}: values", f"{relative(out, expected):.1e}", "1e-4"),
        (f"{name}, worst of {len(errors)} parameters: `{worst}`", f"{errors[worst]:.1e}", "1e-3"),
        (f"{name}, median", f"{np.median(list(errors.values())):.1e}", ""),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    print("| what | error | limit |\n|---|---|---|", flush=True)
    for name in parser.parse_args().part:
        with tempfile.TemporaryDirectory() as folder:
            alone(write_reference, PARTS[name], folder)
            for what, figure, limit in alone(compare, name, folder):
                print(f"| {what} | {figure} | {limit} |", flush=True)


if __name__ == "__main__":
    main()
