"""The pixel cascade against PyTorch diffusers: folders both ways, pictures for the same noise, training pairs."""

import inspect
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import IFPipeline, IFSuperResolutionPipeline, StableDiffusionUpscalePipeline
from diffusers.pipelines.deepfloyd_if import pipeline_if, pipeline_if_superresolution
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_upscale as pipeline_x4
from diffusers.schedulers import scheduling_ddpm
from PIL import Image
from support.cascade_folders import write_stage_i, write_stage_ii, write_upscaler
from support.runs import assert_same_state, checkpoints, config_of, finish, kill_when, read_state, start
from support.torch_folders import unchanged

from dreambooth_jax import evaluate, export, sample
from dreambooth_jax.adapters.lora import lora
from dreambooth_jax.data.encode import make_encoder
from dreambooth_jax.data.images import Examples
from dreambooth_jax.data.low_resolution import cut
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.diffusion.low_resolution import LowResolution, make_augment
from dreambooth_jax.families.family import DENOISER
from dreambooth_jax.families.pipeline import load_pipeline, read_params, save_pipeline
from dreambooth_jax.files.lora_peft import write_peft
from dreambooth_jax.painting.cascade import Stage, paint_stages
from dreambooth_jax.painting.painter import Request, make_paint_batch, make_painter
from dreambooth_jax.runs.cascade import _name, open_stages
from dreambooth_jax.runs.config import ConfigError
from dreambooth_jax.runs.config_file import read_config
from dreambooth_jax.runs.job import make_job, painting_settings
from dreambooth_jax.runs.stages import stage_configs

PROMPT, NEGATIVE, STEPS = "A photo of a sks dog", "a cat", 3
KEY = jax.random.key(7)
WRITERS = {"I": write_stage_i, "II": write_stage_ii, "x4": write_upscaler}
CLASSES = {"I": IFPipeline, "II": IFSuperResolutionPipeline, "x4": StableDiffusionUpscalePipeline}
SIDES = {"I": 16, "II": 64, "x4": 64}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """name -> (folder, PyTorch pipeline, our pipeline, params)."""
    found = {}
    for name, write in WRITERS.items():
        folder = tmp_path_factory.mktemp(f"stage_{name}")
        reference = write(folder)
        pipeline = load_pipeline(str(folder))
        found[name] = folder, reference, pipeline, read_params(pipeline)
    with unchanged(*(reference for _, reference, _, _ in found.values())):
        yield found


def photo(side: int) -> np.ndarray:
    """Smooth colours, uint8[side side 3]."""
    y, x = np.mgrid[:side, :side] / side
    return np.uint8(255 * np.stack([x, y, 0.5 + 0.5 * np.sin(9 * x * y)], -1))


def painter(stages, name, **kw):
    pipeline = stages[name][2]
    settings = {"sampler": "ddim" if name == "x4" else "ddpm", "steps": STEPS, "guidance": 3.0, "batch_size": 1}
    return make_painter(pipeline, make_mesh(1, 1, jax.devices()[:1]), resolution=SIDES[name], **settings | kw)


def use_our_noise(monkeypatch, name: str, key) -> None:
    """diffusers draws what our painter draws for `key`: noise on the low-resolution picture, start, every step."""
    module = {"I": pipeline_if, "II": pipeline_if_superresolution, "x4": pipeline_x4}[name]
    start = (16, 16, 4) if name == "x4" else (SIDES[name],) * 2 + (3,)
    small = 16 if name == "x4" else 64
    _, noise_key = jax.random.split(jax.random.fold_in(key, 2**31 - 1))
    draws = {"start": jax.random.normal(key, start), "low": jax.random.normal(noise_key, (small, small, 3))}
    order = {"I": ["start"], "II": ["start", "low"], "x4": ["low", "start"]}[name]
    steps = iter(range(STEPS))

    def as_torch(x):
        return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 0)[None].copy())

    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: as_torch(draws[order.pop(0)]))
    monkeypatch.setattr(
        scheduling_ddpm,
        "randn_tensor",
        lambda *a, **k: as_torch(jax.random.normal(jax.random.fold_in(key, next(steps)), start)),
    )


