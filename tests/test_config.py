"""Configs: files, overrides, and checks of every field before anything heavy is imported."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath
from support.runs import ROOT, config_of

from dreambooth_jax.adapters.factors import FORMS
from dreambooth_jax.adapters.lora import TARGETS
from dreambooth_jax.diffusion.optimizer import LR_SCHEDULES, OPTIMIZERS
from dreambooth_jax.diffusion.sampler import SAMPLERS
from dreambooth_jax.models.remat import REMAT
from dreambooth_jax.runs import config_file
from dreambooth_jax.runs.command import one_line_errors
from dreambooth_jax.runs.config import FIELDS, ConfigError, absolute_paths, check_config
from dreambooth_jax.runs.effects import check_effects
from dreambooth_jax.runs.records import DamagedCheckpoint, earlier_config, read_record
from dreambooth_jax.runs.stages import stage_configs

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


@pytest.mark.parametrize("value", ["None", "3", "['a']"])
def test_photos_of_another_type_are_refused_by_name(tmp_path, value):
    text = f"""
import runpy
def get_config():
    config = runpy.run_path({DOG!r})["get_config"]()
    with config.ignore_type():
        config.instance_images = {value}
    return config
"""
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(ConfigError, match=r"instance_images = .*: expected str"):
        check_config(config_file.load(str(tmp_path / "config.py")))


@pytest.mark.parametrize("config", [[1], {"workdir": 5}, {"stages": "ab"}, "text"])
def test_a_record_with_values_of_other_types_is_named(tmp_path, config):
    (tmp_path / "checkpoints" / "6").mkdir(parents=True)
    (tmp_path / "checkpoints" / "6" / "run.json").write_text(json.dumps({"digests": {}, "config": config}))
    with pytest.raises(DamagedCheckpoint, match=r"6/run\.json: (workdir = 5|stages = 'ab'|config is no)"):
        read_record(tmp_path / "checkpoints", 6)
    (tmp_path / "checkpoints" / "6" / "run.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="Restore config"):
        earlier_config(epath.Path(tmp_path), 6)


def test_a_device_without_memory_is_said_in_one_line():
    with (
        pytest.raises(SystemExit, match=r"too little memory \(RESOURCE_EXHAUSTED: 3 GiB\).*--batch_size"),
        one_line_errors(),
    ):
        raise RuntimeError("RESOURCE_EXHAUSTED: 3 GiB\nmore")
    with pytest.raises(RuntimeError, match="INTERNAL"), one_line_errors():
        raise RuntimeError("INTERNAL")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_must_be_finite(tmp_path, value):
    with pytest.raises(ConfigError, match=r"learning_rate = .*finite"):
        check_config(config_of(tmp_path, learning_rate=value))


EXPORT = ["export", "--workdir=CASCADE/stage1", "--output=/no/out"]
WRONG = {
    "no config": (["train"], "--config is missing"),
    "no file": (["train", "--config", "nowhere.py"], "no such file"),
    "no home": (["train", "--config", "~nosuchuser/dog.py"], "~nosuchuser/dog.py: no such file"),
    "no base at home": (["train", "--config", DOG, "--config.base=~nosuchuser/sd"], "base = '~nosuchuser/sd': no such"),
    "no field": (["train", "--config", DOG, "--config.stage_fields=((([1],2),),)"], "stage_fields = ((([1], 2),),)"),
    "deep": (["train", "--config", DOG, "--config.stages=" + "-" * 9999 + "1"], "stages = '---"),
    "half an emoji": (
        ["train", "--config", DOG, r"--config.sample_prompts=('a \ud83d dog',)"],
        r"sample_prompts = ('a \ud83d dog',): expected text in UTF-8",
    ),
    "half a value": (
        ["train", "--config", DOG, r"--config.stage_fields=((('class_noun','\ud83d'),),)"],
        "expected text in UTF-8",
    ),
    "another command's": (["pretrain", "--config", DOG], "the config lacks clip, lpips, max_length"),
    "a folder": (["train", "--config", "configs"], "not a regular file"),
    "unknown field": (["train", "--config", DOG, "--config.stepz=3"], "stepz: unknown field"),
    "unknown preset": (["train", "--config", DOG + ":sd99"], "sd99"),
    "infinite rate": (["train", "--config", DOG, "--config.learning_rate=inf"], "finite"),
    "no photos": (["train", "--config", DOG, "--config.instance_images=/no/photos"], "/no/photos"),
    "no class images": (["train", "--config", DOG, "--config.class_images=/no/dogs"], "'/no/dogs' does not exist"),
    "no base": (["train", "--config", DOG, "--config.base=/no/base"], "/no/base"),
    "no stage": (["train", "--config", DOG, "--config.stages=('/no/base',)"], "/no/base"),
    "a wrong stage": (
        ["train", "--config", DOG, "--config.stages=('tiny',)", "--config.stage_fields=((('steps', 'a'),),)"],
        "stage_fields of stage 2: the config cannot be used:\n  steps = 'a': expected int",
    ),
    "a stage's photos": (
        [
            "train",
            "--config",
            DOG,
            "--config.stages=('tiny',)",
            "--config.stage_fields=((('instance_images', '/no/dogs'),),)",
        ],
        "/no/dogs",
    ),
    "no table": (
        ["train", "--config", DOG, "--config.method=lora", "--config.subjects=/no/table.csv"],
        "/no/table.csv",
    ),
    "no adapter": (
        ["train", "--config", DOG, "--config.method=lora", "--config.init_adapter=/no/a.safetensors"],
        "/no/a.safetensors: no such file",
    ),
    "idle": (["train", "--config", DOG, "--config.lora_rank=3"], "lora_rank = 3 has no effect"),
    "stray word": (["train", "--config", DOG, "steps=3"], "unrecognized argument: steps=3"),
    "no value": (["train", "--config", DOG, "--config.steps"], "expected a value"),
    "another run": (["train", "--config", DOG, "--config.workdir=RUN"], "learning_rate: 0.3 in the checkpoint"),
    "broken JSON": (["train", "--config", DOG, "--config.base=BROKEN"], "vae/config.json: not readable JSON"),
    "nested JSON": (["train", "--config", DOG, "--config.base=DEEP"], "vae/config.json: not readable JSON (nested too"),
    "pickle": (["train", "--config", DOG, "--config.base=PICKLE"], "unet: only pickled weights"),
    "cut off": (["train", "--config", DOG, "--config.base=CUT"], "model.safetensors: not a readable safetensors file"),
    "no single file": (["train", "--config", DOG, "--config.base=FILE"], "model.safetensors: not a readable"),
    "no slice": (["plan", "--config", DOG, "--topology=v5e:0x0"], "topology = 'v5e:0x0'"),
    "idle in a plan": (["plan", "--config", DOG, "--config.lora_rank=3"], "lora_rank = 3 has no effect"),
    "no base to plan": (["plan", "--config", DOG, "--config.base=/no/base"], "/no/base"),
    "no run": (["sample", "--workdir=/no/run", "--prompt=a"], "/no/run/config.json: no such file"),
    "a damaged run": (["sample", "--workdir=DAMAGED", "--prompt=a"], "steps = '6': expected int"),
    "no model": (["sample", "--base=/no/base", "--prompt=a"], "/no/base"),
    "no weights": (["sample", "--base=tiny", "--prompt=a", "--lora=/no/a.safetensors:0.5"], "/no/a.safetensors: no"),
    "no word": (["sample", "--base=tiny", "--prompt=a", "--embedding=sks=/no/a.pt"], "/no/a.pt: a pickle"),
    "no file of a word": (["sample", "--base=tiny", "--prompt=a", "--embedding=sks"], "expected WORD=FILE"),
    "no run to export": (["export", "--workdir=/no/run", "--output=/no/out"], "/no/run/config.json: no such file"),
    "no one stage": (["export", "--workdir=CASCADE", "--output=/no/out"], "one stage of this cascade, CASCADE/stage1"),
    "no LoRA": ([*EXPORT, "--rank=4", "--format=folder"], "--rank makes a LoRA of a full fine-tuning"),
    "no variant": ([*EXPORT, "--variant=fp16", "--format=kohya"], "--variant fp16 names the files of a folder"),
    "no folder": ([*EXPORT, "--output=a.safetensors", "--format=folder"], "the format folder needs a folder"),
    "no token": ([*EXPORT, "--format=embedding"], "method = 'full' trains no token"),
    "no factors": ([*EXPORT, "--format=peft"], "PEFT files hold LoRA and DoRA, not what method = 'full' trains: give"),
    "no repository": ([*EXPORT, "--push_to_hub=dog"], "--push_to_hub dog: expected OWNER/NAME"),
    "other weights": (
        [*EXPORT, "--output=BROKEN", "--variant=fp16"],
        "BROKEN/text_encoder holds weights of an earlier",
    ),
    "over itself": (
        ["export", "--base=tiny", "--lora=FILE:0.5", "--output=FILE"],
        "the export would overwrite model.safetensors, an adapter",
    ),
    "not of a base": (["export", "--base=tiny", "--step=0", "--output=a"], "--step: no effect with --base"),
    "step of a base": (["sample", "--base=tiny", "--prompt=a", "--step=3"], "--step: no effect with --base"),
    "a cascade's own": (
        ["sample", "--workdir=CASCADE", "--prompt=a", "--lora=FILE", "--sampler=ddim", "--steps=3", "--dtype=float32"],
        "--lora, --sampler, --steps, --dtype: no effect on a cascade, each stage has its run's own: give --workdir "
        "CASCADE/stage1",
    ),
    "a cascade's batch": (
        ["sample", "--workdir=CASCADE", "--prompt=a", "--batch_size=8"],
        "--batch_size: no effect on",
    ),
    "no guidance": (
        ["sample", "--base=tiny", "--prompt=a", "--guidance=1", "--negative_prompt=b"],
        "--negative_prompt: no effect with --guidance 1",
    ),
    "reuse beyond the last step": (
        ["sample", "--base=tiny", "--prompt=a", "--steps=4", "--reuse_features=5"],
        "--reuse_features 5: expected no more than --steps, 4",
    ),
    "reuse in sheets": (
        ["train", "--config", DOG, "--config.reuse_features=21"],
        "reuse_features = 21 is above sampling_steps = 20",
    ),
    "a protocol's own": (
        ["evaluate", "--config=configs/protocol.py", "--count=4", "--judge=auto", "--max_copy=0"],
        "--max_copy, --count, --judge: no effect with --config: a protocol has fields for it",
    ),
    "scores of one": (
        ["evaluate", "--workdir=MANY", "--prompts=run", "--lpips=a"],
        "--prompts, --lpips: no effect for a run of many subjects",
    ),
    "two judges": (
        ["evaluate", "--workdir=CASCADE/stage1", "--judge=embedded", "--clip=a"],
        "--clip: no effect with the models beside the embedded base: give --judge published",
    ),
    "no LPIPS": (
        ["evaluate", "--workdir=CASCADE/stage1", "--judge=published", "--backbone=alex"],
        "--backbone: no effect without --lpips",
    ),
    "a sweep's own": (
        ["plan", "--config", DOG, "--sweep", "--json", "--topology=v5e:1x1", "--advise"],
        "--topology, --json, --advise: no effect with --sweep",
    ),
    "price of one": (
        ["plan", "--config", DOG, "--chip_hour_price=1"],
        "--chip_hour_price: no effect without --protocol",
    ),
    "a cascade in JSON": (
        ["plan", "--config", DOG, "--config.stages=('tiny',)", "--json"],
        "--json: the plan of one st",
    ),
    "nothing to look at": (["identifier", "--base=tiny", "--clip=a"], "--clip: no effect without --photos FOLDER"),
    "no place for pictures": (
        ["sample", "--base=tiny", "--prompt=a", "--output=FILE/a"],
        "model.safetensors: not a fol",
    ),
    "no place for a file": ([*EXPORT, "--output=FILE/a/b"], "model.safetensors: not a folder, where"),
    "no run to score": (["evaluate", "--workdir=/no/run"], "/no/run/config.json: no such file"),
    "no protocol": (["evaluate", "--config=nowhere.py"], "nowhere.py: no such file"),
    "no limit": (["evaluate", "--workdir=RUN", "--max_copy=nan"], "argument --max_copy: nan: expected a finite number"),
    "no number": (["identifier", "--base=tiny", "--count=-1"], "argument --count: -1: expected a whole number above 0"),
    "no tokenizer": (["identifier", "--base=/no/base"], "/no/base"),
}
PROGRAM = """
import contextlib, importlib, io, json, sys, time
sys.modules["jax"] = None
print("{")
for kind, (command, *arguments) in json.loads(sys.argv[1]).items():
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            importlib.import_module(f"dreambooth_jax.{command}").main(arguments)
            code = "nothing was refused"
        except SystemExit as end:
            code = end.code
    print(json.dumps(kind), ":", json.dumps(f"{errors.getvalue()}{code}"), ",")
