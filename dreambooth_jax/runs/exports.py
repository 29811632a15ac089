"""A trained run as a file that other tools open. Every export proves itself: the file is opened again by this library's
reader, compared tensor by tensor, and painted with.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from dreambooth_jax.adapters.extract import differences, low_rank
from dreambooth_jax.adapters.factors import add, merge
from dreambooth_jax.adapters.inversion import is_row, rows_of, with_rows
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.families.family import NOISE_LEVEL
from dreambooth_jax.families.pipeline import Pipeline, load_pipeline, read_params, save_pipeline
from dreambooth_jax.files import embeddings, lora_kohya, lora_peft, single_file
from dreambooth_jax.files.diffusers_folder import folder_files
from dreambooth_jax.files.hub import EMBEDDED
from dreambooth_jax.files.lora_read import read_adapter
from dreambooth_jax.models.params import Params, Tensors
from dreambooth_jax.painting.sheets import paint_rows
from dreambooth_jax.runs.cascade import enlarging
from dreambooth_jax.runs.config import fill
from dreambooth_jax.runs.export_checks import default_formats, file_of, title_of, token_file
from dreambooth_jax.runs.job import painter_of
from dreambooth_jax.runs.workdir import Trained, open_trained

# Error of the change that an adapter makes: products of its factors are computed in another order, or in bfloat16.
_ERROR_OF_CHANGE = 2**-6


class Subject(NamedTuple):
    """A trained model to export.

    Attributes:
        base: parameters of the base model.
        tuned: the personalised model's parameters, plain and without new tokens.
        rows: text part -> rows of its new tokens; empty for most methods.
    """

    run: Trained
    base: Params
    tuned: Params
    rows: Tensors

    @property
    def trigger(self) -> str:
        return f"{self.run.config.identifier} {self.run.config.class_noun}"

    @property
    def title(self) -> str:
        return title_of(self.run.config)


class Written(NamedTuple):
    """An export.

    Attributes:
        reopen: () -> plain parameters of the model, read from what was written.
        tools: programs that open it, and how.
        says: further remarks on the file.
        files: what was written; default: `path` alone.
        holds: "model" for all weights, "change" for what training changed, "part" for what approximates it or leaves
            some of it out.
    """

    path: Path
    reopen: Callable[[], Tensors]
    tools: str
    says: str = ""
    files: tuple[Path, ...] = ()
    holds: str = "model"


def to_folder(subject: Subject, path: Path, dtype: DTypeLike, rank: int, *, variant: str = "") -> Written:
    """A whole diffusers folder; `variant` is of `save_pipeline`."""
    pipeline = subject.run.pipeline
    if low := pipeline.low_resolution:
        pipeline = pipeline.with_index(**{NOISE_LEVEL: low.sampling_level(subject.run.config.sr_noise)})
    save_pipeline(pipeline, subject.tuned, path, dtype=dtype, variant=variant)
    named = f', variant="{variant}"' * bool(variant)
    opened = f'{pipeline.family.name}.from_pretrained("{path}"{named})'
    tools = f"{opened} in diffusers; --base {path} here"
    return Written(path, lambda: read_params(load_pipeline(str(path))), tools, files=tuple(folder_files(path)))


def to_single_file(subject: Subject, path: Path, dtype: DTypeLike, rank: int) -> Written:
    """A whole model in one LDM file, and for v-prediction of SD 2.x a .yaml beside it."""
    pipeline = subject.run.pipeline
    layout = layout_of_run(subject.run)
    v_prediction = single_file.predicts_v(pipeline.models.configs)
    metadata = single_file.describe(
        layout,
        v_prediction=v_prediction,
        resolution=subject.run.config.resolution,
        title=subject.title,
        trigger=subject.trigger,
    )
    path = file_of(path, "single", subject.title)
    single_file.write_single_file(path, subject.tuned, layout, dtype=dtype, metadata=metadata)
    beside = single_file.write_yaml(path, layout, v_prediction=v_prediction)
    reopen = lambda: single_file.read_single_file(path, pipeline.shapes, layout)  # noqa: E731
    tools = _for_all_tools(subject, "a checkpoint", f"from_single_file({str(path)!r})")
    return Written(path, reopen, tools, files=(path, *beside))


def to_kohya(subject: Subject, path: Path, dtype: DTypeLike, rank: int) -> Written:
    """The adapter alone with kohya's names: for all tools. Of a full fine-tuning the LoRA of `rank`, or with rank 0 all
    differences."""
    pipeline = subject.run.pipeline
    factors, says = _factors(subject, rank)
    about = about_adapter(pipeline, subject.run.config, subject.title)
    path = file_of(path, "kohya", subject.title)
    lora_kohya.write_kohya(path, factors, about, dtype=dtype)
    how = f"load_lora_weights({str(path)!r})"
    tools, holds = _for_all_tools(subject, "a LoRA", how), "part" if rank else "change"
    return Written(path, _reopened(subject, path), tools, says, holds=holds)


def about_adapter(pipeline: Pipeline, config: ConfigDict, title: str) -> lora_kohya.About:
    """Metadata of a kohya file about its run."""
    layout = single_file.layout_of(pipeline.shapes, pipeline.models.configs)
    return lora_kohya.About(
        layout,
        single_file.predicts_v(pipeline.models.configs),
        title,
        f"{config.identifier} {config.class_noun}",
        str(config.base),
        {
            "learning_rate": config.learning_rate,
            "max_train_steps": config.steps,
            "seed": config.seed,
            "batch_size_per_device": config.batch_size,
            "optimizer": config.optimizer,
            "lr_scheduler": config.lr_schedule,
            "resolution": config.resolution,
            "prior_loss_weight": config.prior_weight,
            "mixed_precision": config.dtype,
        },
    )


def to_peft(subject: Subject, path: Path, dtype: DTypeLike, rank: int) -> Written:
    """The adapter alone with PEFT's names: for diffusers."""
    factors, says = _factors(subject, rank)
    path = file_of(path, "peft", subject.title)
    lora_peft.write_peft(path, factors, dtype=dtype)
    tools, holds = f"load_lora_weights({str(path)!r}) in diffusers", "part" if rank else "change"
    return Written(path, _reopened(subject, path), tools, says, holds=holds)


