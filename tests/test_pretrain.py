"""The training of the embedded base and cascade, at a size of seconds: killed anywhere it goes on, and what it writes
others open."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers import IFPipeline, IFSuperResolutionPipeline, StableDiffusionPipeline
from safetensors.numpy import load_file
from support.flags import xla_flags
from support.npm_packages import write_packages
from support.runs import kill_when

from dreambooth_jax import pretrain
from dreambooth_jax.diffusion.step import init_state
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.files.hub import EMBEDDED
from dreambooth_jax.files.safetensors import save_model
from dreambooth_jax.files.tokenizer import load_tokenizer
from dreambooth_jax.files.weight_files import WEIGHT_FILES
from dreambooth_jax.models.lpips import LPIPS
from dreambooth_jax.models.params import Functional, functional, with_prefix
from dreambooth_jax.runs import config_file
from dreambooth_jax.tiny import parts, pixels, rare_words
from dreambooth_jax.tiny.world import load_sprites
from dreambooth_jax.tiny.world.atlas import make_atlas

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
# As its config advises, one device per core.
DEVICES = {"XLA_FLAGS": xla_flags(2)}
HEAD = """
import runpy

made = runpy.run_path({path!r})["get_config"]
"""
BASE = """
def get_config():
    config = made("gpu")
    config.resolution, config.steps_per_call, config.save_seconds, config.lpips = 16, 2, 0, ""
    for part in (config.vae, config.clip, config.vit, config.unet):
        part.steps, part.batch_size = 6, 8
    config.clip.decay_steps = config.vit.decay_steps = config.unet.decay_steps = 2
    config.vae.model.update(block_out_channels=[8, 8], norm_num_groups=4, sample_size=16)
    config.vae.model.update(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config.clip.text.update(small)
    config.clip.vision.update(small, image_size=16, patch_size=8)
    config.vit.model.update(small, image_size=16, patch_size=8)
    config.unet.model.update(
        sample_size=8, down_block_types=["CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D"],
        block_out_channels=[16], cross_attention_dim=16, attention_head_dim=[2], norm_num_groups=4,
    )
    return config
"""
CASCADE = """
def get_config():
    config = made("gpu")
    config.resolution, config.steps_per_call, config.save_seconds = 32, 2, 0
    config.rare_words.update(steps=4, batch_size=8)
    config.text.update(d_ff=16, d_kv=8, d_model=16, num_heads=2, num_layers=1)
    for stage, side in ((config.stage1, 16), (config.stage2, 32)):
        stage.update(steps=6, decay_steps=2, batch_size=8)
        stage.model.update(
            sample_size=side, block_out_channels=[8, 16], cross_attention_dim=32, encoder_hid_dim=16,
            attention_head_dim=8, norm_num_groups=4, down_block_types=stage.model.down_block_types[-2:],
            up_block_types=stage.model.up_block_types[:2],
        )
    return config
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the command with output and checkpoints in a folder."""
    world = write_packages(tmp_path_factory.mktemp("npm"))
    configs = tmp_path_factory.mktemp("config")
    for name, small in (("tiny_base", BASE), ("tiny_cascade", CASCADE)):
        (configs / f"{name}.py").write_text(HEAD.format(path=str(ROOT / "configs" / f"{name}.py")) + small)

    def run(folder: Path, name: str = "tiny_base") -> subprocess.Popen:
        options = {"world": world, "workdir": folder / "parts", "output": folder / "base"}
        command = [sys.executable, "-m", "dreambooth_jax.pretrain", f"--config={configs / name}.py"]
        command += [f"--config.{name}={value}" for name, value in options.items()]
        with (folder / "log").open("a") as log:  # a pipe that nobody reads would stop it
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | DEVICES)

    return run


def finish(process: subprocess.Popen, folder: Path) -> None:
    assert process.wait(timeout=600) == 0, (folder / "log").read_text()[-3000:]


def kill_at_checkpoint(process: subprocess.Popen, folder: Path) -> None:
    assert kill_when(process, lambda: list(folder.glob("[0-9]*"))), "ended before it could be killed"


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(folder), folder)
    return folder / "base"


def test_others_open_what_it_writes(undisturbed):
    painter = StableDiffusionPipeline.from_pretrained(undisturbed, torch_dtype=torch.float32)
    painter.set_progress_bar_config(disable=True)
    image = painter("a dog", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 16, 16, 3) and np.isfinite(image).all()
    for model, folder in ((transformers.CLIPModel, "clip"), (transformers.ViTModel, "vit")):
        _, about = model.from_pretrained(undisturbed / folder, output_loading_info=True)
        assert not about["unexpected_keys"] and not about["mismatched_keys"]
        assert all(name.startswith("pooler.") for name in about["missing_keys"])
    assert "MIT" in (undisturbed / "LICENSES.md").read_text()  # of the pictures it was trained on
    pipeline = load_pipeline(str(undisturbed))
    assert all(np.isfinite(value).all() for value in read_params(pipeline).values())
    assert pipeline.process.alpha(np.array([999])) == 0  # the last step of noising leaves nothing of the picture


def test_others_open_the_cascade_that_it_writes(start, tmp_path):
    """Stage I, and stage II on its picture; and killed in stage II it goes on with stage I as it was."""
    process = start(tmp_path, "tiny_cascade")
    kill_at_checkpoint(process, tmp_path / "parts" / "stage2")
    first = (tmp_path / "parts" / "stage1.csv").read_text()
    finish(start(tmp_path, "tiny_cascade"), tmp_path)
    assert (tmp_path / "parts" / "stage1.csv").read_text() == first and len(first.splitlines()) == 3
    small = IFPipeline.from_pretrained(tmp_path / "base" / "stage1", torch_dtype=torch.float32)
    large = IFSuperResolutionPipeline.from_pretrained(tmp_path / "base" / "stage2", torch_dtype=torch.float32)
    picture = None
    for theirs, side in ((small, 16), (large, 32)):
        theirs.set_progress_bar_config(disable=True)
        given = {} if picture is None else {"image": picture, "noise_level": 100, "height": side, "width": side}
        states = theirs.encode_prompt("a sks dog", num_images_per_prompt=1, device="cpu")
        embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), states, strict=True))
        picture = theirs(**given, **embeds, num_inference_steps=2, output_type="pt").images
        assert picture.shape[-2:] == (side, side) and torch.isfinite(picture).all()
    for name, factor in (("stage1", None), ("stage2", 2)):
        pipeline = load_pipeline(str(tmp_path / "base" / name))
        params = read_params(pipeline)
        assert all(np.isfinite(value).all() for value in params.values())
        assert (pipeline.low_resolution and pipeline.low_resolution.factor) == factor
        ids = pipeline.tokenize(["a sks dog"])
        ours = pipeline.encode_text(params, ids)["states"]
        theirs = small if factor is None else large
        states, _ = theirs.encode_prompt("a sks dog", do_classifier_free_guidance=False, device="cpu")
        np.testing.assert_allclose(ours, states.detach(), atol=1e-4)


def test_killed_it_goes_on_and_ends_with_the_same_weights(start, undisturbed, tmp_path):
    """Killed in its last part, with the others finished."""
    process = start(tmp_path)
    kill_at_checkpoint(process, tmp_path / "parts" / "unet")
    assert not (tmp_path / "base" / "unet").exists()
    finish(start(tmp_path), tmp_path)
    for path in undisturbed.rglob("*.safetensors"):
        expected, found = load_file(path), load_file(tmp_path / "base" / path.relative_to(undisturbed))
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(value, found[name], err_msg=f"{path.parent.name}: {name}")


def test_an_unknown_vocabulary_is_refused_before_anything_is_fetched(tmp_path):
    config = config_file.load(str(ROOT / "configs" / "tiny_cascade.py"))
    config.update(vocabulary="more", world=str(tmp_path / "none"), workdir=str(tmp_path), output=str(tmp_path))
    with pytest.raises(ValueError, match="vocabulary = 'more': expected one of core, subjects, examples, all"):
        pretrain.pretrain(config)


@pytest.mark.parametrize("part", ["vae", "clip", "vit", "unet"])
def test_a_part_with_neither_start_nor_steps_is_refused(part, tmp_path):
    config = config_file.load(str(ROOT / "configs" / "tiny_base.py"))
    config[part].update(start="", steps=0)
    with pytest.raises(ValueError, match=rf"{part}.start = '' and {part}.steps = 0 would write random weights"):
        pretrain.pretrain(config)


@pytest.mark.parametrize("preset", ["", ":gpu", ":more"])
def test_the_steps_of_the_base_fit_their_models(preset, monkeypatch, tmp_path):
    """At full size and in the preset's dtype, traced and not run."""
    config = config_file.load(f"{ROOT / 'configs' / 'tiny_base.py'}{preset}")
    config.update(workdir=str(tmp_path), lpips=str(tmp_path / "lpips"))
    distance = functional(lambda rngs: LPIPS("alex", rngs=rngs))
    save_model(tmp_path / "lpips", distance.init(jax.random.key(0)), {}, file=WEIGHT_FILES[1])
    traced = []

    def trace(name, step, params, frozen, optimizer, data, *_):
        state = init_state(params, optimizer, ema=True)
        after, (loss,) = jax.eval_shape(step, state, frozen, data, jax.random.key(0))
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, after) and loss.shape == ()
        traced.append(name)
        return params

    monkeypatch.setattr(parts, "fit", trace)
    monkeypatch.setattr(parts, "latent_statistics", lambda *_: (jnp.zeros(16), jnp.ones(16)))
    tokenizer = load_tokenizer(EMBEDDED["tiny"])
    atlas = make_atlas(load_sprites(write_packages(tmp_path)), tokenizer, config.resolution, subject_share=0.5)
    key = jax.random.key(0)
    vae, clip = parts.train_vae(config, atlas, key), parts.train_clip(config, atlas, tokenizer, key)
    parts.train_vit(config, atlas, key)
    parts.train_unet(config, atlas, tokenizer, vae, clip, key)
    assert traced == (["vae", "clip", "vit", "unet"] if preset == ":gpu" else ["vae", "unet"])


