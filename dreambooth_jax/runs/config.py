"""The fields of a config, and the checks before a run.

The fields and their meaning stand in configs/dog.py. Nothing here imports JAX, so that a wrong config is refused at
once: choices are written out, and tests/test_config.py compares them with the tables of the modules that implement
them.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dreambooth_jax.data import captions
from dreambooth_jax.data.captions import is_text
from dreambooth_jax.files.hub import EMBEDDED
from dreambooth_jax.files.layouts import at_template
from dreambooth_jax.files.shipped import shipped

ADAPTERS = ("lora", "dora", "loha", "lokr")
WITH_TOKEN = ("inversion", "pivotal", "custom")  # methods that add a token to the base
SAMPLERS = ("ddim", "dpm++", "euler", "ddpm", "euler_a")


class ConfigError(ValueError):
    """A config field is unknown, missing, of the wrong type, out of range, or contradicts the run that it resumes."""


class Field(NamedTuple):
    """A config field.

    Attributes:
        kind: type of the value.
        check: whether a value of that type is allowed.
        expected: the allowed values, in words.
        identity: whether another value makes it another training run.
    """

    kind: type
    check: Callable[[Any], bool] = lambda value: True
    expected: str = ""
    identity: bool = True


def _positive(**kw: bool) -> Field:
    return Field(int, lambda v: v > 0, "a whole number above 0", **kw)


def _not_negative(kind: type, **kw: bool) -> Field:
    return Field(kind, lambda v: v >= 0, "0 or more", **kw)


def _one_of(*choices: str, **kw: bool) -> Field:
    return Field(str, lambda v: v in choices, f"one of {', '.join(choices)}", **kw)


def _are_ranks(value: tuple) -> bool:
    return all(
        isinstance(entry, (tuple, list))
        and [type(x) for x in entry] in ([str, int, int], [str, int, float])
        and _is_regex(entry[0])
        and entry[1] >= 0
        and entry[2] > 0
        for entry in value
    )


def _text(**kw: bool) -> Field:
    return Field(str, lambda v: bool(v.strip()), "not empty", **kw)


def _is_regex(text: str) -> bool:
    try:
        return bool(re.compile(text).pattern)
    except re.error:
        return False


def _is_noise(text: str) -> bool:
    try:
        return text == "uniform" or 0 <= float(text) < 1
    except ValueError:
        return False


def _are_values(pairs: Any) -> bool:
    return isinstance(pairs, (tuple, list)) and all(
        isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str) and pair[0] in FIELDS
        for pair in pairs
    )


_STAGE_FIELDS = "a tuple per further stage of (field, value) pairs"
_SIZE = Field(int, lambda v: v == -1 or v > 0, "above 0, or -1 for what is left", identity=False)
_SHARE = Field(float, lambda v: 0 <= v < 1, "at least 0 and below 1")

FIELDS: dict[str, Field] = {
    "base": _text(),
    "workdir": _text(identity=False),
    "instance_images": _text(identity=False),  # the photos themselves are compared: hosts and people may move them
    "subjects": Field(str),
    "identifier": _text(),
    "class_noun": _text(),
    "instance_prompt": _text(),
    "captions": _one_of("auto", "template"),
    "shuffle_tags": _not_negative(int),
    "caption_dropout": _SHARE,
    "masked_loss": Field(bool),
    "resolution": _not_negative(int),
    "buckets": Field(bool),
    "crop": _one_of("center", "random"),
    "flip": Field(bool),
    "views": _positive(),
    "seed": Field(int, lambda v: 0 <= v < 2**32, "a whole number from 0 to 2^32 - 1"),
    "stage": _not_negative(int, identity=False),
    "stages": Field(tuple, lambda v: all(isinstance(base, str) for base in v), "a tuple of bases", identity=False),
    "stage_fields": Field(tuple, lambda v: all(map(_are_values, v)), _STAGE_FIELDS, identity=False),
    "sr_noise": Field(str, _is_noise, "a variance between 0 and 1, such as 1e-5, or uniform"),
    "sr_crop": _not_negative(int),
    "prior_preservation": Field(bool),
    "prior_weight": _not_negative(float),
    "prior_target": _one_of("noise", "base"),
    "class_prompt": _text(),
    "class_images": Field(str),
    "create_class_images": Field(bool, identity=False),
    "num_class_images": Field(int, lambda v: 0 < v <= 100_000, "a whole number from 1 to 100000"),
    "class_batch_size": _positive(identity=False),
    "steps": _positive(),
    "batch_size": _positive(),
    "accumulate": _positive(),
    "method": _one_of("full", *ADAPTERS, *WITH_TOKEN),
    "lora_rank": _positive(),
    "lora_alpha": Field(float, lambda v: v > 0, "above 0"),
    "lora_targets": Field(
        str, _is_regex, "cross, attention, transformer, all, or a regex for the ends of module names"
    ),
    "lora_ranks": Field(tuple, _are_ranks, "a tuple of (regex for module names, rank, alpha)"),
    "lora_scaling": _one_of("standard", "stabilized"),
    "lora_plus_ratio": Field(float, lambda v: v > 0, "above 0"),
    "init_adapter": Field(str),
    "init_embedding": Field(str),
    "token_vectors": _positive(),
    "token_start": Field(str),
    "templates": Field(str, lambda v: v in ("", "object", "style"), "object, style, or empty"),
    "pivotal_fraction": Field(float, lambda v: 0 < v <= 1, "above 0, at most 1"),
    "train_text_encoder": Field(bool),
    "text_encoder_multiplier": _not_negative(float),
    "optimizer": _one_of("adamw", "muon", "adafactor"),
    "moment_dtype": _one_of("float32", "bfloat16", "int8"),
    "second_moment_dtype": _one_of("float32", "bfloat16", "int8"),
    "learning_rate": Field(float, lambda v: v > 0, "above 0"),
    "lr_schedule": _one_of("constant", "linear", "cosine"),
    "lr_warmup_steps": _not_negative(int),
    "weight_decay": _not_negative(float),
    "clip_norm": _not_negative(float),
    "snr_gamma": _not_negative(float),
    "ema_decay": _SHARE,
    "dtype": _one_of("float32", "bfloat16"),
    "frozen_dtype": Field(str, lambda v: v in ("", "int8"), "int8, or empty"),
    "remat": _one_of("nothing", "elementwise", "layers", identity=False),
    "mesh_data": _SIZE,
    "mesh_fsdp": _SIZE,
    "steps_per_call": _positive(identity=False),
    "save_every": _positive(identity=False),
    "keep_last": _positive(identity=False),
    "keep_every": _not_negative(int, identity=False),
    "sample_every": _positive(identity=False),
    "sample_prompts": Field(tuple, lambda v: all(isinstance(p, str) for p in v), "a tuple of prompts", identity=False),
    "sample_count": _positive(identity=False),
    "evaluate_every": _not_negative(int, identity=False),
    "held_out_images": Field(
        str, lambda v: not v.isdecimal() or int(v) > 0, "a number above 0, a folder, or empty", identity=False
    ),
    "keep_best": Field(bool, identity=False),
    "best_max_prompt_loss": _not_negative(float, identity=False),
    "best_max_copy": Field(float, lambda v: 0 <= v <= 1, "from 0 to 1", identity=False),
    "patience": _not_negative(int, identity=False),
    "judge_dino": _text(identity=False),
    "judge_clip": _text(identity=False),
    "sampler": _one_of(*SAMPLERS),
    "sampling_steps": _positive(),
    "reuse_features": _positive(),
    "guidance_scale": _not_negative(float),
    "negative_prompt": Field(str, identity=False),
}
# Fields that determine the class images: changing one changes the run only if prior preservation is on.
_ONE_SUBJECT = (
    "masked_loss",
    "shuffle_tags",
    "caption_dropout",
    "evaluate_every",
    "held_out_images",
    "buckets",
    "sr_crop",
)
_PAINTING = ("class_prompt", "class_images", "num_class_images", "sampler", "sampling_steps", "guidance_scale")


def check_config(config: ConfigDict) -> None:
    """Checks every field, and contradictions between fields.

    Raises:
        ConfigError: naming every field that is unknown, missing or wrong, and what was expected.
    """
    problems = [f"{name}: unknown field" for name in sorted(config.keys() - FIELDS.keys())]
    problems += [f"{name}: missing; configs/dog.py has every field" for name in sorted(FIELDS.keys() - config.keys())]
    for name, field in FIELDS.items():
        if name in config and (problem := _problem(field, config[name])):
            problems.append(f"{name} = {config[name]!r}: {problem}")
    if not problems:
        problems = _contradictions(config)
    if problems:
        raise ConfigError("the config cannot be used:\n  " + "\n  ".join(problems))


def wrong_kinds(config: ConfigDict | Mapping[str, Any]) -> list[str]:
    """Fields whose values are of another type than theirs, each with the expected one."""
    return [
        f"{name} = {config[name]!r}: expected {field.kind.__name__}"
        for name, field in FIELDS.items()
        if name in config and not _is_of_kind(field, config[name])
    ]


def _is_of_kind(field: Field, value: Any) -> bool:
    number = field.kind is float and isinstance(value, int) and not isinstance(value, bool)
    return number or type(value) is field.kind


def _problem(field: Field, value: Any) -> str | None:
    if not _is_of_kind(field, value):
        return f"expected {field.kind.__name__}"
    if not all(map(is_text, _strings(value))):
        return "expected text in UTF-8 without null characters"
    if isinstance(value, float) and not math.isfinite(value):
        return "expected a finite number"
    return None if field.check(value) else f"expected {field.expected}"


def _strings(value: Any) -> list[str]:
    """The strings in a value, also those inside of tuples."""
    if isinstance(value, (tuple, list)):
        return [text for member in value for text in _strings(member)]
    return [value] if isinstance(value, str) else []


def _contradictions(config: ConfigDict) -> list[str]:
    problems = []
    if config.batch_size % config.accumulate:
        problems.append(f"accumulate = {config.accumulate} does not divide batch_size = {config.batch_size}")
    if config.train_text_encoder and config.text_encoder_multiplier == 0:
        problems.append("text_encoder_multiplier = 0 with train_text_encoder = True: set train_text_encoder=False")
    if config.optimizer == "muon" and config.moment_dtype == "int8":
        problems.append("moment_dtype = 'int8': not implemented for optimizer = 'muon'; expected float32 or bfloat16")
    if config.lr_warmup_steps >= config.steps:
        problems.append(f"lr_warmup_steps = {config.lr_warmup_steps} leaves nothing of steps = {config.steps}")
    if config.subjects and config.method not in ADAPTERS:
        problems.append(f"subjects: many subjects share a frozen base, with one of {', '.join(ADAPTERS)} as the method")
    alone = [name for name in _ONE_SUBJECT if config[name]]
    if config.subjects and alone:
        problems.append(f"{', '.join(alone)}: not implemented for many subjects at once")
    if config.subjects and config.prior_target == "base" and not config.class_images:
        problems.append('prior_target = "base" without class_images: not implemented for many subjects at once')
    if config.sr_crop and config.masked_loss:
        problems.append("masked_loss: not implemented for the crops of a super-resolution stage, sr_crop")
    if config.prior_target == "base" and config.method in ("full", "custom"):
        problems.append(f'prior_target = "base" needs the frozen base, which method = {config.method!r} does not keep')
    if config.frozen_dtype and config.method == "full":
        problems.append(f"frozen_dtype = {config.frozen_dtype!r}: method = 'full' trains what it would round")
    if config.reuse_features > config.sampling_steps:
        problems.append(f"reuse_features = {config.reuse_features} is above sampling_steps = {config.sampling_steps}")
    if config.evaluate_every % config.sample_every:
        problems.append(
            f"evaluate_every = {config.evaluate_every} is no multiple of sample_every = {config.sample_every}: sample "
            "pictures are scored"
        )
    scored = any("{identifier}" in prompt for prompt in config.sample_prompts)
    if config.evaluate_every and not scored and not config.held_out_images:
        problems.append("evaluate_every: no sample prompt has {identifier}; there is nothing to score")
    if config.held_out_images and not config.evaluate_every:
        problems.append("held_out_images: their loss is measured every evaluate_every steps, which is 0")
    if config.keep_best and not (config.evaluate_every and scored):
        problems.append("keep_best needs the scores of evaluate_every, of sample prompts with {identifier}")
    if config.patience and not config.keep_best:
        problems.append(f"patience = {config.patience} counts scores without a better one: set keep_best=True")
    if config.keep_best and config.stages:
        problems.append("keep_best: not implemented for a cascade, whose stages enlarge the newest pictures of others")
    prompts = {name: config[name] for name in ("instance_prompt", "class_prompt")}
    prompts |= {f"sample_prompts[{i}]": text for i, text in enumerate(config.sample_prompts)}
    for name, text in prompts.items():
        try:
            fill(text, config, name)
        except ValueError as error:
            problems.append(str(error))
    return problems


def fill(template: str, config: ConfigDict, where: str = "prompt") -> str:
    """A prompt with the config's identifier and class noun in their places."""
    return captions.fill(template, config.identifier, config.class_noun, where)


