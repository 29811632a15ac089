"""A training run from its plan to its last step."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, Int, Key

from dreambooth_jax.data.images import Examples
from dreambooth_jax.devices import runtime
from dreambooth_jax.diffusion.buckets import alike
from dreambooth_jax.diffusion.examples import TrainingData
from dreambooth_jax.diffusion.optimizer import learning_rate
from dreambooth_jax.diffusion.step import Metrics, TrainState
from dreambooth_jax.families.pipeline import read_params
from dreambooth_jax.models.params import Params
from dreambooth_jax.runs import checkpoint
from dreambooth_jax.runs.ahead import compiling
from dreambooth_jax.runs.best import is_over, open_best
from dreambooth_jax.runs.fingerprints import Fingerprints, comparing, of_captions, of_masks, of_pixels
from dreambooth_jax.runs.held_out import held_out_data, mean_loss
from dreambooth_jax.runs.job import pairs_prior, resident_data, tokens_held_from, training_size
from dreambooth_jax.runs.loop import Progress, Store, loop
from dreambooth_jax.runs.moved import NEW_TOKENS, check_moved, checksums
from dreambooth_jax.runs.plan_text import check_space, farewell, plan_text
from dreambooth_jax.runs.preemption import Agreement, Preemption
from dreambooth_jax.runs.report import Reporter
from dreambooth_jax.runs.samples import paint_prompts, sheet_is_missing, sheets_of
from dreambooth_jax.runs.setup import (
    Run,
    begin,
    class_examples,
    prepare_data,
    read_base,
    start_state,
    training_sizes,
)
from dreambooth_jax.runs.watch import (
    Watch,
    is_due,
    look_at_base,
    make_watch,
    noun_warning,
    read_rows,
    says_best,
    scored_texts,
)


class Ready(NamedTuple):
    """A run whose first step can be taken.

    Attributes:
        advance: takes some steps, (state, count) -> (state, metrics).
        progress: state that was reached.
        bucket: number of the program of every step.
        frozen: parameters that do not train.
        watch: scores and losses at the sample steps, or None.
    """

    advance: Callable[[TrainState, np.int32], tuple[TrainState, Metrics]]
    progress: Progress
    bucket: Int[np.ndarray, "steps"]
    frozen: Params
    watch: Watch | None


def train(
    run: Run,
    guard: Preemption,
    *,
    read: Callable[..., Params] = read_params,
    compile_steps: Callable[[jax.stages.Lowered], jax.stages.Compiled] = jax.stages.Lowered.compile,
    reporter: Callable[..., Reporter] = Reporter,
) -> None:
    """Reads the weights, prepares the data and runs the loop to its end.

    Args:
        guard: answers signals.
        read: reads the base's weights, (pipeline, mesh, shapes) -> params.
        compile_steps: compiles the training steps.
        reporter: opens the reports, see `Reporter`.
    """
    config = run.config
    folder = run.workdir / "checkpoints"
    record: dict[str, Any] = {"config": run.given, "fingerprints": fingerprints(run)}
    manager = checkpoint.open_checkpoints(
        folder, keep_last=config.keep_last, keep_every=config.keep_every or None, record=record
    )
    with checkpoint.closing(manager):
        guard.before_leaving(functools.partial(checkpoint.wait, manager))
        done = manager.latest_step() or 0
        earlier = checkpoint.read_record(folder, done).get("fingerprints", {}) if done else {}
        compare = comparing(config.workdir, earlier, record)
        if runtime.is_first_process():
            print(plan_text(run, done, compared=bool(earlier)), flush=True)
        compare({})
        rows = read_rows(run.workdir, done) if done else {}
        missing = sheet_is_missing(run, done) or (done > 0 and is_due(config, rows, done))
        reached = done if is_over(config, rows, done) else max(done, config.steps)
        if done < reached or missing:
            watch = make_watch(config, run.mesh, run.workdir, rows)  # before anything slow: its models may be absent
            check_space(run, stored=len(manager.all_steps()))
            ready = prepare(run, manager, watch, compare, read, compile_steps)
            with open_best(run.workdir, config, done, record) as best:
                take_steps(run, guard, manager, ready, best, reporter)
            reached = ready.progress.step
    if runtime.is_first_process():
        print(farewell(run, reached), flush=True)
        if config.keep_best:
            print(says_best(config, read_rows(run.workdir, reached)), flush=True)


def prepare(
    run: Run,
    manager: ocp.CheckpointManager,
    watch: Watch | None,
    compare: Callable[[Fingerprints], None],
    read: Callable[..., Params],
    compile_steps: Callable[[jax.stages.Lowered], jax.stages.Compiled],
) -> Ready:
    """Reads the weights, encodes the data and restores the state, while the steps are compiled.

    Args:
        watch: without losses yet.
        compare: compares fingerprints with those of the checkpoint, and raises.
        read, compile_steps: see `train`.
    """
    job = run.job
    with compiling(run, compile_steps) as program:
        params = read_base(job, compare, read)
        trainable, frozen, key = begin(job, params)
        del params
        # The base still, in the form that the samples' painter takes: painting compiles once.
        base = job.method.combine(frozen, trainable)
        data = prepare_data(run, base, functools.partial(compare_class_images, compare))
        if watch is not None:
            if warning := noun_warning(watch):
                say(f"warning: {warning}")
            watch = with_losses(watch, run, base, frozen, data, key)
            look_at_base(watch, base, trainable, functools.partial(paint_prompts, run))
        del base
        data, bucket = resident_data(job, data)
        state = start_state(job, trainable, manager)
        progress = Progress(int(state.step), state)
        del trainable, state
        programs = [program(number, progress.state, frozen, part, key) for number, part in enumerate(data)]

    def advance(state: TrainState, count: np.int32) -> tuple[TrainState, Metrics]:
        number = bucket[progress.step]
        return programs[number](state, frozen, data[number], key, count)

    return Ready(advance, progress, bucket, frozen, watch)


def take_steps(
    run: Run,
    guard: Preemption,
    manager: ocp.CheckpointManager,
    ready: Ready,
    best: ocp.CheckpointManager | None,
    reporter: Callable[..., Reporter],
) -> None:
    """Runs the loop to the last step, or to a signal.

    Args:
        best: checkpoints that `keep_best` fills.
        reporter: see `train`.
    """
    watch = ready.watch and ready.watch._replace(best=best)
    with contextlib.nullcontext() if runtime.is_alone() else guard.deferred():
        loop(
            run.config,
            ready.progress,
            ready.advance,
            store=store_of(manager),
            sheets=sheets_of(run, ready.frozen, watch),
            reporter=reporter(run.workdir, first_step=ready.progress.step, steps=run.config.steps),
            guard=guard,
            agree=Agreement(run.mesh),
            inspect=moved_check(run, ready.progress),
            alike=functools.partial(alike, ready.bucket),
        )


def say(text: str) -> None:
    """Prints a text, on the first process."""
    if runtime.is_first_process():
        print(text, flush=True)


def compare_class_images(compare: Callable[[Fingerprints], None], class_images: Sequence[Examples]) -> None:
    """Compares the class images and their captions with those of the checkpoint."""
    compare({"class images": of_pixels(class_images), "class captions": of_captions(class_images)})


def with_losses(
    watch: Watch, run: Run, base: Params, frozen: Params, data: Sequence[TrainingData], key: Key[Array, ""]
) -> Watch:
    """The watch with the losses of the run's held-out photos, if it has some.

    Args:
        base: parameters of the base.
        data: for training, by shape; class examples of other shapes are encoded here.
        key: the run's.
    """
    if not run.held_out:
        return watch
    known = dict(zip(training_sizes(run), (part.prior for part in data), strict=True))
    parts = []
    for examples in run.held_out:
        size = examples.images.shape[1:3] if run.config.buckets else training_size(run.config)
        encodes = run.config.prior_preservation and not pairs_prior(run.config) and size not in known
        prior = class_examples(run, base, size) if encodes else known.get(size)
        parts.append((size, held_out_data(run.job, base, examples, prior)))
    loss = mean_loss(run.job, parts)
    return watch._replace(losses=lambda trained: loss(trained, frozen, key))


def moved_check(run: Run, progress: Progress) -> Callable[[TrainState, int], None]:
    """Builds the check that every part that should train has changed since `progress`."""
    config, first = run.config, progress.step
    before = checksums(progress.state.trainable)
    rate = learning_rate(config.lr_schedule, config.learning_rate, warmup=config.lr_warmup_steps, steps=config.steps)

    held = tokens_held_from(config)

    def check(state: TrainState, steps: int) -> None:
        moving = [step for step in range(first, first + steps) if float(rate(step)) > 0]
        tokens_move = any(step < held for step in moving)
        expected = {name: x for name, x in before.items() if moving and (tokens_move or not name.endswith(NEW_TOKENS))}
        if expected:
            say(check_moved(expected, checksums(state.trainable), steps))

    return check


def store_of(manager: ocp.CheckpointManager) -> Store:
    """The checkpoints of a manager, for the loop."""
    return Store(
        *(functools.partial(function, manager) for function in (checkpoint.save, checkpoint.check, checkpoint.wait))
    )


def fingerprints(run: Run) -> Fingerprints:
    """Of everything but the class images, which may not be painted yet."""
    found = {"photos": of_pixels(run.examples), "captions": of_captions(run.examples), "masks": of_masks(run.examples)}
    found |= {"base": {"weights": run.digest}}
    if run.config.keep_best:  # pictures of other prompts have other scores
        found["scored prompts"] = dict.fromkeys(scored_texts(run.config), "")
    return found
