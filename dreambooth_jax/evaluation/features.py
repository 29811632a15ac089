"""Features of pictures and texts as functions: jitted once, batches split over the mesh."""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dreambooth_jax.devices.sharding import batch_sharding, replicated
from dreambooth_jax.evaluation import transforms
from dreambooth_jax.evaluation.transforms import Picture, Transform
from dreambooth_jax.files.json_text import parse_json
from dreambooth_jax.files.safetensors import read_model
from dreambooth_jax.files.tokenizer import Tokenizer
from dreambooth_jax.models.clip import CLIPModel, CLIPVisionSpec
from dreambooth_jax.models.clip_text import CLIPTextSpec
from dreambooth_jax.models.dinov2 import Dinov2Model, Dinov2Spec
from dreambooth_jax.models.efficientnet import EfficientNetLite0
from dreambooth_jax.models.lpips import BACKBONES, LPIPS
from dreambooth_jax.models.params import Functional, Params, functional
from dreambooth_jax.models.spec import UnsupportedConfig
from dreambooth_jax.models.vit import ViTModel, ViTSpec

TRANSFORMS = {"official": transforms.dino_official, "hub": transforms.dino_hub, "square": transforms.square}
BATCH = 32  # pictures a call; VGG's feature maps of as many take 0.8 GB


class ImageFeatures(NamedTuple):
    """An image model.

    Attributes:
        says: model, revision and transform, as they stand in a protocol.
        of: pictures, uint8[h w 3] each -> features [n, c].
    """

    says: str
    of: Callable[[Sequence[Picture]], Float[np.ndarray, "n c"]]


class TextFeatures(NamedTuple):
    """A text model: its name and revision, and texts -> unit vectors [n, c]."""

    says: str
    of: Callable[[Sequence[str]], Float[np.ndarray, "n c"]]


def subject_features(
    folder: str | os.PathLike, mesh: Mesh, *, transform: str = "official", size: int = 0
) -> ImageFeatures:
    """DINO or DINOv2 as transformers saves it.

    Args:
        transform: "official", that of the models' authors; "hub", that of the hub's preprocessor; "square", values in
            [-1, 1] of a square picture, for the ViT beside the embedded base.
        size: of the crop in pixels; 0 for 224, or the model's own if that is smaller.

    Raises:
        UnsupportedConfig: neither a ViT nor a DINOv2.
        WeightsError: see `read_model`.
    """
    if transform not in TRANSFORMS:
        raise ValueError(f"transform = {transform!r}: expected one of {', '.join(TRANSFORMS)}")
    folder = Path(folder)
    config = _config(folder)
    kinds: dict[str, tuple[Any, type]] = {"vit": (ViTSpec, ViTModel), "dinov2": (Dinov2Spec, Dinov2Model)}
    if config.get("model_type") not in kinds:
        raise UnsupportedConfig(f"{folder}: model_type = {config.get('model_type')!r}; expected one of {sorted(kinds)}")
    spec_of, build = kinds[config["model_type"]]
    spec = spec_of.from_config(config)
    model = functional(lambda rngs: build(spec, rngs=rngs))
    pixels = TRANSFORMS[transform](size or min(224, spec.image_size))
    return _image_features(folder, model, pixels, mesh, "features")


def clip_features(
    folder: str | os.PathLike, mesh: Mesh, tokenizer: Tokenizer, *, transform: str = "official"
) -> tuple[ImageFeatures, TextFeatures]:
    """Both towers of a CLIP as transformers saves it.

    Args:
        tokenizer: of transformers.
        transform: "official", that of CLIP's authors, or "square", see `subject_features`; at the model's own size.
    """
    folder = Path(folder)
    config = _config(folder)
    text, vision = (
        spec.from_config(config[f"{name}_config"])
        for spec, name in ((CLIPTextSpec, "text"), (CLIPVisionSpec, "vision"))
    )
    clip = functional(lambda rngs: CLIPModel(text, vision, config["projection_dim"], rngs=rngs))
    params = read_model(folder, clip.shapes, lambda name, shape: replicated(mesh))
    says = _name(folder)
    towards = (transforms.square if transform == "square" else transforms.clip_official)(vision.image_size)
    images = ImageFeatures(f"{says}, {towards}", _over_pictures(clip, params, towards, mesh, "image_features"))
    length, end = text.max_position_embeddings, tokenizer.eos_token_id
    run = jax.jit(lambda params, ids: clip.apply(params, ids, end, method="text_features"))

    def texts(prompts: Sequence[str]) -> np.ndarray:
        ids = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True).input_ids
        return _in_batches(functools.partial(run, params), np.asarray(ids, np.int32), mesh)

    return images, TextFeatures(says, texts)


