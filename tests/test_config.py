"""Configs: files, overrides, and checks of every field before anything heavy is imported."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.runs import ROOT, config_of

from dreambooth_jax.adapters.factors import FORMS
from dreambooth_jax.adapters.lora import TARGETS
from dreambooth_jax.diffusion.optimizer import LR_SCHEDULES, OPTIMIZERS
from dreambooth_jax.diffusion.sampler import SAMPLERS
from dreambooth_jax.models.unet import REMAT
from dreambooth_jax.runs import config_file
from dreambooth_jax.runs.config import FIELDS, ConfigError, absolute_paths, check_config
from dreambooth_jax.runs.effects import check_effects

DOG = str(ROOT / "configs" / "dog.py")


@pytest.mark.parametrize(
    ("field", "choices"),
    [("optimizer", OPTIMIZERS), ("lr_schedule", LR_SCHEDULES), ("sampler", SAMPLERS), ("remat", tuple(REMAT))],
)
def test_choices_are_those_of_the_modules_that_implement_them(field, choices):
    assert {word for word in choices if FIELDS[field].check(word)} == set(choices)
    assert FIELDS[field].expected == f"one of {', '.join(choices)}"


def test_methods_are_those_of_the_adapters():
    assert FIELDS["method"].expected == f"one of full, {', '.join(FORMS)}, inversion, pivotal, custom"
    assert FIELDS["lora_targets"].expected.startswith(", ".join(TARGETS))


def test_the_sample_command_offers_every_sampler():
    from dreambooth_jax import sample

    assert set(sample.SAMPLERS) == set(SAMPLERS)


def parse(*arguments):
    import argparse

    _, config, preset = config_file.parse(argparse.ArgumentParser(), ["--config", *arguments], "configs/dog.py")
    return config, preset


def test_overrides_have_the_type_of_their_field():
    config, preset = parse(
        DOG,
        "--config.steps=7",
        "--config.flip=true",
        "--config.learning_rate",
        "1e-3",
        "--config.identifier=123",
        "--config.sample_prompts=('a {class_noun}',)",
        "--config.instance_prompt=a=b",
    )
    assert (config.steps, config.flip, config.learning_rate, config.identifier) == (7, True, 1e-3, "123")
    assert config.sample_prompts == ("a {class_noun}",) and config.instance_prompt == "a=b"
    assert preset.steps == 300 and preset.keys() == config.keys()


def test_every_wrong_override_is_named_at_once():
    with pytest.raises(ConfigError) as error:
        parse(DOG, "--config.stepz=3", "--config.steps=many", "--config.flip=maybe", "--config.sample_prompts=a dog")
    for text in (
        "stepz: unknown field; did you mean steps?",
        "steps = 'many': expected a whole number",
        "flip = 'maybe': expected True or False",
        "sample_prompts = 'a dog': expected a tuple",
    ):
        assert text in str(error.value)


def test_shipped_configs_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("dog.py:sd15")[0].base.endswith("stable-diffusion-v1-5")
    with pytest.raises(ConfigError, match=r"no such file.*dog\.py"):
        parse("cat.py")


BROKEN = {
    "syntax": ("def get_config(:", "line 1"),
    "raises": ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
    "no function": ("x = 1\n", "defines no function get_config"),
    "no config": ("def get_config():\n    return 3\n", "returned int, expected a ConfigDict"),
    "exits": ("raise SystemExit(0)\n", "line 1: SystemExit"),
    "null bytes": ("\0\0", "null bytes"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_config_file_is_named_with_its_line(tmp_path, kind):
    text, message = BROKEN[kind]
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.py") as error:
        parse(str(tmp_path / "bad.py"))
    assert message in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_must_be_finite(tmp_path, value):
    with pytest.raises(ConfigError, match=r"learning_rate = .*finite"):
        check_config(config_of(tmp_path, learning_rate=value))


WRONG = {
    "no config": ([], "--config is missing"),
    "no file": (["--config", "nowhere.py"], "no such file"),
    "a folder": (["--config", "configs"], "not a regular file"),
    "unknown field": (["--config", DOG, "--config.stepz=3"], "stepz: unknown field"),
    "unknown preset": (["--config", DOG + ":sd99"], "sd99"),
    "infinite rate": (["--config", DOG, "--config.learning_rate=inf"], "finite"),
    "no photos": (["--config", DOG, "--config.instance_images=/no/photos"], "/no/photos"),
    "no base": (["--config", DOG, "--config.base=/no/base"], "/no/base"),
    "idle": (["--config", DOG, "--config.lora_rank=3"], "lora_rank = 3 has no effect"),
    "stray word": (["--config", DOG, "steps=3"], "unrecognized argument: steps=3"),
    "no value": (["--config", DOG, "--config.steps"], "expected a value"),
}


def _damaged(base: Path, kind: str) -> None:
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    if kind == "broken JSON":
        (base / "vae" / "config.json").write_text("{,}")
    elif kind == "pickle":
        weights.rename(weights.with_suffix(".bin"))
    else:
        weights.write_bytes(weights.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("broken JSON", "vae/config.json: not readable JSON"),
        ("pickle", "unet: only pickled weights"),
        ("cut off", "diffusion_pytorch_model.safetensors: not a readable safetensors file"),
    ],
)
def test_a_damaged_base_is_named_before_jax_is_imported(micro, tmp_path, kind, message):
    """JAX and the model libraries take seconds to import."""
    base = shutil.copytree(micro, tmp_path / "base")
    _damaged(base, kind)
    program = "import sys; sys.modules['jax'] = None; from dreambooth_jax.train import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--config", DOG, f"--config.base={base}", f"--config.workdir={tmp_path}/run"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1 and message in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", WRONG)
def test_cheap_errors_are_one_line_and_come_at_once(kind):
    arguments, message = WRONG[kind]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "dreambooth_jax.train", *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode not in (0, None) and message in done.stderr and "Traceback" not in done.stderr
    assert time.monotonic() - began < 10  # under load; 0.3 s alone


IDLE = {
    "lora_rank": ({"lora_rank": 4}, "lora_rank = 4 has no effect with method = 'full'"),
    "prior": ({"prior_preservation": False, "num_class_images": 7}, "num_class_images = 7 has no effect with prior"),
    "tower": ({"train_text_encoder": False, "text_encoder_multiplier": 0.5}, "text_encoder_multiplier = 0.5"),
    "shared": ({"create_class_images": True}, "create_class_images = True has no effect without class_images"),
    "subjects": ({"subjects": "a", "instance_images": "b"}, "instance_images = 'b' has no effect with subjects"),
    "moments": ({"optimizer": "adafactor", "moment_dtype": "bfloat16"}, "moment_dtype = 'bfloat16'"),
    "sheets": ({"sample_prompts": (), "sample_count": 2}, "sample_count = 2 has no effect without sample_prompts"),
}


@pytest.mark.parametrize("kind", IDLE)
def test_a_changed_setting_without_effect_is_an_error(kind):
    fields, message = IDLE[kind]
    preset, config = config_file.load(DOG), config_file.load(DOG)
    config.update(fields)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_effects(config, preset)


def test_untouched_defaults_are_silent():
    for spec in ("", ":sd15", ":sd15,lora"):
        preset, config = config_file.load(DOG + spec), config_file.load(DOG + spec)
        config.update(method="full", prior_preservation=False, train_text_encoder=False, sample_prompts=())
        check_effects(config, preset)


def test_paths_become_absolute_and_names_do_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    paths = {"subjects": "~/table.csv", "init_adapter": "~/a.safetensors", "held_out_images": "~/held"}
    config = config_of(
        Path("~/run"),
        base="~/base",
        class_images="own",
        instance_images="~/photos",
        stages=("~/base", "a/hub"),
        judge_dino="~/base",
        judge_clip="a/hub",
        **paths,
    )
    found = absolute_paths(config)
    assert {name: found[name] for name in paths} == {name: f"{tmp_path}{text[1:]}" for name, text in paths.items()}
    assert (found.stages, found.judge_dino, found.judge_clip) == (
        (f"{tmp_path}/base", "a/hub"),
        f"{tmp_path}/base",
        "a/hub",
    )
    (tmp_path / "one.safetensors").touch()
    single = absolute_paths(config_of(tmp_path, base="~/one.safetensors@~/base"))
    assert single.base == f"{tmp_path}/one.safetensors@{tmp_path}/base"
    assert (found.workdir, found.base) == (f"{tmp_path}/run", f"{tmp_path}/base")
    assert (found.class_images, found.instance_images) == (f"{Path.cwd()}/own", f"{tmp_path}/photos")
    for name in ("tiny", "stable-diffusion-v1-5/stable-diffusion-v1-5"):
        assert absolute_paths(config_of(tmp_path, base=name)).base == name
    for name in ("tfds:a:train", "gs://bucket/photos", "hub:diffusers/dog-example"):
        assert absolute_paths(config_of(tmp_path, instance_images=name)).instance_images == name
    monkeypatch.chdir(tmp_path)
    assert Path(absolute_paths(config_of(tmp_path, instance_images="examples/subjects/dog")).instance_images).is_dir()


@pytest.mark.parametrize("seed", [2**32, 2**70, -1])
def test_seeds_that_would_be_cut_are_refused(tmp_path, seed):
    with pytest.raises(ConfigError, match=r"seed = .*2\^32 - 1"):
        check_config(config_of(tmp_path, seed=seed))


def test_a_text_encoder_that_trains_at_rate_0_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"text_encoder_multiplier = 0 with train_text_encoder"):
        check_config(config_of(tmp_path, text_encoder_multiplier=0.0))


def test_fields_and_the_shipped_config_agree():
    assert set(config_file.load(DOG).keys()) == set(FIELDS)
