"""What the paper's protocol costs on a slice, from shapes alone: every subject trained, painted and scored."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dreambooth_jax.devices.chips import Chip
from dreambooth_jax.devices.sharding import batch_sharding, replicated_shapes
from dreambooth_jax.devices.tpu import compile_for
from dreambooth_jax.evaluation.choices import judges_itself
from dreambooth_jax.evaluation.features import BATCH
from dreambooth_jax.files.hub import EMBEDDED_FOLDER
from dreambooth_jax.models.clip import CLIPModel, CLIPVisionSpec
from dreambooth_jax.models.clip_text import CLIPTextSpec
from dreambooth_jax.models.params import Functional, functional
from dreambooth_jax.models.vit import ViTModel, ViTSpec
from dreambooth_jax.runs.protocol import check_protocol
from dreambooth_jax.runs.stages import stage_configs

SUBJECTS, CLASSES, PHOTOS, PROMPTS = 30, 15, 5, 25  # of google/dreambooth
DINO_S16 = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}  # facebook/dino-vits16


class Scale(NamedTuple):
    """Numbers of a protocol: subjects, their different class nouns, and pictures painted per subject."""

    subjects: int
    classes: int
    pictures: int


class Cost(NamedTuple):
    """Seconds of the whole protocol, without start-up, and the chips of the slice."""

    training: float
    class_images: float
    painting: float
    scoring: float
    chips: int

    @property
    def hours(self) -> float:
        return (self.training + self.class_images + self.painting + self.scoring) / 3600


def scale_of(config: ConfigDict) -> Scale:
    """The numbers of a protocol's config; those of google/dreambooth where its data set is not on this machine.

    Raises:
        ConfigError: see `check_protocol`.
    """
    pictures = PROMPTS * config.count + 2 * config.class_count
    try:
        subjects = check_protocol(config)
    except FileNotFoundError:
        return Scale(len(config.subjects) or SUBJECTS, min(len(config.subjects) or SUBJECTS, CLASSES), pictures)
    return Scale(len(subjects), len({subject.class_noun for subject in subjects}), pictures)


def cost_of(scale: Scale, *, run: float, class_images: float, picture: float, score: float, chips: int) -> Cost:
    """The cost of a protocol.

    Args:
        run: seconds of one subject's training steps.
        class_images: seconds for the class images of one noun.
        picture: seconds to paint one picture.
        score: seconds to score the pictures of one subject.
        chips: of the slice.
    """
    n = scale.subjects
    return Cost(n * run, scale.classes * class_images, n * scale.pictures * picture, n * score, chips)


def scoring_seconds(config: ConfigDict, mesh: Mesh, chip: Chip, *, quick: bool = True) -> float:
    """Seconds on the devices to score one subject: features of pictures, their backgrounds and the photos.

    Published judges are taken as the default ones, ViT-S/16 and CLIP ViT-B/32, or as `--dino` and `--clip` folders.
    """
    if judges_itself(config.judge, config.train.base):
        dino, clip = EMBEDDED_FOLDER / "vit", EMBEDDED_FOLDER / "clip"
    else:
        dino, clip = Path(config.dino), Path(config.clip)
    vit = ViTSpec.from_config(_config(dino) or DINO_S16)
    both = _config(clip)
    text = CLIPTextSpec.from_config(both.get("text_config", {"hidden_size": 512}))
    vision = CLIPVisionSpec.from_config(both.get("vision_config", {}))
    width = both.get("projection_dim", 512)
    models = (
        (functional(lambda rngs: ViTModel(vit, rngs=rngs)), vit.image_size, "features"),
        (functional(lambda rngs: CLIPModel(text, vision, width, rngs=rngs)), vision.image_size, "image_features"),
    )
    dino_seconds, clip_seconds = (_seconds(model, size, method, mesh, chip, quick) for model, size, method in models)
    pictures = PROMPTS * config.count
    once = pictures + PHOTOS + 2 * config.class_count
    return (once + pictures) * dino_seconds + 2 * once * clip_seconds  # the ViT's states once more, for DIV


def _config(folder: Path) -> dict:
    path = folder / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _seconds(model: Functional, size: int, method: str, mesh: Mesh, chip: Chip, quick: bool) -> float:
    """Seconds per picture of a batch of `BATCH`."""
    params = replicated_shapes(mesh, model.shapes)
    pixels = jax.ShapeDtypeStruct((BATCH, size, size, 3), jnp.float32, sharding=batch_sharding(mesh, BATCH))
    with jax.set_mesh(mesh):
        lowered = jax.jit(lambda params, x: model.apply(params, x, method=method)).lower(params, pixels)
    return compile_for(chip, lowered, quick=quick).seconds / BATCH


def describe(cost: Cost, scale: Scale, config: ConfigDict, price: float) -> str:
    """For a person; `price` is that of a chip and hour, 0 if it is not known."""
    each = [str(own.steps) for own in stage_configs(config.train)]
    steps = each[0] if len(each) == 1 else f"({' + '.join(each)})"
    rows = {
        "subjects": f"{scale.subjects} of {scale.classes} class nouns, {scale.pictures} pictures each",
        "training": f"{_time(cost.training)} for {scale.subjects} x {steps} steps",
        "class images": f"{_time(cost.class_images)} for {scale.classes} nouns",
        "painting": f"{_time(cost.painting)} for {scale.subjects * scale.pictures} pictures",
        "scoring": f"{_time(cost.scoring)}, {cost.scoring / max(cost.painting, 1e-9):.1%} of painting",
        "in all": f"{cost.hours:.2f} hours at least on {cost.chips} chips, {cost.hours * cost.chips:.1f} chip hours"
        + (f", {cost.hours * cost.chips * price:.2f} at {price:g} a chip hour" if price else ""),
        "besides": "start, compiling and reading of weights for every subject",
    }
    return "\n".join(f"{name:>18}: {text}" for name, text in rows.items())


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
