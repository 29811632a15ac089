"""A Stable Diffusion folder as pure functions: specs and tokenizer now, weights when asked for."""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import snapshot_download
from jaxtyping import Array, Float, Int, UInt8

from dreambooth_jax.diffusion.process import Process
from dreambooth_jax.diffusion.schedulers import process_from_scheduler
from dreambooth_jax.files import bases
from dreambooth_jax.files.safetensors import WEIGHT_FILES, read_model, save_model
from dreambooth_jax.files.tokenizer import load_tokenizer
from dreambooth_jax.models.clip_text import CLIPTextModel, CLIPTextSpec
from dreambooth_jax.models.params import Functional, Params, functional, under_prefix, with_prefix
from dreambooth_jax.models.spec import UnsupportedConfig
from dreambooth_jax.models.unet import UNet2DConditionModel, UNetSpec
from dreambooth_jax.models.vae import AutoencoderKL, VAESpec

EMBEDDED = "tiny"
EMBEDDED_FOLDER = Path(__file__).parent.parent / "tiny" / "base"
PARTS = ("unet", "vae", "text_encoder")
_STEMS = {"unet": WEIGHT_FILES[0], "vae": WEIGHT_FILES[0], "text_encoder": WEIGHT_FILES[1]}


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A base model without its weights: params are passed to each function, named "unet.", "vae." and "text_encoder.".

    Attributes:
        folder: where it was read from.
        configs: part, or "scheduler" -> its config file as it stands.
        unet, vae, text_encoder: the models as functions of flat params.
        vae_spec, unet_spec, text_spec: sizes that callers need.
        process: noise levels, prediction and times.
        tokenizer: of transformers.
    """

    folder: Path
    configs: Mapping[str, dict]
    unet: Functional
    vae: Functional
    text_encoder: Functional
    unet_spec: UNetSpec
    vae_spec: VAESpec
    text_spec: CLIPTextSpec
    process: Process
    tokenizer: object

    @property
    def resolution(self) -> int:
        """The side in pixels that the UNet was trained for."""
        size = self.unet_spec.sample_size or 64
        return (size if isinstance(size, int) else size[0]) * self.vae_spec.downscale

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """[h, w, c] of the latents of square images.

        Raises:
            ValueError: autoencoder and UNet cannot halve that size often enough.
        """
        multiple = self.vae_spec.downscale * self.unet_spec.downscale
        if resolution < multiple or resolution % multiple:
            below = resolution // multiple * multiple
            raise ValueError(
                f"resolution = {resolution}: this base needs a multiple of {multiple}; "
                f"nearest: {max(multiple, below)}, {max(multiple, below) + multiple}"
            )
        side = resolution // self.vae_spec.downscale
        return side, side, self.vae_spec.latent_channels

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Names and shapes of all parameters."""
        parts = (with_prefix(f"{part}.", getattr(self, part).shapes) for part in PARTS)
        return {name: shape for part in parts for name, shape in part.items()}

    def denoise(self, params: Params, xt: Array, t: Array, states: Array) -> Array:
        """UNet prediction given text states [b, l, e]: a `predict` for a frozen text encoder."""
        return self.unet.apply(under_prefix("unet.", params), xt, t, states)

    def denoise_ids(self, params: Params, xt: Array, t: Array, ids: Array) -> Array:
        """UNet prediction given token ids [b, l]: a `predict` that trains the text encoder too."""
        return self.denoise(params, xt, t, self.encode_text(params, ids))

    def encode_text(self, params: Params, ids: Int[Array, "b l"]) -> Float[Array, "b l e"]:
        """Text states that the UNet attends to."""
        return self.text_encoder.apply(under_prefix("text_encoder.", params), ids)

    def encode_images(self, params: Params, images: UInt8[Array, "b h w 3"]) -> tuple[Array, Array]:
        """Mean and standard deviation of the posterior of the scaled latents, [b, h/f, w/f, c] each."""
        pixels = images.astype(jnp.float32) / 127.5 - 1.0
        mean, logvar = self.vae.apply(under_prefix("vae.", params), pixels, method="encode")
        scale = self.vae_spec.scaling_factor
        return mean * scale, jnp.exp(0.5 * logvar) * scale

    def decode_latents(self, params: Params, latents: Float[Array, "b h w c"]) -> Float[Array, "b h*f w*f 3"]:
        """Scaled latents to pixels in [0, 1]."""
        z = latents / self.vae_spec.scaling_factor
        pixels = self.vae.apply(under_prefix("vae.", params), z, method="decode")
        return jnp.clip(pixels.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)

    def tokenize(self, texts: Sequence[str]) -> Int[np.ndarray, "b l"]:
        """Token ids padded to the tokenizer's length; a text too long for it is cut, with a warning."""
        length = self.tokenizer.model_max_length
        for text in texts:
            if len(self.tokenizer(text).input_ids) > length:
                logging.warning("prompt cut to the %d tokens that the text encoder reads: %r", length, text)
        encoded = self.tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)
        return np.asarray(encoded.input_ids, np.int32)


