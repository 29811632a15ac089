"""A trained run as a file that other tools open. Every export proves itself: the file is opened again by this library's
reader, compared tensor by tensor, and painted with.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from dreambooth_jax.adapters.extract import differences, low_rank
from dreambooth_jax.adapters.factors import FORMS, add, merge
from dreambooth_jax.adapters.inversion import is_row, rows_of, with_rows
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.families.family import NOISE_LEVEL
from dreambooth_jax.families.pipeline import Pipeline, load_pipeline, read_params, save_pipeline
from dreambooth_jax.files import embeddings, lora_kohya, lora_peft, single_file
from dreambooth_jax.files.hub import EMBEDDED
from dreambooth_jax.files.lora_read import read_adapter
from dreambooth_jax.models.params import Params, Tensors
from dreambooth_jax.painting.sheets import paint_rows
from dreambooth_jax.runs.cascade import enlarging
from dreambooth_jax.runs.config import fill
from dreambooth_jax.runs.job import painter_of
from dreambooth_jax.runs.workdir import Trained, open_trained

SUFFIX = ".safetensors"


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
        return self.trigger.replace(" ", "_").strip("<>")


class Written(NamedTuple):
    """An export.

    Attributes:
        reopen: () -> plain parameters of the model, read from what was written.
        tools: programs that open it, and how.
        says: further remarks on the file.
    """

    path: Path
    reopen: Callable[[], Tensors]
    tools: str
    says: str = ""


def to_folder(subject: Subject, path: Path, dtype: DTypeLike, rank: int, *, variant: str = "") -> Written:
    """A whole diffusers folder; `variant` is of `save_pipeline`."""
    pipeline = subject.run.pipeline
    if low := pipeline.low_resolution:
        pipeline = pipeline.with_index(**{NOISE_LEVEL: low.sampling_level(subject.run.config.sr_noise)})
    save_pipeline(pipeline, subject.tuned, path, dtype=dtype, variant=variant)
    named = f', variant="{variant}"' * bool(variant)
    opened = f'{pipeline.family.name}.from_pretrained("{path}"{named})'
    return Written(path, lambda: read_params(load_pipeline(str(path))), f"{opened} in diffusers; --base {path} here")


def to_single_file(subject: Subject, path: Path, dtype: DTypeLike, rank: int) -> Written:
    """A whole model in one LDM file, and for v-prediction of SD 2.x a .yaml beside it."""
    pipeline = subject.run.pipeline
    layout = layout_of_subject(subject)
    v_prediction = single_file.predicts_v(pipeline.models.configs)
    metadata = single_file.describe(
        layout,
        v_prediction=v_prediction,
        resolution=subject.run.config.resolution,
        title=subject.title,
        trigger=subject.trigger,
    )
    path = path if path.suffix == SUFFIX else path / f"{subject.title}{SUFFIX}"
    single_file.write_single_file(path, subject.tuned, layout, dtype=dtype, metadata=metadata)
    single_file.write_yaml(path, layout, v_prediction=v_prediction)
    reopen = lambda: single_file.read_single_file(path, pipeline.shapes, layout)  # noqa: E731
    return Written(path, reopen, _for_all_tools(subject, "a checkpoint", f"from_single_file({str(path)!r})"))


def to_kohya(subject: Subject, path: Path, dtype: DTypeLike, rank: int) -> Written:
    """The adapter alone with kohya's names: for all tools. Of a full fine-tuning the LoRA of `rank`, or with rank 0 all
    differences."""
    pipeline = subject.run.pipeline
    factors, says = _factors(subject, rank)
    about = about_adapter(pipeline, subject.run.config, subject.title)
    path = path if path.suffix == SUFFIX else path / f"{subject.title}{SUFFIX}"
    lora_kohya.write_kohya(path, factors, about, dtype=dtype)
    how = f"load_lora_weights({str(path)!r})"
    return Written(path, _reopened(subject, path), _for_all_tools(subject, "a LoRA", how), says)


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
    path = path if path.suffix == SUFFIX else path / lora_peft.FILE
    lora_peft.write_peft(path, factors, dtype=dtype)
    return Written(path, _reopened(subject, path), f"load_lora_weights({str(path)!r}) in diffusers", says)


def to_embedding(subject: Subject, path: Path, dtype: DTypeLike, rank: int) -> Written:
    """The rows of the new tokens alone: for all tools."""
    if not subject.rows:
        raise ValueError(f"method = {subject.run.config.method!r} trains no token: leave out --format embedding")
    path = path if path.suffix == SUFFIX else path / f"{subject.title}{SUFFIX}"
    word, layout = subject.run.config.identifier, layout_of_subject(subject)
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
    return Written(path, lambda: dict(subject.base), _for_all_tools(subject, "an embedding", how), says)


FORMATS = {"folder": to_folder, "single": to_single_file, "kohya": to_kohya, "peft": to_peft, "embedding": to_embedding}


def _factors(subject: Subject, rank: int) -> tuple[Tensors, str]:
    method = subject.run.method
    if method.adapter is not None:
        factors = {name: x for name, x in method.adapter(subject.run.trainable).items() if not is_row(name)}
        if not factors:
            raise ValueError("this run trained a token alone: write it with --format embedding")
        return factors, ""
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


def layout_of_subject(subject: Subject) -> str:
    """Kind of single file that the run's base has; errors are `single_file.layout_of`'s."""
    return single_file.layout_of(subject.run.pipeline.shapes, subject.run.pipeline.models.configs)


def has_layout(subject: Subject) -> bool:
    """Whether the run's base has a single file, and other tools names for its adapters."""
    try:
        return bool(layout_of_subject(subject))
    except ValueError:
        return False