print('"seconds":', time.process_time(), "}")
"""


@pytest.fixture(scope="module")
def refused(micro, tmp_path_factory):
    """What each command says of its `WRONG` arguments, in one process that cannot import JAX; and its CPU seconds."""
    folder = tmp_path_factory.mktemp("wrong")
    for name in ("BROKEN", "DEEP", "PICKLE", "CUT"):
        shutil.copytree(micro, folder / name)
    (folder / "BROKEN" / "vae" / "config.json").write_text("{,}")
    (folder / "DEEP" / "vae" / "config.json").write_text("[" * 100_000)
    weights = "unet/diffusion_pytorch_model.safetensors"
    (folder / "PICKLE" / weights).rename((folder / "PICKLE" / weights).with_suffix(".bin"))
    (folder / "CUT" / weights).write_bytes((folder / "CUT" / weights).read_bytes()[:-1])
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    record = {"digests": {}, "config": json.loads(config_of(folder / "RUN", learning_rate=0.3).to_json())}
    for name, file, content in (
        ("RUN", "checkpoints/6/run.json", record),
        ("DAMAGED", "config.json", record["config"] | {"steps": "6"}),
        ("CASCADE", "stage1/config.json", record["config"]),
        ("MANY", "config.json", record["config"] | {"subjects": "table.csv"}),
    ):
        (folder / name / file).parent.mkdir(parents=True)
        (folder / name / file).write_text(json.dumps(content))
    places = {
        name: str(folder / name) for name in ("BROKEN", "DEEP", "PICKLE", "CUT", "RUN", "DAMAGED", "CASCADE", "MANY")
    }
    places["FILE"] = str(folder / "model.safetensors")
    arguments = {
        kind: [re.sub("|".join(places), lambda found: places[found[0]], text) for text in given]
        for kind, (given, _) in WRONG.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(arguments)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    return {kind: text if kind == "seconds" else text.replace(str(folder) + "/", "") for kind, text in said.items()}


@pytest.mark.parametrize("kind", WRONG)
def test_cheap_errors_name_the_thing_before_jax_is_imported(refused, kind):
    """JAX and the model libraries take seconds to import."""
    assert WRONG[kind][1] in refused[kind] and "Traceback" not in refused[kind]


def test_cheap_errors_come_at_once(refused):
    """All of them together, with the start of the process, in the CPU time that one may take."""
    assert refused["seconds"] < 2


IDLE = {
    "lora_rank": ({"lora_rank": 4}, "lora_rank = 4 has no effect with method = 'full'"),
    "factor": ({"method": "lokr", "lora_plus_ratio": 4.0}, "lora_plus_ratio = 4.0 has no effect with method = 'lokr'"),
    "prior": ({"prior_preservation": False, "num_class_images": 7}, "num_class_images = 7 has no effect with prior"),
    "tower": ({"train_text_encoder": False, "text_encoder_multiplier": 0.5}, "text_encoder_multiplier = 0.5"),
    "shared": ({"create_class_images": True}, "create_class_images = True has no effect without class_images"),
    "subjects": ({"subjects": "a", "instance_images": "b"}, "instance_images = 'b' has no effect with subjects"),
    "moments": ({"optimizer": "adafactor", "moment_dtype": "bfloat16"}, "moment_dtype = 'bfloat16'"),
    "second": ({"optimizer": "muon", "second_moment_dtype": "int8"}, "second_moment_dtype = 'int8' has no effect with"),
    "sheets": ({"sample_prompts": (), "sample_count": 2}, "sample_count = 2 has no effect without sample_prompts"),
    "reuse": ({"sample_prompts": (), "reuse_features": 2}, "reuse_features = 2 has no effect without sample_prompts"),
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
    for name in ("tiny", "tiny_stage1", "tiny_stage2", "stable-diffusion-v1-5/stable-diffusion-v1-5"):
        assert absolute_paths(config_of(tmp_path, base=name)).base == name
    for name in ("tfds:a:train", "gs://bucket/photos", "hub:diffusers/dog-example"):
        assert absolute_paths(config_of(tmp_path, instance_images=name)).instance_images == name
    monkeypatch.chdir(tmp_path)
    assert Path(absolute_paths(config_of(tmp_path, instance_images="examples/subjects/dog")).instance_images).is_dir()


STAGE_FIELDS = {
    "kinds": (
        (("steps", "abc"), ("learning_rate", -1)),
        ("steps = 'abc': expected int", "learning_rate = -1: expected"),
    ),
    "idle": ((("lora_rank", 9),), ("lora_rank = 9 has no effect with method = 'full'",)),
    "contradiction": ((("lr_warmup_steps", 99),), ("lr_warmup_steps = 99 leaves nothing of steps",)),
    "twice": ((("steps", 9), ("steps", 8)), ("steps: given twice",)),
    "cascade": ((("stages", ("d",)), ("workdir", "e")), ("stages, workdir: the cascade sets it",)),
}


@pytest.mark.parametrize("kind", STAGE_FIELDS)
def test_a_later_stage_is_checked_before_the_first_one_trains(tmp_path, kind):
    own, messages = STAGE_FIELDS[kind]
    with pytest.raises(ConfigError, match="stage_fields of stage 3") as error:
        stage_configs(config_of(tmp_path, stages=("b", "c"), stage_fields=((), own)))
    assert all(message in str(error.value) for message in messages)


def test_fields_of_a_stage_that_the_cascade_has_too_are_no_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = (("lora_rank", 9), ("method", "lora"), ("instance_images", "photos"))
    _, second, third = stage_configs(config_of(tmp_path, stages=("b", "c"), stage_fields=(own,)))
    assert (second.lora_rank, second.instance_images) == (9, f"{tmp_path}/photos") and third.method == "full"


@pytest.mark.parametrize("seed", [2**32, 2**70, -1])
def test_seeds_that_would_be_cut_are_refused(tmp_path, seed):
    with pytest.raises(ConfigError, match=r"seed = .*2\^32 - 1"):
        check_config(config_of(tmp_path, seed=seed))


def test_a_text_encoder_that_trains_at_rate_0_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"text_encoder_multiplier = 0 with train_text_encoder"):
        check_config(config_of(tmp_path, text_encoder_multiplier=0.0))


def test_fields_and_the_shipped_config_agree():
    assert set(config_file.load(DOG).keys()) == set(FIELDS)
