"""Trains the embedded base: tokenizer, autoencoder, CLIP, ViT, UNet; then writes it as a diffusers folder. Or the
embedded cascade: tokenizer, T5 with the UNet of stage I, UNet of stage II; a folder per stage.

    python -m dreambooth_jax.pretrain --config configs/tiny_base.py        # also :gpu, :more
    python -m dreambooth_jax.pretrain --config configs/tiny_cascade.py     # also :gpu

Latent diffusion's recipe (arXiv 2112.10752): the autoencoder, a text tower trained contrastively, then the UNet
together with the text tower (its equation 3); and a ViT for subject fidelity. The cascade is Imagen's (arXiv
2205.11487). Pictures are composed on the device, none twice. Every part is checkpointed, and the same command resumes
after a kill at any moment.
"""

import argparse
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from dreambooth_jax.runs import config_file
from dreambooth_jax.runs.command import one_line_errors

if TYPE_CHECKING:
    from dreambooth_jax.tiny.world import Sprite

UNET = "UNet2DConditionModel"
Schedulers = dict[str, tuple[str, dict[str, Any]]]  # name -> class and config


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dreambooth_jax.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    with one_line_errors():
        base, cascade = "configs/tiny_base.py", "configs/tiny_cascade.py"
        _, config, _ = config_file.parse(parser, arguments, base, default=base)
        like = cascade if "factor" in config else base
        config_file.check_fields(config, config_file.load(like), like)
        pretrain(config)


def pretrain(config: ConfigDict) -> None:
    """Trains every part and writes the base, or the folder of each stage of a cascade."""
    import jax  # here, so that --help needs no JAX

    from dreambooth_jax.devices import runtime
    from dreambooth_jax.devices.sharding import make_mesh
    from dreambooth_jax.tiny import world

    vocabularies = {
        "core": world.CORE_NOUNS,
        "subjects": frozenset(world.SUBJECT_NOUNS),
        "examples": world.EXAMPLE_NOUNS,
        "all": None,
    }
    if config.vocabulary not in vocabularies:
        raise ValueError(f"vocabulary = {config.vocabulary!r}: expected one of {', '.join(vocabularies)}")
    for name, part in config.items():
        if isinstance(part, ConfigDict) and not (part.get("start", "?") or part.steps):
            raise ValueError(
                f"{name}.start = '' and {name}.steps = 0 would write random weights: name a base, or train some steps"
            )
    runtime.start()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    jax.set_mesh(make_mesh())  # attention splits its batch over it
    config.update(output=os.path.expanduser(config.output), workdir=os.path.expanduser(config.workdir))
    sprites = world.load_sprites(config.world or None)
    words = world.words(sprites)
    if nouns := vocabularies[config.vocabulary]:
        sprites = [sprite for sprite in sprites if sprite.noun in nouns]
    logging.info("%d sprites of %d nouns", len(sprites), len({sprite.noun for sprite in sprites}))
    train = train_cascade if "factor" in config else train_base
    train(config, sprites, words)


def train_base(config: ConfigDict, sprites: list["Sprite"], words: list[str]) -> None:
    """Autoencoder, CLIP, ViT and UNet, one after the other; writes a StableDiffusionPipeline."""
    import jax
    import numpy as np

    from dreambooth_jax.evaluation.nouns import TAUGHT
    from dreambooth_jax.files.hub import resolve_base
    from dreambooth_jax.files.safetensors import save_model
    from dreambooth_jax.files.tokenizer import load_tokenizer
    from dreambooth_jax.files.weight_files import WEIGHT_FILES
    from dreambooth_jax.models.params import count
    from dreambooth_jax.tiny import parts, world
    from dreambooth_jax.tiny.world.atlas import make_atlas

    output = Path(config.output)
    world.write_tokenizer(output / "tokenizer", words, config.max_length)
    tokenizer = load_tokenizer(output)
    atlas = make_atlas(sprites, tokenizer, config.resolution, subject_share=config.subject_share)
    vae_key, clip_key, vit_key, unet_key = jax.random.split(jax.random.key(config.seed), 4)

    vae = parts.train_vae(config, atlas, vae_key)
    clip = parts.train_clip(config, atlas, tokenizer, clip_key)
    vit = parts.train_vit(config, atlas, vit_key)
    unet, text = parts.train_unet(config, atlas, tokenizer, vae, clip, unet_key)

    diffusion, plain = WEIGHT_FILES
    for name, part, stem in (
        ("unet", unet, diffusion),
        ("vae", vae, diffusion),
        ("text_encoder", text, plain),
        ("clip", clip, plain),
        ("vit", vit, plain),
    ):
        logging.info("%s: %.2f M parameters", name, count(part.params) / 1e6)
        save_model(output / name, part.params, part.config, dtype=np.float16, file=stem)
    if config.clip.steps or not config.clip.start:
        (output / "clip" / TAUGHT).write_text("".join(f"{noun}\n" for noun in sorted({s.noun for s in sprites})))
    else:
        shutil.copyfile(resolve_base(config.clip.start) / "clip" / TAUGHT, output / "clip" / TAUGHT)
    index = {
        "image_encoder": None,
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "unet": UNET,
        "vae": "AutoencoderKL",
    }
    write_index(output, "StableDiffusionPipeline", index, {"scheduler": ("DDIMScheduler", config.scheduler.to_dict())})