def resolve_base(base: str) -> Path:
    """The local folder of a base: "tiny" (ships with the package), a folder, or a model hub name, which is fetched.

    Raises:
        FileNotFoundError: neither a folder nor a hub name that can be fetched.
    """
    if base == EMBEDDED:
        return EMBEDDED_FOLDER
    if Path(base).expanduser().is_dir():
        return Path(base).expanduser()
    if base.count("/") != 1 or base.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"base = {base!r}: no such folder. Give a diffusers folder, a hub name such as "
            f"'stable-diffusion-v1-5/stable-diffusion-v1-5', or '{EMBEDDED}' for the model that ships with the package."
        )
    patterns = ["model_index.json", "scheduler/*.json", "tokenizer/*"]
    patterns += [f"{part}/{end}" for part in PARTS for end in ("*.json", "*.safetensors")]
    try:
        folder = snapshot_download(base, allow_patterns=patterns, ignore_patterns=["*fp16*", "*non_ema*"])
    except Exception as error:  # offline, unknown or gated: the hub client has a type for each
        raise FileNotFoundError(
            f"base = {base!r}: no such folder, and the model hub did not give it ({error}). "
            "Check the name and the network, or give a local folder with --config.base=/path."
        ) from error
    return Path(folder)


def load_pipeline(base: str, *, dtype=jnp.float32, remat: str = "nothing", vae_dtype=jnp.float32) -> Pipeline:
    """Reads a base's configs and tokenizer, no weights.

    Args:
        base: see `resolve_base`.
        dtype: of the UNet's and text encoder's computation; params stay float32.
        remat: what the UNet's backward pass recomputes instead of storing it: "nothing", "elementwise" or "layers".
        vae_dtype: of the autoencoder's computation.

    Raises:
        FileNotFoundError: base or a file of it is not there.
        UnsupportedConfig: a config asks for something not implemented.
    """
    folder = resolve_base(base)
    index = _read_json(folder, "model_index.json")
    if index.get("_class_name") != "StableDiffusionPipeline":
        raise UnsupportedConfig(
            f"{folder}/model_index.json: {index.get('_class_name')} is not implemented; "
            "expected StableDiffusionPipeline"
        )
    configs = {part: _read_json(folder, f"{part}/config.json") for part in PARTS}
    configs["scheduler"] = _read_json(folder, "scheduler/scheduler_config.json")
    return build_pipeline(folder, configs, load_tokenizer(folder), dtype=dtype, remat=remat, vae_dtype=vae_dtype)