def _for_all_tools(subject: Subject, kind: str, opened: str) -> str:
    if subject.run.config.base == EMBEDDED:
        return f"this library and diffusers ({opened}) alone: no other tool has the embedded base"
    return f"{kind} for ComfyUI, A1111, Forge, InvokeAI, kohya's scripts and diffusers ({opened})"


def open_subject(workdir: str | os.PathLike, step: int | str | None) -> Subject:
    """Reads the run and its base."""
    mesh = make_mesh()
    run = open_trained(workdir, mesh, step)
    base = read_params(run.pipeline, mesh)
    tuned = merge(run.method.combine(base, run.trainable))
    tuned = {name: x if x.shape == base[name].shape else x[: len(base[name])] for name, x in tuned.items()}
    return Subject(run, base, tuned, rows_of(run.trainable))


def default_format(subject: Subject, path: Path) -> str:
    """kohya for adapters, or peft where the model has no name in kohya's files; for whole models a single file if
    `path` names one, else a folder."""
    method = subject.run.config.method
    if method == "inversion":
        return "embedding"
    if method in (*FORMS, "pivotal", "custom"):
        return "kohya" if has_layout(subject) else "peft"
    return "single" if path.suffix == SUFFIX else "folder"


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
        FileNotFoundError, ValueError: no run, or the format cannot hold it.
    """
    subject, path = open_subject(workdir, step), Path(output)
    kind = kind or ("kohya" if rank else default_format(subject, path))
    if rank and (subject.run.method.adapter is not None or kind not in ("kohya", "peft")):
        raise ValueError("--rank makes a LoRA of a full fine-tuning, in the formats kohya and peft")
    if kind == "folder" and path.suffix == SUFFIX:
        raise ValueError(f"--output {path}: the format folder needs a folder")
    if variant and kind != "folder":
        raise ValueError(f"--variant {variant} names the files of a folder, not those of --format {kind}")
    write = functools.partial(to_folder, variant=variant) if variant else FORMATS[kind]
    written = write(subject, path, dtype, rank)
    token = None
    if subject.rows and kind != "embedding":  # beside it, in a file of its own
        token = to_embedding(subject, written.path.with_name(f"{written.path.stem}_token{SUFFIX}"), dtype, 0)
    parts = [part for part in (written, token) if part]
    about = [line for part in parts for line in (f"{part.path}: {part.tools}", part.says)]
    lines = [*about, prove(subject, written, (token or written).path if subject.rows else None)]
    if hub:
        from dreambooth_jax.runs.publish import publish

        lines.append(f"uploaded to {publish(hub, subject, parts, Path(workdir))}")
    return "\n".join(line for line in lines if line)


def prove(subject: Subject, written: Written, token: Path | None) -> str:
    """Opens the export again and compares it with the run: tensors, and pictures of the first prompt.

    Args:
        token: file of the new tokens' rows, if there are any.

    Raises:
        ValueError: from the reader, if a tensor of the file has no place or is missing.
    """
    found = written.reopen()
    rows = {}
    if token:
        widths = [value.shape[1] for value in subject.rows.values()]
        rows = dict(zip(subject.rows, embeddings.read_embeddings(token, widths), strict=True))
    pairs = [(found[name], value) for name, value in subject.tuned.items()]
    pairs += [(rows[part], value) for part, value in subject.rows.items()]
    moved = max(largest_difference(one, other) for one, other in pairs)
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


def largest_difference(found: jax.Array | np.ndarray, value: jax.Array | np.ndarray) -> float:
    """The largest absolute difference of two tensors, in float32; 0.0 for empty ones."""
    return float(np.abs(np.asarray(found, np.float32) - np.asarray(value, np.float32)).max(initial=0.0))


def _like(found: jax.Array | np.ndarray, value: jax.Array) -> jax.Array:
    return jax.device_put(np.asarray(found, value.dtype), value.sharding)