def to_embedding(subject: Subject, path: Path, dtype: DTypeLike, rank: int) -> Written:
    """The rows of the new tokens alone: for all tools."""
    path = file_of(path, "embedding", subject.title)
    word, layout = subject.run.config.identifier, layout_of_run(subject.run)
    about = single_file.model_spec(
        layout,
        v_prediction=single_file.predicts_v(subject.run.pipeline.models.configs),
        title=subject.title,
        trigger=word,
        kind="/textual-inversion",
    )
    embeddings.write_embeddings(path, list(subject.rows.values()), dtype=dtype, metadata={"format": "pt"} | about)
    how = f"load_textual_inversion({str(path)!r}, token={word!r})"
    says = f"in A1111 and ComfyUI the file's name, {path.stem}, is the word"
    tools = _for_all_tools(subject, "an embedding", how)
    return Written(path, lambda: dict(subject.base), tools, says, holds="part")


FORMATS = {"folder": to_folder, "single": to_single_file, "kohya": to_kohya, "peft": to_peft, "embedding": to_embedding}


def _factors(subject: Subject, rank: int) -> tuple[Tensors, str]:
    method = subject.run.method
    if method.adapter is not None:
        return {name: x for name, x in method.adapter(subject.run.trainable).items() if not is_row(name)}, ""
    changes = differences(subject.base, subject.tuned)
    if not rank:
        return changes, "all differences of a full fine-tuning; --rank makes a smaller LoRA of them"
    approximation, error = low_rank(changes, rank)
    return (
        approximation,
        f"a LoRA of rank {rank} of the full fine-tuning: {error:.1%} of the change is lost (Frobenius norm)",
    )


def _reopened(subject: Subject, path: Path) -> Callable[[], Tensors]:
    return lambda: add(dict(subject.base), read_adapter(path, subject.run.pipeline.shapes)[0])


def layout_of_run(run: Trained) -> str:
    """Kind of single file that the run's base has; errors are `single_file.layout_of`'s."""
    return single_file.layout_of(run.pipeline.shapes, run.pipeline.models.configs)


def has_layout(run: Trained) -> bool:
    """Whether the run's base has a single file, and other tools names for its adapters."""
    try:
        return bool(layout_of_run(run))
    except ValueError:
        return False


def _for_all_tools(subject: Subject, kind: str, opened: str) -> str:
    if subject.run.config.base in EMBEDDED:
        return f"this library and diffusers ({opened}) alone: no other tool has the embedded base"
    return f"{kind} for ComfyUI, A1111, Forge, InvokeAI, kohya's scripts and diffusers ({opened})"


def open_subject(run: Trained, mesh: Mesh) -> Subject:
    """Reads the base of a run."""
    base = read_params(run.pipeline, mesh)
    tuned = merge(run.method.combine(base, run.trainable))
    tuned = {name: x if x.shape == base[name].shape else x[: len(base[name])] for name, x in tuned.items()}
    return Subject(run, base, tuned, rows_of(run.trainable))


def default_format(run: Trained, path: Path, rank: int) -> str:
    """That of `default_formats` which the base has."""
    first, *others = default_formats(run.config, path, rank)
    return others[0] if others and not has_layout(run) else first