def paint_in_torch(reference, name, low=None, level=None):
    given = {} if low is None else {"image": Image.fromarray(low), "noise_level": level}
    out = reference(PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=3.0, **given)
    return np.asarray(out.images[0])


def assert_same_picture(ours, theirs) -> None:
    """To 2e-3 of the range of colours, and the last bit of eight."""
    assert ours.shape == theirs.shape and ours.std() > 5
    assert np.abs(ours.astype(float) - theirs).max() <= 1 + 2e-3 * 255


@pytest.mark.parametrize("name", ["I", pytest.param("II", marks=pytest.mark.slow), "x4"])
def test_a_stage_paints_the_reference_s_picture(name, stages, monkeypatch):
    _, reference, pipeline, params = stages[name]
    low = None if name == "I" else photo(16)
    level = None if name == "I" else pipeline.low_resolution.usual_level
    ours = dict(painter(stages, name)(params, [Request(PROMPT, NEGATIVE, KEY, low)]))[0]
    use_our_noise(monkeypatch, name, KEY)
    assert_same_picture(ours, paint_in_torch(reference, name, low, level))


@pytest.mark.slow
def test_the_cascade_paints_the_reference_s_pictures(stages, monkeypatch):
    """Stage II enlarges what stage I has painted."""
    two = [Stage(painter(stages, name), stages[name][3]) for name in ("I", "II")]
    ours = paint_stages(two, [Request(PROMPT, NEGATIVE, KEY)])
    use_our_noise(monkeypatch, "I", KEY)
    first = paint_in_torch(stages["I"][1], "I")
    use_our_noise(monkeypatch, "II", jax.random.fold_in(KEY, 1))
    second = paint_in_torch(stages["II"][1], "II", first, 250)
    assert_same_picture(ours[0][0], first)
    assert np.abs(ours[1][0].astype(float) - second).mean() <= 1


@pytest.mark.parametrize("name", WRITERS)
def test_a_written_folder_opens_in_the_reference(name, stages, tmp_path):
    _, reference, pipeline, params = stages[name]
    save_pipeline(pipeline, params, tmp_path)
    opened = CLASSES[name].from_pretrained(tmp_path)
    for part in ("unet", "text_encoder"):
        theirs, written = (getattr(pipe, part).state_dict() for pipe in (reference, opened))
        assert theirs.keys() == written.keys()
        assert all(torch.equal(theirs[key], written[key]) for key in theirs)
    again = load_pipeline(str(tmp_path))
    assert again.tokenize([PROMPT])["ids"].tolist() == pipeline.tokenize([PROMPT])["ids"].tolist()
    if name != "x4":  # no loss has trained the channels of the variance
        assert opened.scheduler.config.variance_type == "fixed_small"
        assert reference.scheduler.config.variance_type == "learned_range"


def test_prompts_are_encoded_as_the_reference_does(stages):
    _, reference, pipeline, params = stages["I"]
    states = pipeline.encode_text(params, pipeline.tokenize([PROMPT, ""]))["states"]
    theirs = reference.encode_prompt([PROMPT, ""], do_classifier_free_guidance=False, clean_caption=False)[0]
    assert states.shape == (2, 77, 32)
    np.testing.assert_allclose(states, theirs.detach(), atol=1e-4)


@pytest.mark.slow
def test_the_loss_leaves_the_variance_channels_alone(stages):
    _, _, pipeline, params = stages["I"]
    cond = pipeline.encode_text(params, pipeline.tokenize([PROMPT]))
    x, t = jnp.zeros((1, 16, 16, 3)), jnp.asarray([500])
    grads = jax.grad(lambda p: (pipeline.denoise(params | p, x, t, cond) ** 2).sum())(
        {"unet.conv_out.bias": params["unet.conv_out.bias"]}
    )["unet.conv_out.bias"]
    assert np.all(grads[3:] == 0) and np.all(grads[:3] != 0)


