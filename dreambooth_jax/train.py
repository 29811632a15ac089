"""Fine-tunes a text-to-image model on a subject (arXiv 2208.12242).

    python -m dreambooth_jax.train --config configs/dog.py

Running the same command again goes on from the last checkpoint. SIGTERM saves and exits with code 143.
"""

import contextlib
import functools
import json
import os
import shutil
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from dreambooth_jax.data.class_images import (
    agreed,
    check_class_images,
    class_folder,
    missing_class_images,
    paint_class_images,
    read_class_images,
)
from dreambooth_jax.data.contradictions import contradictions, too_long
from dreambooth_jax.data.encode import make_encoder
from dreambooth_jax.data.identifiers import check_identifier
from dreambooth_jax.data.images import Examples, decode_image, read_examples
from dreambooth_jax.data.sources import list_images
from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.sharding import batch_sharding, make_mesh, param_sharding, replicated
from dreambooth_jax.diffusion.step import TrainingData, TrainState
from dreambooth_jax.families.pipeline import Pipeline, load_pipeline, read_params
from dreambooth_jax.models.params import Params, count
from dreambooth_jax.painting.painter import Painter, Request, make_painter, paint_sheet, save_sheet
from dreambooth_jax.painting.sheets import file_names, save_png
from dreambooth_jax.runs import checkpoint
from dreambooth_jax.runs.config import ConfigError, check_config, check_resumable, fill
from dreambooth_jax.runs.job import Job, fresh_state, initial, lower_steps, make_job, state_shapes
from dreambooth_jax.runs.preemption import Agreement, Preemption
from dreambooth_jax.runs.report import NonFiniteLoss, Reporter, check_finite, write_whole


class Run(NamedTuple):
    """A training run after set-up: what is fixed while the state changes."""

    job: Job
    workdir: epath.Path
    paint: Painter
    examples: Examples

    @property
    def config(self) -> ConfigDict:
        return self.job.config

    @property
    def pipeline(self) -> Pipeline:
        return self.job.pipeline

    @property
    def mesh(self) -> Mesh:
        return self.job.mesh


def set_up(config: ConfigDict) -> Run:
    """Everything cheap, and every check, before weights are read or anything is compiled."""
    check_config(config)
    workdir = epath.Path(config.workdir)
    _claim(workdir, config)
    mesh = make_mesh(config.mesh_data, config.mesh_fsdp)
    pipeline = load_pipeline(config.base, dtype=jnp.dtype(config.dtype), remat=config.remat)
    job = make_job(config, pipeline, mesh)
    config = job.config
    paint = make_painter(
        pipeline, mesh, resolution=config.resolution, batch_size=config.class_batch_size,
        sampler=config.sampler, steps=config.sampling_steps, guidance=config.guidance_scale,
    )  # fmt: skip
    examples = read_examples(
        config.instance_images, config.resolution, template=config.instance_prompt, identifier=config.identifier,
        class_noun=config.class_noun, captions=config.captions, crop=config.crop, flip=config.flip,
        views=config.views, seed=config.seed,
    )  # fmt: skip
    if config.prior_preservation and list_images(class_folder(config)):
        read_class_images(config)  # what cannot be read is an error now, not after the missing ones are painted
        check_class_images(class_folder(config), fill(config.class_prompt, config))
    return Run(job, workdir, paint, examples)