def build_pipeline(
    folder: Path,
    configs: Mapping[str, dict],
    tokenizer,
    *,
    dtype=jnp.float32,
    remat: str = "nothing",
    vae_dtype=jnp.float32,
) -> Pipeline:
    """The pipeline that `configs` (of the PARTS and of "scheduler") describe; `tokenizer` may be None for shapes alone.

    Raises:
        UnsupportedConfig: a config asks for something not implemented.
    """
    unet_spec = UNetSpec.from_config(configs["unet"])
    vae_spec = VAESpec.from_config(configs["vae"])
    text_spec = CLIPTextSpec.from_config(configs["text_encoder"])
    if {text_spec.hidden_size} != set(unet_spec.cross_attention_dim):
        raise UnsupportedConfig(
            f"{folder}: text encoder of width {text_spec.hidden_size}, "
            f"UNet cross_attention_dim {unet_spec.cross_attention_dim}"
        )
    return Pipeline(
        folder=folder,
        configs=configs,
        unet=functional(lambda rngs: UNet2DConditionModel(unet_spec, dtype=dtype, remat=remat, rngs=rngs)),
        vae=functional(lambda rngs: AutoencoderKL(vae_spec, dtype=vae_dtype, rngs=rngs)),
        text_encoder=functional(lambda rngs: CLIPTextModel(text_spec, dtype=dtype, rngs=rngs)),
        unet_spec=unet_spec,
        vae_spec=vae_spec,
        text_spec=text_spec,
        process=process_from_scheduler(configs["scheduler"]),
        tokenizer=tokenizer,
    )


def describe_base(base: str, *, dtype=jnp.float32, remat: str = "nothing") -> Pipeline:
    """Like `load_pipeline`, for shapes alone: of the published bases in `bases.CONFIGS` nothing is fetched."""
    if base in bases.CONFIGS:
        return build_pipeline(Path(base), bases.CONFIGS[base], None, dtype=dtype, remat=remat)
    return load_pipeline(base, dtype=dtype, remat=remat)


def _read_json(folder: Path, name: str) -> dict:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: {folder} is no diffusers Stable Diffusion folder")
    return json.loads(path.read_text())


def read_params(
    pipeline: Pipeline, sharding_of: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None
) -> Params:
    """Reads all weights, float32, each tensor straight to where `sharding_of(name, shape)` says.

    Raises:
        WeightsError: see `read_model`.
    """
    params: Params = {}
    for part in PARTS:
        prefix = f"{part}."
        place = sharding_of and (lambda name, shape, prefix=prefix: sharding_of(prefix + name, shape))
        params |= with_prefix(prefix, read_model(pipeline.folder / part, getattr(pipeline, part).shapes, place))
    return params


def save_pipeline(pipeline: Pipeline, params: Params, folder: str | os.PathLike, *, dtype=None) -> None:
    """Writes a folder that `load_pipeline` and diffusers' `StableDiffusionPipeline.from_pretrained` open.

    Args:
        pipeline: where configs, scheduler and tokenizer are taken from.
        params: all parts, on this host.
        folder: made if absent; files in it are replaced.
        dtype: stored precision; default float32.
    """
    folder = Path(folder)
    for part in PARTS:
        config = pipeline.configs[part] | _opens_in_float32(pipeline.configs[part], dtype)
        save_model(folder / part, under_prefix(f"{part}.", params), config, dtype=dtype, stem=_STEMS[part])
    for name in ("scheduler", "tokenizer"):
        shutil.copytree(pipeline.folder / name, folder / name, dirs_exist_ok=True)
    # The safety checker and image processor of a hub folder are not carried along: the index must not name them.
    index = _read_json(pipeline.folder, "model_index.json")
    absent = {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
    index |= {name: value for name, value in absent.items() if name in index} | {"requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _opens_in_float32(config: Mapping, dtype) -> dict:
    """transformers opens a model in the precision that its config names, else in that of its file, and diffusers always
    in float32: so that a folder opened without a word on precision is of one piece, its text encoder says float32."""
    if "architectures" not in config:
        return {}
    named = [name for name in ("dtype", "torch_dtype") if name in config]
    return dict.fromkeys(named or ["dtype"] * (dtype is not None), "float32")