def test_stage_ii_is_trained_for_a_stage_i_that_is_there(monkeypatch, tmp_path):
    """Of stage I nothing is trained."""
    config = config_file.load(str(ROOT / "configs" / "tiny_cascade.py"))
    config.update(start="tiny_stage1", workdir=str(tmp_path))
    config.rare_words.steps = 0
    monkeypatch.setattr(pixels, "fit", lambda name, step, params, *_: params)
    tokenizer = load_tokenizer(EMBEDDED["tiny_stage1"])
    sprites = load_sprites(write_packages(tmp_path))
    atlas = make_atlas(sprites, tokenizer, config.resolution, subject_share=config.subject_share)
    stages = pixels.train_stages(config, atlas, tokenizer, jax.random.key(0))
    kept = read_params(load_pipeline("tiny_stage1"))
    for stage, part in (("stage1", "unet"), ("stage1", "text_encoder"), ("stage2", "text_encoder")):
        params = stages[stage][part].params
        assert len(params) > 10 and all(np.array_equal(value, kept[f"{part}.{name}"]) for name, value in params.items())


def test_rare_words_are_those_of_no_caption_and_the_loss_asks_for_their_vectors(tmp_path):
    """A T5 that reads as before is at 0 but for the rare words, whose wanted states are the normed vectors."""
    tokenizer = load_tokenizer(EMBEDDED["tiny_stage1"])
    atlas = make_atlas(load_sprites(write_packages(tmp_path)), tokenizer, 64, subject_share=0.5)
    rare = rare_words.rare_tokens(atlas, len(tokenizer), 3)
    sks, dog = (tokenizer(word).input_ids[0] for word in ("sks", "dog"))
    assert sks in rare and dog not in rare and len(rare) > 100
    ids = rare_words.draw_captions(4, 77)(atlas, jax.random.key(0))
    assert len(np.unique(ids)) > 4 and not set(rare) & set(np.unique(ids).tolist())
    vector = jax.random.normal(jax.random.key(1), (len(tokenizer), 8))

    def encode(params, ids):  # one vector a token, and nothing of the others
        return params["shared.embedding"][ids] / jnp.sqrt(
            jnp.square(params["shared.embedding"][ids]).mean(-1, keepdims=True)
        )

    encoder = Functional(shapes={}, init=None, apply=encode)
    loss = rare_words.rare_loss(encoder, rare, tuple(np.asarray(ids[0]).tolist()), 0.1, tokenizer.pad_token_id)
    params = {"shared.embedding": vector, rare_words.LAST_NORM: jnp.ones(8)}
    both = with_prefix("before.", params) | with_prefix("text_encoder.", params)
    assert loss(both, ids, jax.random.key(2)) < 1e-10
    other = both | {"text_encoder.shared.embedding": vector.at[jnp.asarray(rare)].multiply(-1)}
    assert loss(other, ids, jax.random.key(2)) > 0.1
