"""What a run says before and after: its plan, the disk space it takes, what to do with the result."""

import shlex
import shutil

import jax

from dreambooth_jax.data.buckets import text_of
from dreambooth_jax.data.class_images import class_notes, describe_class_images
from dreambooth_jax.data.contradictions import contradictions, too_long
from dreambooth_jax.data.identifiers import check_identifier
from dreambooth_jax.devices.sharding import batch_sharding
from dreambooth_jax.models.params import count
from dreambooth_jax.runs import checkpoint
from dreambooth_jax.runs.config import ConfigError, fill
from dreambooth_jax.runs.job import initial, pairs_prior
from dreambooth_jax.runs.setup import Run, sizes_of


def plan_text(run: Run, done: int, *, compared: bool = True) -> str:
    """The plan of a run that goes on from step `done`, and warnings.

    Args:
        compared: whether photos, captions and base were compared with those of the checkpoint.
    """
    config, shapes = run.config, run.pipeline.shapes
    trained, _ = run.job.method.shapes(shapes)
    images = len({name for part in run.examples for name in part.names})
    prior = "the base's own predictions on the photos" if pairs_prior(config) else "off"
    if config.prior_preservation and not pairs_prior(config):
        prompt = fill(config.class_prompt, config)
        prior = f"{describe_class_images(config, run.to_paint)}: {prompt!r}, weight {config.prior_weight:g}"
    axes = " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    aside = dict.fromkeys(name for part in run.held_out for name in part.names)
    held_out = {"held out": f"{', '.join(aside)}: for loss"} if aside else {}
    lines = {
        "base": f"{config.base} ({config.resolution}x{config.resolution}, {count(shapes) / 1e6:.1f} M parameters)",
        "subject": f"{images} images in {config.instance_images}: {run.examples[0].captions[0]!r}",
        **held_out,
        "prior": prior,
        "method": f"{run.job.method.says}, {count(trained) / 1e6:.3g} M parameters, {config.optimizer}; its file takes "
        f"{_in_megabytes(file_size(run))}",
        "steps": f"{config.steps} of {config.batch_size} images" + (f"; going on from step {done}" if done else ""),
        "mesh": f"{run.mesh.size} {jax.devices()[0].device_kind} device(s), {axes}",
        "workdir": config.workdir,
    }
    if config.buckets:
        lines["buckets"] = _buckets(run)
    notes = [f"  photos: {note}" for part in run.examples for note in part.notes]
    if config.prior_preservation and not pairs_prior(config):
        notes += [f"   class: {note}" for note in class_notes(config)]
    notes += [f"    note: {note}" for note in run.notes]
    if done and not compared:
        notes.append("    note: the checkpoint stores no fingerprints: photos and base were not compared with its own")
    return "\n".join([*(f"{name:>8}: {text}" for name, text in lines.items()), *notes, *_warnings(run)])


def _buckets(run: Run) -> str:
    """The shapes, the share of the steps that each takes, and what becomes of the class images."""
    total = sum(len(part.captions) for part in run.examples)
    shapes = [
        f"{text_of(size)} ({100 * len(part.captions) / total:.0f} % of the steps)"
        for size, part in zip(sizes_of(run), run.examples, strict=True)
    ]
    count = f"{len(shapes)} shape{'s' * (len(shapes) > 1)} and compiled program{'s' * (len(shapes) > 1)}"
    prior = "; class images are cropped to the shape of their step" if run.config.prior_preservation else ""
    return f"{count}: {', '.join(shapes)}{prior}"


def _warnings(run: Run) -> list[str]:
    config = run.config
    warnings = list(check_identifier(run.pipeline.tokenizer, config.identifier))
    captions = [caption for part in run.examples for caption in part.captions]
    warnings += contradictions(config, captions)
    warnings += too_long(captions, config.identifier, run.pipeline.tokenizer)
    if config.keep_last == 1:
        size = checkpoint_size(run)
        warnings.append(
            f"keep_last = 1: if the only checkpoint is damaged, nothing is left; 2 would take {size / 1e9:.2g} GB more"
        )
    batch = (1 + config.prior_preservation) * config.batch_size // config.accumulate
    used = batch // batch_sharding(run.mesh, batch).shard_shape((batch,))[0]
    if used < run.mesh.size:
        warnings.append(
            f"{batch} images at a time keep {used} of {run.mesh.size} devices busy; "
            f"a multiple of {run.mesh.size} keeps all"
        )
    return [f"warning: {warning}" for warning in warnings]


def checkpoint_size(run: Run) -> int:
    """Bytes of one checkpoint, before compression."""
    trained, _ = run.job.method.shapes(run.pipeline.shapes)
    return checkpoint.nbytes(jax.eval_shape(initial(run.job), trained))


def best_size(run: Run) -> int:
    """Bytes of the best checkpoint, which has no optimizer state."""
    trained, _ = run.job.method.shapes(run.pipeline.shapes)
    return checkpoint.nbytes(jax.eval_shape(initial(run.job), trained)._replace(opt_state={}))


def check_space(run: Run, *, stored: int, free: int | None = None) -> None:
    """Checks that the disk holds the checkpoints that are still to come (local workdirs only).

    Args:
        stored: number of checkpoints that are there already.
        free: bytes left; default: of the workdir's disk.

    Raises:
        ConfigError: it does not; says what is left and what is needed.
    """
    config = run.config
    if "://" in config.workdir:
        return
    size, best = checkpoint_size(run), best_size(run) if config.keep_best else 0
    kept = config.keep_last + (config.steps // config.keep_every if config.keep_every else 0)
    # A new checkpoint is complete before an old one goes.
    need = size * max(1, kept + 1 - stored) + best
    free = shutil.disk_usage(run.workdir).free if free is None else free
    if need > free:
        raise ConfigError(
            f"workdir = {config.workdir!r}: the disk has {free / 1e9:.3g} GB left and the checkpoints may take "
            f"{need / 1e9:.3g} GB, {size / 1e9:.3g} GB each; make room, keep fewer (keep_last, keep_every), or give "
            "another --config.workdir"
        )


def file_size(run: Run) -> int:
    """Bytes of what `export` makes of the run in float32, without headers: an adapter, or of full fine-tuning a whole
    model."""
    whole = run.pipeline.shapes
    return 4 * count(whole if run.config.method == "full" else run.job.method.shapes(whole)[0])


def _in_megabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def farewell(run: Run, step: int) -> str:
    """Where the result of `step` steps is, and the commands that use it."""
    config, workdir = run.config, shlex.quote(str(run.workdir))
    prompt = f"a {config.identifier} {config.class_noun} on a red background"
    return (
        f"Done. Checkpoint: {run.workdir}/checkpoints/{step}, pictures: {run.workdir}/samples, "
        f"metrics: {run.workdir}/metrics.csv (and tensorboard --logdir {workdir})\n"
        f"Paint more:  python -m dreambooth_jax.sample --workdir {workdir} --prompt {shlex.quote(prompt)}\n"
        f"Take it elsewhere ({_in_megabytes(file_size(run))} in float32):  "
        f"python -m dreambooth_jax.export --workdir {workdir} --output {shlex.quote(f'{run.workdir}/model')}"
    )