def lpips_features(folder: str | os.PathLike, backbone: str, mesh: Mesh, *, size: int = 224) -> ImageFeatures:
    """Vectors whose squared Euclidean distance is LPIPS (arXiv 1801.03924).

    Args:
        folder: what `benchmarks/convert_weights.py lpips-alex` or `lpips-vgg` writes.
        backbone: "alex" or "vgg".
        size: side in pixels to which pictures are resized and cropped; AlexNet needs 63 or more.

    Raises:
        ValueError: unknown backbone.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"LPIPS backbone {backbone!r}: expected one of {', '.join(BACKBONES)}")
    model = functional(lambda rngs: LPIPS(backbone, rngs=rngs))
    vectors = model._replace(apply=lambda params, x, method: _joined(model.apply(params, x, method=method)))
    return _image_features(Path(folder), vectors, transforms.square(size), mesh, "maps")


def vit_states(folder: str | os.PathLike, mesh: Mesh, *, transform: str = "official") -> ImageFeatures:
    """Vectors whose squared Euclidean distance is the weight-free perceptual distance of `metrics`, by a ViT.

    Args:
        transform: see `subject_features`.
    """
    spec = ViTSpec.from_config(_config(Path(folder)))
    model = functional(lambda rngs: ViTModel(spec, rngs=rngs))

    def apply(params: Params, pixels: Array, method: str) -> Float[Array, "b n"]:
        states = [state[:, 1:] for state in model.apply(params, pixels, method=method)]
        units = [state / jnp.linalg.norm(state, axis=-1, keepdims=True) for state in states]
        return _joined([unit[:, :, None] / np.sqrt(len(units)) for unit in units])

    pixels = TRANSFORMS[transform](min(224, spec.image_size))
    return _image_features(Path(folder), model._replace(apply=apply), pixels, mesh, "hidden_states")


def imagenet_features(folder: str | os.PathLike, mesh: Mesh) -> ImageFeatures:
    """Pooled features [n, 1280] of EfficientNet-Lite0, not normalised: for precision, recall and KID.

    Args:
        folder: what `benchmarks/convert_weights.py efficientnet-lite0` writes.
    """
    model = functional(lambda rngs: EfficientNetLite0(rngs=rngs))
    return _image_features(Path(folder), model, transforms.square(224), mesh, "features")


def distances(vectors: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n n"]:
    """Squared Euclidean distances of all pairs: LPIPS for the vectors of `lpips_features`."""
    return np.stack([np.square(vectors - row).sum(-1) for row in vectors])


def _image_features(folder: Path, model: Functional, transform: Transform, mesh: Mesh, method: str) -> ImageFeatures:
    params = read_model(folder, model.shapes, lambda name, shape: replicated(mesh))
    return ImageFeatures(f"{_name(folder)}, {transform}", _over_pictures(model, params, transform, mesh, method))


def _over_pictures(
    model: Functional, params: Mapping[str, Array], transform: Transform, mesh: Mesh, method: str
) -> Callable[[Sequence[Picture]], np.ndarray]:
    run = jax.jit(lambda params, pixels: model.apply(params, pixels, method=method))

    def features(pictures: Sequence[Picture]) -> np.ndarray:
        parts = []
        for start in range(0, len(pictures), BATCH):
            pixels = transforms.prepare(transform, pictures[start : start + BATCH])
            parts.append(_in_batches(functools.partial(run, params), pixels, mesh))
        return np.concatenate(parts)

    return features


def _in_batches(run: Callable[[Array], Array], rows: np.ndarray, mesh: Mesh) -> np.ndarray:
    """`run` of all rows, a power of two of them at a time, so that few programs are compiled."""
    parts, size = [], min(BATCH, 1 << (len(rows) - 1).bit_length())
    place = batch_sharding(mesh, size)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)])
        with jax.set_mesh(mesh):  # kernels split their batch over it
            parts.append(_whole(run(jax.device_put(padded, place)), mesh)[: len(part)])
    return np.concatenate(parts)


def _whole(features: Array, mesh: Mesh) -> np.ndarray:
    """All rows on this host, with several processes too."""
    return np.asarray(jax.jit(lambda x: x, out_shardings=replicated(mesh))(features), np.float32)


def _joined(maps: Sequence[Array]) -> Float[Array, "b n"]:
    """Feature maps as one vector per picture: its squared length is the sum over layers of the mean over places."""
    return jnp.concatenate([x.reshape(len(x), -1) / np.sqrt(x.shape[1] * x.shape[2]) for x in maps], axis=1)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: give a model's folder as transformers saves it, or a hub name")
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not readable JSON ({error}). Download the file again.") from error


def _name(folder: Path) -> str:
    """The folder's name and the first digits of the SHA-256 of its weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"{folder.name}@{digest.hexdigest()[:8]}"