def absolute_paths(config: ConfigDict) -> ConfigDict:
    """The config with absolute paths: `~` expanded, examples that ship with the package found."""
    changed = ConfigDict(dict(config))
    with changed.ignore_type():
        changed.update(_absolute(config))
    return changed


def _absolute(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Field -> absolute path; names of hubs and data sets, and buckets, stay as they are."""
    paths: dict[str, Any] = {}
    for name in (
        "workdir",
        "instance_images",
        "held_out_images",
        "class_images",
        "subjects",
        "init_adapter",
        "init_embedding",
    ):
        text = config.get(name, "")  # older versions had fewer
        if not text or re.match(r"[a-z]+:", text) or (name == "held_out_images" and text.isdecimal()):  # a number
            continue
        path = os.path.expanduser(text)
        paths[name] = os.path.abspath(shipped(path) if name in ("instance_images", "subjects") else path)
    paths |= {name: _model_path(config[name]) for name in ("base", "judge_dino", "judge_clip") if name in config}
    return paths | {"stages": tuple(map(_model_path, config.get("stages", ())))}


def _model_path(name: str) -> str:
    """Absolute path of a model's folder, or of FILE or FILE@TEMPLATE; hub names and embedded bases as they are."""
    place, template = at_template(name)
    path = os.path.expanduser(place)
    if name in EMBEDDED or not os.path.exists(path):
        return name
    return os.path.abspath(path) + (f"@{_model_path(template)}" if template else "")


_ATTENTION = r"to_[qkv]|to_out\.0|[qkv]_proj|out_proj"


def check_resumable(config: ConfigDict, earlier: Mapping[str, Any]) -> None:
    """Raises ConfigError, naming the fields, if `config` describes another run than `earlier`, its config.json."""
    now = json.loads(config.to_json())
    earlier = {**earlier, **_absolute(earlier)}
    if earlier["lora_targets"] == _ATTENTION:  # as versions without names for targets wrote it
        earlier["lora_targets"] = "attention"
    fields = {name for name, field in FIELDS.items() if field.identity}
    if not config.prior_preservation:
        fields -= {*_PAINTING, "prior_weight", "prior_target"}
    if config.method not in ADAPTERS:
        fields -= {name for name in fields if name.startswith("lora_") and config.method != "pivotal"}
    if config.lr_schedule == "constant" and config.method != "pivotal":
        fields -= {"steps"}  # a longer run has the same first steps
    changed = sorted(name for name in fields if now[name] != earlier.get(name))
    if changed:
        lines = (f"{name}: {earlier.get(name)!r} in the checkpoint, {now[name]!r} now" for name in changed)
        raise ConfigError(
            f"{config.workdir} holds a run trained with another config; go on with its values, or give another "
            "--config.workdir:\n  " + "\n  ".join(lines)
        )