def test_the_low_resolution_input_is_the_photo_made_small(stages):
    """And not the noisy target: it is the same for every draw of noise and time, but for noise of variance 1e-5."""
    _, _, pipeline, params = stages["II"]
    photos = np.stack([photo(64), photo(64)[::-1]])
    sizes = np.zeros((2, 2), np.int32)
    examples = Examples(photos, ("a sks dog",) * 2, ("0", "1"), sizes, sizes)
    encoded = make_encoder(pipeline, make_mesh(1, 1, jax.devices()[:1]), text_states=True)(params, examples)
    small = np.asarray(encoded.of_example["low"]).reshape(2, 16, 16, 3)
    for image, own in zip(photos, small, strict=True):
        expected = image.reshape(16, 4, 16, 4, 3).mean((1, 3))
        assert np.abs(own - expected)[1:-1, 1:-1].max() <= 6
    augment = make_augment(pipeline.low_resolution, 64, "1e-5")
    lows = [augment({"low": encoded.of_example["low"][0]}, jax.random.key(seed)) for seed in range(2)]
    for cond in lows:
        difference = cond["low"] - (photos[0] / 127.5 - 1)
        assert np.sqrt(np.mean(np.square(difference))) < 0.1 and cond["level"] == 0
    assert np.std(lows[0]["low"] - lows[1]["low"]) == pytest.approx(np.sqrt(2e-5), rel=0.05)


def test_levels_of_noise(stages):
    low = stages["II"][2].low_resolution
    assert [low.nearest_level(v) for v in (0.0, 1e-5, 1e-3, 0.154)] == [0, 0, 13, 250]
    augment = jax.vmap(make_augment(low, 64, "uniform"), in_axes=(None, 0))
    drawn = augment({"low": np.zeros(16 * 16 * 3, np.uint8)}, jax.random.split(KEY, 64))
    levels = np.asarray(drawn["level"])
    assert levels.min() < 100 and levels.max() > 900
    deviation = np.std(np.asarray(drawn["low"]).reshape(64, -1), axis=1)
    np.testing.assert_allclose(deviation, low.sigma[levels], rtol=0.05, atol=0.01)


@pytest.mark.parametrize("name", ["I", "II"])
def test_an_adapter_predicts_in_diffusers_what_it_predicts_here(name, stages, tmp_path):
    """Random factors of every attention: those of the pixels and those of the text."""
    folder, reference, pipeline, params = stages[name]
    method = lora(pipeline.trainable(DENOISER), "attention", 2, 4.0)
    trainable, frozen = method.start(params, KEY)
    trainable = {n: 0.1 * jax.random.normal(jax.random.key(i), x.shape) for i, (n, x) in enumerate(trainable.items())}
    assert {n.split(".")[-3] for n in trainable} >= {"to_q", "to_k", "to_v", "0", "add_k_proj", "add_v_proj"}
    write_peft(tmp_path / "sks.safetensors", method.adapter(trainable), dtype="float32")
    theirs = type(reference).from_pretrained(folder)
    theirs.load_lora_weights(tmp_path / "sks.safetensors")

    side = SIDES[name]
    x = jax.random.normal(KEY, (1, side, side, pipeline.models.specs["unet"].in_channels))
    states, t, level = jax.random.normal(KEY, (1, 77, 32)), jnp.asarray([500.0]), jnp.asarray([3.0])
    given = (level,) if name == "II" else ()
    predict = jax.jit(lambda params: pipeline.models.apply("unet", params, x, t, states, *given))
    ours = predict(method.combine(frozen, trainable))
    labels = {"class_labels": torch.tensor([3.0])} if name == "II" else {}
    with torch.no_grad():
        expected = theirs.unet(
            torch.from_numpy(np.array(x)).movedim(-1, 1), 500, torch.from_numpy(np.array(states)), **labels
        ).sample.movedim(1, -1)
    assert np.abs(ours - expected.numpy()).max() <= 1e-4 * np.abs(expected.numpy()).max()
    assert np.abs(ours - predict(params)).max() > 1e-2 * np.abs(ours).max()


def test_a_level_of_no_training_is_refused(stages):
    painter(stages, "II", sr_noise="1e-3", noise_level=13)
    painter(stages, "II", sr_noise="uniform", noise_level=13)
    with pytest.raises(ValueError, match=r"noise_level = 250.*sr_noise = 1e-5.*level 0 alone"):
        painter(stages, "II", sr_noise="1e-5", noise_level=250)


