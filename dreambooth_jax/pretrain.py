"""Trains the embedded base: tokenizer, autoencoder, CLIP, ViT, UNet; then writes it as a diffusers folder.

    python -m dreambooth_jax.pretrain --config configs/tiny_base.py        # also :gpu, :more

Latent diffusion's recipe (arXiv 2112.10752): the autoencoder, a text tower trained contrastively, then the UNet
together with the text tower (its equation 3); and a ViT for subject fidelity. Pictures are composed on the device, none
twice. Every part is checkpointed, and the same command resumes after a kill at any moment.
"""

import argparse
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from dreambooth_jax.runs import config_file
from dreambooth_jax.runs.command import one_line_errors


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dreambooth_jax.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    with one_line_errors():
        example = "configs/tiny_base.py"
        _, config, _ = config_file.parse(parser, arguments, example, default=example)
        config_file.check_fields(config, config_file.load(example), example)
        pretrain(config)


def pretrain(config: ConfigDict) -> None:
    """Trains every part and writes the base."""
    import jax  # here, so that --help needs no JAX
    import numpy as np

    from dreambooth_jax.devices.sharding import make_mesh
    from dreambooth_jax.evaluation.nouns import TAUGHT
    from dreambooth_jax.files.safetensors import save_model
    from dreambooth_jax.files.tokenizer import load_tokenizer
    from dreambooth_jax.files.weight_files import WEIGHT_FILES
    from dreambooth_jax.models.params import count
    from dreambooth_jax.tiny import parts, world
    from dreambooth_jax.tiny.world.atlas import make_atlas

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    jax.set_mesh(make_mesh())  # attention splits its batch over it
    config.update(output=os.path.expanduser(config.output), workdir=os.path.expanduser(config.workdir))
    output = Path(config.output)
    sprites = world.load_sprites(config.world or None)
    world.write_tokenizer(output / "tokenizer", world.words(sprites), config.max_length)
    tokenizer = load_tokenizer(output)
    if config.vocabulary == "core":
        sprites = [sprite for sprite in sprites if sprite.noun in world.CORE_NOUNS]
    atlas = make_atlas(sprites, tokenizer, config.resolution, subject_share=config.subject_share)
    logging.info("%d sprites of %d nouns", len(sprites), len({sprite.noun for sprite in sprites}))
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
    (output / "clip" / TAUGHT).write_text("".join(f"{noun}\n" for noun in sorted({s.noun for s in sprites})))
    write_index(output, config.scheduler.to_dict())


def write_index(folder: Path, scheduler: dict) -> None:
    """Makes the models in `folder` a StableDiffusionPipeline; `clip/` and `vit/` lie beside it, and the licences of
    the pictures."""
    from dreambooth_jax.tiny import world

    shutil.copyfile(Path(world.__file__).with_name("LICENSES.md"), folder / "LICENSES.md")
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    main()