def train_cascade(config: ConfigDict, sprites: list["Sprite"], words: list[str]) -> None:
    """Stage I with its text encoder, unless `config.start` has both, then stage II; writes an IFPipeline and an
    IFSuperResolutionPipeline."""
    import jax
    import numpy as np

    from dreambooth_jax.families.family import NOISE_LEVEL
    from dreambooth_jax.families.imagen import NOISING, UPSCALE
    from dreambooth_jax.files.hub import resolve_base
    from dreambooth_jax.files.safetensors import save_model
    from dreambooth_jax.files.tokenizer import load_tokenizer
    from dreambooth_jax.files.weight_files import WEIGHT_FILES
    from dreambooth_jax.models.params import count
    from dreambooth_jax.tiny import pixels, world
    from dreambooth_jax.tiny.world.atlas import make_atlas

    output = Path(config.output)
    for folder in (output / name / "tokenizer" for name in ("stage1", "stage2")):
        if config.start:
            shutil.copytree(resolve_base(config.start) / "tokenizer", folder, dirs_exist_ok=True)
        else:
            world.write_unigram(folder, words, config.max_length)
    tokenizer = load_tokenizer(output / "stage2")
    atlas = make_atlas(sprites, tokenizer, config.resolution, subject_share=config.subject_share)
    stages = pixels.train_stages(config, atlas, tokenizer, jax.random.key(config.seed))

    denoising: Schedulers = {"scheduler": ("DDPMScheduler", config.scheduler.to_dict())}
    noising: Schedulers = {NOISING: ("DDPMScheduler", config.noising.to_dict())}
    low = {UPSCALE: config.factor, NOISE_LEVEL: pixels.USUAL_LEVEL}
    pipelines = {
        "stage1": ("IFPipeline", denoising, {}),
        "stage2": ("IFSuperResolutionPipeline", denoising | noising, low),
    }
    classes = {"text_encoder": "T5EncoderModel", "tokenizer": "T5Tokenizer", "unet": UNET, "watermarker": None}
    for stage, models in stages.items():
        for part, file in zip(("unet", "text_encoder"), WEIGHT_FILES, strict=True):
            logging.info("%s/%s: %.2f M parameters", stage, part, count(models[part].params) / 1e6)
            save_model(output / stage / part, models[part].params, models[part].config, dtype=np.float16, file=file)
        name, schedulers, about = pipelines[stage]
        write_index(output / stage, name, classes, schedulers, about)


def write_index(
    folder: Path,
    name: str,
    classes: Mapping[str, str | None],
    schedulers: Schedulers,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Makes the models in `folder` a pipeline; the licences of the pictures lie beside them.

    Args:
        name: class of the pipeline.
        classes: class of each part; None for a part that it may lack.
        schedulers: class and config of each.
        about: further fields of model_index.json.
    """
    from dreambooth_jax.tiny import world

    shutil.copyfile(Path(world.__file__).with_name("LICENSES.md"), folder / "LICENSES.md")
    for part, (_, config) in schedulers.items():
        (folder / part).mkdir(exist_ok=True)
        (folder / part / "scheduler_config.json").write_text(json.dumps(config, indent=2) + "\n")
    absent = {part: None for part in ("feature_extractor", "safety_checker")}
    libraries = {"unet": "diffusers", "vae": "diffusers"}
    parts = {
        part: [libraries.get(part, "transformers") if kind else None, kind]
        for part, kind in (absent | dict(classes)).items()
    }
    parts |= {part: ["diffusers", kind] for part, (kind, _) in schedulers.items()}
    index = {"_class_name": name, "requires_safety_checker": False} | dict(sorted(parts.items())) | dict(about or {})
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    main()