def export(
    workdir: str | os.PathLike,
    output: str | os.PathLike,
    *,
    step: int | str | None,
    kind: str | None,
    dtype: DTypeLike,
    rank: int,
    variant: str = "",
    hub: str = "",
) -> str:
    """Writes a run and proves the file; returns what to print.

    Args:
        step: see `open_trained`.
        output: folder, or path of a .safetensors file.
        kind: key of `FORMATS`, None for `default_format`.
        dtype: stored precision: float32, float16 or bfloat16.
        rank: of the LoRA that is made of a full fine-tuning; 0 keeps all differences.
        variant: of a folder's weight files, see `save_pipeline`.
        hub: OWNER/NAME of a repository to upload to; empty: none.

    Raises:
        FileNotFoundError, ValueError: no run, the format cannot hold it, or the file does not hold its numbers.
    """
    path, mesh = Path(output), make_mesh()
    run = open_trained(workdir, mesh, step)
    kind = kind or default_format(run, path, rank)
    if kind in ("single", "kohya"):
        layout_of_run(run)  # an error now, not after the weights are read
    subject = open_subject(run, mesh)
    write = functools.partial(to_folder, variant=variant) if variant else FORMATS[kind]
    written = write(subject, path, dtype, rank)
    token = None
    if subject.rows and kind != "embedding":  # beside it, in a file of its own
        token = to_embedding(subject, token_file(written.path), dtype, 0)
    parts = [part for part in (written, token) if part]
    about = [line for part in parts for line in (f"{part.path}: {part.tools}", part.says)]
    lines = [*about, prove(subject, written, (token or written).path if subject.rows else None, dtype)]
    if hub:
        from dreambooth_jax.runs.publish import publish

        lines.append(f"uploaded to {publish(hub, subject, parts, Path(workdir))}")
    return "\n".join(line for line in lines if line)


def prove(subject: Subject, written: Written, token: Path | None, dtype: DTypeLike) -> str:
    """Opens the export again and compares it with the run: tensors, and pictures of the first prompt.

    Args:
        token: file of the new tokens' rows, if there are any.
        dtype: stored precision.

    Raises:
        ValueError: from the reader, if a tensor of the file has no place or is missing; or its numbers are others.
    """
    found = written.reopen()
    rows = {}
    if token:
        widths = [value.shape[1] for value in subject.rows.values()]
        rows = dict(zip(subject.rows, embeddings.read_embeddings(token, widths), strict=True))
    base = subject.base if written.holds == "change" else None
    errors = check_reopened(found, subject.tuned, None if written.holds == "part" else dtype, written.path, base)
    moved = max([errors, *([check_reopened(rows, subject.rows, dtype, token)] if token else [])])
    config, mesh = subject.run.config, make_mesh()
    prompt = fill(next(iter(config.sample_prompts), config.instance_prompt), config)
    painter = painter_of(config, subject.run.pipeline, mesh, batch_size=2)
    if low := subject.run.pipeline.low_resolution:  # grey pictures to enlarge
        grey = np.full((config.resolution // low.factor,) * 2 + (3,), 128, np.uint8)
        painter = enlarging(painter, lambda requests: [grey] * len(requests), 2)
    ours, theirs = (
        np.stack(paint_rows(painter, params, [prompt], range(2))[0]).astype(np.int32)
        for params in (
            with_rows(subject.tuned, subject.rows),
            with_rows({name: _like(found[name], value) for name, value in subject.tuned.items()}, rows),
        )
    )
    difference = np.abs(ours - theirs)
    return (
        f"opened again: {len(found)} tensors, none left over, weights differ by at most {moved:.2g}; pictures of "
        f"{prompt!r} differ by {difference.mean():.2g} of 255 grey levels on average, {difference.max()} at most"
    )


def check_reopened(
    found: Tensors, expected: Tensors, dtype: DTypeLike | None, path: Path, base: Tensors | None = None
) -> float:
    """Compares the tensors of a written file with those that it should hold; returns the largest difference.

    Args:
        dtype: stored precision, whose rounding is allowed; None: any finite difference is.
        base: parameters of the base, if the file holds the change to them.

    Raises:
        ValueError: a tensor is not finite, or differs by more.
    """
    largest = 0.0
    for name, value in expected.items():
        value = np.asarray(value, np.float32)
        error = np.abs(np.asarray(found[name], np.float32) - value)
        allowed = np.inf
        if dtype is not None:
            steps = jnp.finfo(dtype)
            allowed = float(steps.eps) * np.linalg.norm(value) + float(steps.smallest_subnormal) * value.size**0.5
        if base is not None:  # factors are rounded, and their product
            allowed = 4 * allowed + _ERROR_OF_CHANGE * np.linalg.norm(value - np.asarray(base[name], np.float32))
        if not np.isfinite(error).all() or np.linalg.norm(error) > allowed:
            raise ValueError(
                f"{path}: opened again, {name} differs by up to {error.max(initial=0.0):.2g} from what was trained: do "
                "not use this export. Export to another place, in float32."
            )
        largest = max(largest, float(error.max(initial=0.0)))
    return largest


def _like(found: jax.Array | np.ndarray, value: jax.Array) -> jax.Array:
    return jax.device_put(np.asarray(found, value.dtype), value.sharding)