def test_a_run_paints_with_every_setting_of_its_config(stages, tmp_path):
    """A setting with a default in code would be the config's in some pictures and the default in others."""
    settings = painting_settings(config_of(tmp_path, sr_noise="1e-3"), stages["II"][2])
    keywords = [p.name for p in inspect.signature(make_paint_batch).parameters.values() if p.kind == p.KEYWORD_ONLY]
    assert set(settings) == set(keywords) - {"noise_level"}  # no field of a config
    assert settings["sr_noise"] == "1e-3" and settings["trained"]


def test_a_picture_to_enlarge_is_asked_for(stages):
    with pytest.raises(ValueError, match=r"for 64 pixels it needs pictures of 16 x 16, got none"):
        next(painter(stages, "II")(stages["II"][3], [Request(PROMPT, "", KEY)]))


def test_a_stage_has_the_fields_that_are_given_for_it(tmp_path):
    """Among them a folder of class images of its own size; what the cascade sets itself is refused."""
    fields = {"stages": ("b", "c"), "class_images": "/small"}
    own = (("class_images", "/large"), ("steps", 7))
    first, second, third = stage_configs(config_of(tmp_path, **fields, stage_fields=(own,)))
    assert [one.class_images for one in (first, second, third)] == ["/small", "/large", ""]
    assert [one.base for one in (second, third)] == ["b", "c"] and second.steps == 7
    with pytest.raises(ConfigError, match="stage_fields of stage 2: base, workdir: the cascade sets it"):
        stage_configs(config_of(tmp_path, **fields, stage_fields=((("base", "x"), ("workdir", "y")),)))


def test_a_picture_of_the_stage_before_is_of_its_weights(finished):
    """After stage I has trained on, its pictures are painted anew."""
    request, config = Request("a dog", "", KEY), config_of(finished)
    names = {_name(request, configs) for configs in ((), (config,), (config, config))}
    assert len(names) == 3 and _name(request, (config_of(finished),)) in names