def _claim(workdir: epath.Path, config: ConfigDict) -> None:
    """Makes the workdir and writes the config into it; refuses one that cannot be written or holds another run."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        earlier = workdir / "config.json"
        if earlier.exists() and any((workdir / "checkpoints").glob("[0-9]*")):
            check_resumable(config, json.loads(earlier.read_text()))
        if runtime.is_first_process():
            write_whole(earlier, json.dumps(json.loads(config.to_json()), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"workdir = {config.workdir!r} cannot be written ({error}); give another --config.workdir"
        ) from error


def print_plan(run: Run, done: int) -> None:
    """What is about to happen, for a person."""
    config, shapes = run.config, run.pipeline.shapes
    trained, _ = run.job.method.shapes(shapes)
    images = len(set(run.examples.names))
    prior = "off"
    if config.prior_preservation:
        wanted = max(config.num_class_images, len(list_images(class_folder(config))))
        prompt = fill(config.class_prompt, config)
        prior = f"{wanted} class images in {class_folder(config)}: {prompt!r}, weight {config.prior_weight:g}"
    axes = " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    lines = {
        "base": f"{config.base} ({config.resolution}x{config.resolution}, {count(shapes) / 1e6:.1f} M parameters)",
        "subject": f"{images} images in {config.instance_images}: {run.examples.captions[0]!r}",
        "prior": prior,
        "method": f"{run.job.method.says}, {count(trained) / 1e6:.3g} M parameters, {config.optimizer}",
        "steps": f"{config.steps} of {config.batch_size} images" + (f"; going on from step {done}" if done else ""),
        "mesh": f"{run.mesh.size} {jax.devices()[0].device_kind} device(s), {axes}",
        "workdir": config.workdir,
    }
    print("\n".join(f"{name:>8}: {text}" for name, text in lines.items()), flush=True)
    for note in run.examples.notes:
        print(f"  photos: {note}", flush=True)
    warnings = check_identifier(run.pipeline.tokenizer, config.identifier)
    warnings += contradictions(config, run.examples.captions)
    warnings += too_long(run.examples.captions, config.identifier, run.pipeline.tokenizer)
    for warning in warnings:
        print(f"warning: {warning}", flush=True)
    batch = (1 + config.prior_preservation) * config.batch_size // config.accumulate
    used = batch // batch_sharding(run.mesh, batch).shard_shape((batch,))[0]
    if used < run.mesh.size:
        print(
            f"warning: {batch} images at a time keep {used} of {run.mesh.size} devices busy; "
            f"a multiple of {run.mesh.size} keeps all",
            flush=True,
        )


def prepare_data(run: Run, params: Params) -> TrainingData:
    """Paints what class images are missing, then encodes all examples."""
    config = run.config
    encode = make_encoder(run.pipeline, run.mesh, text_states=not config.train_text_encoder)
    if not config.prior_preservation:
        return TrainingData(encode(params, run.examples), None)
    folder = class_folder(config)
    if numbers := agreed(missing_class_images(folder, config.num_class_images), config.num_class_images):
        about = {
            "model": config.base, "sampler": config.sampler, "steps": str(config.sampling_steps),
            "guidance": str(config.guidance_scale),
        }  # fmt: skip
        paint_class_images(
            folder, numbers, run.paint, params, prompt=fill(config.class_prompt, config), seed=config.seed,
            batch_size=config.class_batch_size, metadata=about,
        )  # fmt: skip
    return TrainingData(encode(params, run.examples), encode(params, read_class_images(config)))


def start_state(run: Run, trainable: Params, manager) -> TrainState:
    """The state to begin with, placed on the mesh: from the newest checkpoint, or fresh."""
    return checkpoint.restore(manager, state_shapes(run.job, trainable)) or fresh_state(run.job, trainable)


def train(run: Run, guard: Preemption) -> None:
    """Reads the weights, prepares the data and runs the loop to its end."""
    config = run.config
    manager = checkpoint.open_checkpoints(
        run.workdir / "checkpoints", keep_last=config.keep_last, keep_every=config.keep_every or None
    )
    with contextlib.closing(manager):  # also after an error: what is being saved becomes complete
        guard.before_leaving(manager.wait_until_finished)
        done = manager.latest_step() or 0
        if runtime.is_first_process():
            print_plan(run, done)
        if done < config.steps or _sheet_is_missing(run, done):
            check_space(run, manager)
            params = read_params(run.pipeline, functools.partial(param_sharding, run.mesh))
            key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=replicated(run.mesh))()
            trainable, frozen = run.job.method.start(params, key)
            del params
            # The base still, in the form that the samples' painter takes: painting compiles once.
            data = prepare_data(run, run.job.method.combine(frozen, trainable))
            state = start_state(run, trainable, manager)
            del trainable
            steps = lower_steps(run.job, state, frozen, data, key).compile()
            # Several processes leave together, from inside the loop only.
            with contextlib.nullcontext() if runtime.is_alone() else guard.polled():
                loop(run, guard, manager, state, frozen, lambda state, n: steps(state, frozen, data, key, n))
    if runtime.is_first_process():
        print(_farewell(run, max(done, config.steps)), flush=True)


def check_space(run: Run, manager) -> None:
    """Raises ConfigError if the disk cannot hold the checkpoints that are still to come (local workdirs only)."""
    config = run.config
    if "://" in config.workdir:
        return
    trained, _ = run.job.method.shapes(run.pipeline.shapes)
    size = checkpoint.size(jax.eval_shape(initial(run.job), trained))
    kept = config.keep_last + (config.steps // config.keep_every if config.keep_every else 0)
    # A new checkpoint is complete before an old one goes.
    need = size * max(1, kept + 1 - len(manager.all_steps()))
    free = shutil.disk_usage(run.workdir).free
    if need > free:
        raise ConfigError(
            f"workdir = {config.workdir!r}: the disk has {free / 1e9:.3g} GB left and the checkpoints may take "
            f"{need / 1e9:.3g} GB, {size / 1e9:.3g} GB each; make room, keep fewer (keep_last, keep_every), or give "
            "another --config.workdir"
        )


def loop(run: Run, guard: Preemption, manager, state: TrainState, frozen: Params, advance) -> TrainState:
    """Calls `advance(state, count)` until all steps are done; reports, saves and paints in between.

    Metrics are read one call late, so that the device never waits for the host.
    """
    config, combine = run.config, run.job.method.combine
    step = int(state.step)
    reporter = Reporter(run.workdir, first_step=step, steps=config.steps)
    late, agree = [], Agreement(run.mesh)

    def report_late() -> None:
        while late:
            reporter.record(*late.pop())

    def save() -> None:
        report_late()  # a state that is not finite must not replace one that is
        check_finite(state.trainable, step)
        reporter.flush()
        checkpoint.save(manager, step, state)

    def save_and_wait() -> None:
        if step > 0:
            save()
        manager.wait_until_finished()

    guard.before_leaving(save_and_wait)
    if step == 0:
        paint_before(run, combine(frozen, state.trainable))
    if _sheet_is_missing(run, step):  # the run was stopped after it had saved and before it had painted
        paint_samples(run, combine(frozen, state.ema or state.trainable), step)
    while step < config.steps:
        with guard.polled():
            until = _next_stop(step, config)
            while step < until:
                number = min(config.steps_per_call, until - step)
                state, metrics = advance(state, np.int32(number))
                report_late()
                late.append((step, metrics, number))
                step += number
                if agree(guard.requested):
                    guard.leave()
            if step % config.save_every == 0 or step == config.steps:
                save()
            report_late()  # here, so that whoever leaves while we paint finds nothing half reported
        if _paints(step, config):
            paint_samples(run, combine(frozen, state.ema or state.trainable), step)
    guard.before_leaving(manager.wait_until_finished)
    reporter.close()
    return state


def _next_stop(step: int, config: ConfigDict) -> int:
    """The next step at which something is saved or painted."""
    return min(config.steps, *(step - step % every + every for every in (config.save_every, config.sample_every)))


def _paints(step: int, config: ConfigDict) -> bool:
    return step % config.sample_every == 0 or step == config.steps


def _sheet(run: Run, step: int) -> epath.Path:
    return run.workdir / "samples" / f"step_{step:06d}.png"


def _sheet_is_missing(run: Run, step: int) -> bool:
    config = run.config
    return step > 0 and _paints(step, config) and bool(config.sample_prompts) and not _sheet(run, step).exists()


def paint_before(run: Run, params: Params) -> None:
    """Paints what the base makes of the prompts without identifier, for every later sheet to show beside."""
    config = run.config
    prompts = [fill(prompt, config) for prompt in config.sample_prompts if _is_of_class(prompt)]
    requests = [
        (prompt, seed, Request(prompt, config.negative_prompt, jax.random.key(seed)))
        for prompt in prompts
        for seed in range(config.sample_count)
    ]
    for number, image in run.paint(params, [request for _, _, request in requests]):
        prompt, seed, _ = requests[number]
        about = {"model": config.base, "prompt": prompt, "seed": str(seed)}
        if runtime.is_first_process():
            save_png(_before(run, prompt, seed), image, about)


def _is_of_class(prompt: str) -> bool:
    return "{identifier}" not in prompt


def _before(run: Run, prompt: str, seed: int) -> epath.Path:
    names = file_names([fill(prompt, run.config) for prompt in run.config.sample_prompts])
    return run.workdir / "samples" / "before" / f"{names[prompt]}_{seed}.png"


def paint_samples(run: Run, params: Params, step: int) -> None:
    """Paints the fixed prompts and seeds into samples/, the training images above them, and for prompts without
    identifier what the base made of them."""
    config = run.config
    prompts = [fill(prompt, config) for prompt in config.sample_prompts]
    painted = paint_sheet(run.paint, params, prompts, range(config.sample_count), negative=config.negative_prompt)
    if not prompts or not runtime.is_first_process():
        return
    labels, rows = ["training images"], [list(run.examples.images[: config.sample_count])]
    for prompt, row in zip(prompts, painted, strict=True):
        before = [_before(run, prompt, seed) for seed in range(config.sample_count)]
        if all(path.exists() for path in before):
            labels.append(f"{prompt}: before training")
            rows.append([np.asarray(decode_image(path.read_bytes())) for path in before])
        labels.append(prompt)
        rows.append(row)
    about = {"model": config.base, "step": str(step), "seeds": f"0 to {config.sample_count - 1}"}
    save_sheet(_sheet(run, step), rows, labels, about)


def _farewell(run: Run, step: int) -> str:
    config = run.config
    prompt = f"a {config.identifier} {config.class_noun} on a red background"
    return (
        f"Done. Checkpoint: {run.workdir}/checkpoints/{step}, pictures: {run.workdir}/samples, "
        f"metrics: {run.workdir}/metrics.csv (and tensorboard --logdir {run.workdir})\n"
        f'Paint more:  python -m dreambooth_jax.sample --workdir {run.workdir} --prompt "{prompt}"\n'
        f"Take it elsewhere:  python -m dreambooth_jax.export --workdir {run.workdir} --output {run.workdir}/model"
    )


def main(_) -> None:
    runtime.start()
    with Preemption() as guard:
        try:
            train(set_up(flags.FLAGS.config), guard)
        except (OSError, ValueError, NonFiniteLoss) as error:
            sys.exit(f"error: {error}")
        except jax.errors.JaxRuntimeError as error:
            if runtime.is_alone():
                raise
            print(
                f"error: process {jax.process_index()} cannot go on without the others ({str(error).splitlines()[0]}). "
                "See the log of the one that stopped first; the same command on all hosts goes on from the checkpoint.",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            os._exit(1)  # an orderly end would wait for the process that is gone


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "such as configs/dog.py or configs/dog.py:sd15")
    app.run(main)
