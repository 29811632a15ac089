"""Settings without effect: changing one of them from its preset is an error, since it would do nothing in silence."""

from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from dreambooth_jax.files.hub import EMBEDDED
from dreambooth_jax.runs.config import ADAPTERS, WITH_TOKEN, ConfigError


class Idle(NamedTuple):
    """Fields that have no effect where `when` holds, and the reason in words."""

    fields: tuple[str, ...]
    when: Callable[[ConfigDict], bool]
    reason: str


IDLE = (
    Idle(
        ("lora_rank", "lora_alpha", "lora_targets", "lora_ranks", "lora_scaling", "lora_plus_ratio"),
        lambda c: c.method not in (*ADAPTERS, "pivotal"),
        "with method = {method}, which trains no factors",
    ),
    Idle(("lora_plus_ratio",), lambda c: c.method in ("loha", "lokr"), "with method = {method}, of no second factor"),
    Idle(
        ("token_vectors", "token_start"), lambda c: c.method not in WITH_TOKEN, "with method = {method}: no new token"
    ),
    Idle(("token_start",), lambda c: bool(c.init_embedding), "with init_embedding, which the new token starts as"),
    Idle(("pivotal_fraction",), lambda c: c.method != "pivotal", "with method = {method}"),
    Idle(("instance_prompt", "captions"), lambda c: bool(c.templates), "with templates, which give the captions"),
    Idle(
        ("prior_weight", "prior_target", "class_prompt", "class_images", "create_class_images", "num_class_images"),
        lambda c: not c.prior_preservation,
        "with prior_preservation = False",
    ),
    Idle(
        ("create_class_images", "num_class_images"),
        lambda c: c.prior_target == "base" and not c.class_images,
        "with prior_target = 'base' and no class_images: nothing is painted",
    ),
    Idle(
        ("text_encoder_multiplier",),
        lambda c: not (c.train_text_encoder or c.method in WITH_TOKEN),
        "with train_text_encoder = False",
    ),
    Idle(("stage", "stage_fields"), lambda c: not c.stages, "without stages"),
    Idle(("stages", "stage", "stage_fields"), lambda c: bool(c.subjects), "with subjects, which train one model"),
    Idle(("instance_images",), lambda c: bool(c.subjects), "with subjects, which name the photos"),
    Idle(("sample_every",), lambda c: bool(c.subjects), "with subjects, painted once at the end"),
    Idle(
        ("create_class_images",),
        lambda c: not c.class_images and c.prior_preservation and c.prior_target == "noise",
        "without class_images: the workdir's own folder is made anyway",
    ),
    Idle(("moment_dtype",), lambda c: c.optimizer == "adafactor", "with optimizer = {optimizer}"),
    Idle(("second_moment_dtype",), lambda c: c.optimizer != "adamw", "with optimizer = {optimizer}"),
    Idle(
        ("sample_count", "reuse_features", "negative_prompt"), lambda c: not c.sample_prompts, "without sample_prompts"
    ),
    Idle(
        ("sampler", "sampling_steps", "guidance_scale", "class_batch_size"),
        lambda c: not (c.sample_prompts or c.prior_preservation),
        "where nothing is painted: no sample_prompts, and prior_preservation = False",
    ),
    Idle(
        ("evaluate_every",),
        lambda c: not (c.sample_prompts or c.held_out_images),
        "without sample_prompts, whose pictures are scored, and without held_out_images",
    ),
    Idle(("best_max_prompt_loss", "best_max_copy"), lambda c: not c.keep_best, "with keep_best = False"),
    Idle(
        ("judge_dino", "judge_clip"),
        lambda c: not c.evaluate_every or c.base in EMBEDDED,
        "without evaluate_every, or for the embedded base, which the models beside it score",
    ),
    Idle(("negative_prompt",), lambda c: c.guidance_scale == 1, "with guidance_scale = 1"),
)


def idle_fields(config: ConfigDict) -> set[str]:
    """The fields that have no effect in this run."""
    return {name for rule in IDLE if rule.when(config) for name in rule.fields}


def check_effects(config: ConfigDict, preset: ConfigDict) -> None:
    """Compares a config with its preset.

    Raises:
        ConfigError: a field was changed and has no effect in this run; names all of them.
    """
    problems = []
    for fields, when, reason in IDLE:
        changed = [name for name in fields if config[name] != preset[name]]
        if changed and when(config):
            why = reason.format(**{name: repr(config[name]) for name in ("method", "optimizer")})
            problems += [f"{name} = {config[name]!r} has no effect {why}" for name in changed]
    if problems:
        raise ConfigError(
            "these settings would do nothing; leave them at their preset's values, or change what makes them idle:\n  "
            + "\n  ".join(problems)
        )