def test_a_copied_run_is_read_where_it_lies(finished, tmp_path):
    """The stages of a copied cascade would otherwise paint with the weights of another place, or untrained."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    config = read_config(copy)
    assert config.workdir == str(copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(FileNotFoundError, match=f"{copy}"):
        open_stages([config], make_mesh())


def test_crops_show_parts_of_the_photo():
    sizes = np.zeros((2, 2), np.int32)
    examples = Examples(np.stack([photo(64)] * 2), ("", ""), ("a", "a"), sizes, sizes)
    one, two = cut(examples, 32, 0).images
    assert not np.array_equal(one, two)
    windows = np.lib.stride_tricks.sliding_window_view(photo(64), (32, 32), (0, 1)).transpose(0, 1, 3, 4, 2)
    assert (windows == one).all((2, 3, 4)).any() and (windows == two).all((2, 3, 4)).any()
    with pytest.raises(ValueError, match="sr_crop = 65"):
        cut(examples, 65, 0)


def test_no_sentencepiece_is_needed_beside_tokenizer_json(stages, tmp_path):
    """A bare spiece.model asks for the optional package by name."""
    folder = stages["I"][0]
    assert (folder / "tokenizer" / "tokenizer.json").exists()
    for path in folder.rglob("*.json"):
        copy = tmp_path / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(b"")
    with pytest.raises(ImportError, match="pip install sentencepiece"):
        load_pipeline(str(tmp_path))
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "IFPipeline"


def test_low_resolution_is_a_value():
    assert LowResolution(4, True, np.linspace(0, 1, 10), 5).levels("uniform") == range(10)


CASCADE = {
    "sampler": "ddpm",
    "sampling_steps": 2,
    "guidance_scale": 2.0,
    "train_text_encoder": False,
    "steps": 4,
    "save_every": 2,
    "sample_every": 4,
    "num_class_images": 4,
    "class_batch_size": 4,
    "views": 1,
    "crop": "center",
    "flip": False,
    "sample_count": 1,
    "ema_decay": 0.0,
}


@pytest.mark.slow
def test_both_stages_train_in_one_workdir_and_the_second_resumes(stages, tmp_path):
    """Stage I as it was trained, and stage II, killed once, as it would have been, to the last bit."""
    fields = CASCADE | {
        "base": str(stages["I"][0]),
        "stages": (str(stages["II"][0]),),
        "stage_fields": ((("learning_rate", 1e-4), ("sr_crop", 32)),),
    }
    output = finish(tmp_path / "whole", **fields)
    assert "stage1" in output and "stage2" in output
    shutil.copytree(tmp_path / "whole" / "stage1", tmp_path / "parts" / "stage1")
    process = start(tmp_path / "parts", **fields)
    assert kill_when(process, lambda: checkpoints(tmp_path / "parts" / "stage2"))
    finish(tmp_path / "parts", **fields)
    for stage in ("stage1", "stage2"):
        one, two = (read_state(tmp_path / run / stage, 4) for run in ("whole", "parts"))
        assert_same_state(one, two)
        sides = {Image.open(path).size for path in (tmp_path / "whole" / stage / "class_images").glob("*.png")}
        assert sides == {(16, 16) if stage == "stage1" else (64, 64)}
        assert (tmp_path / "whole" / stage / "samples" / "step_000004.png").exists()
    config = json.loads((tmp_path / "whole" / "stage2" / "config.json").read_text())
    assert config["sr_noise"] == "1e-5" and config["learning_rate"] == 1e-4
    with pytest.raises(ValueError, match="T5"):
        make_job(config_of(tmp_path, **CASCADE | {"train_text_encoder": True}), stages["I"][2], make_mesh())

    arguments = ["--workdir", str(tmp_path / "whole"), "--prompt", "a sks dog", "--count", "2"]
    sample.main([*arguments, "--output", str(tmp_path / "pictures")])
    assert Image.open(tmp_path / "pictures" / "a_sks_dog_1.png").size == (64, 64)

    export.main(["--workdir", str(tmp_path / "whole" / "stage2"), "--output", str(tmp_path / "model")])
    opened = IFSuperResolutionPipeline.from_pretrained(tmp_path / "model")
    assert opened.scheduler.config.variance_type == "fixed_small"
    assert load_pipeline(str(tmp_path / "model")).low_resolution.usual_level == 0


@pytest.mark.slow
def test_a_cascade_is_scored_as_other_runs_are(stages, tmp_path, capsys):
    """By the protocol, in which subjects of a class share class images of every stage; and a run of it alone."""
    for name in ("dog", "cat"):
        shutil.copytree(f"examples/subjects/{name}", tmp_path / "photos" / name)
    (tmp_path / "photos" / "prompts_and_classes.txt").write_text("subject_name,class\ncat,pet\ndog,pet\n")
    train = CASCADE | {
        "base": str(stages["I"][0]),
        "stages": (str(stages["x4"][0]),),
        "stage_fields": ((("learning_rate", 1e-4), ("sampler", "ddim"), ("sr_crop", 32)),),
        "steps": 2,
        "sample_every": 2,
        "sample_prompts": ("a {identifier} {class_noun} in the snow",),
    }
    named = {"dataset": tmp_path / "photos", "workdir": tmp_path / "run", "judge": "embedded", "prompts": "run"}
    named |= {"count": 2, "class_count": 2} | {f"train.{name}": value for name, value in train.items()}
    arguments = ["--config", "configs/protocol.py", *(f"--config.{name}={value}" for name, value in named.items())]
    evaluate.main(arguments)
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    assert [row["label"] for row in table["rows"]][2:] == ["cat", "dog"]
    for folder, side in (("pet", 16), ("pet_stage2", 64)):
        pictures = list((tmp_path / "run" / "class_images" / folder).glob("*.png"))
        assert len(pictures) == 4 and {Image.open(path).size for path in pictures} == {(side, side)}
    capsys.readouterr()
    evaluate.main(
        ["--workdir", str(tmp_path / "run" / "dog"), "--judge", "embedded", "--count", "2", "--class_count", "2"]
    )
    assert "step 2" in capsys.readouterr().out and (tmp_path / "run" / "dog" / "stage2" / "evaluation").is_dir()
    with pytest.raises(SystemExit, match="at_once = 2: not implemented for a cascade"):
        evaluate.main([*arguments, "--config.at_once=2"])
    shutil.move(tmp_path / "run" / "dog" / "stage2", tmp_path / "stage2")
    with pytest.raises(SystemExit, match="enlarges pictures of the stage before it"):
        evaluate.main(["--workdir", str(tmp_path / "stage2"), "--judge", "embedded", "--prompts", "world"])
