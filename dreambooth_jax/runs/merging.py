"""Adapter files of any tool merged into a base: a whole model, as a folder or a single file."""

from collections.abc import Sequence
from pathlib import Path

from jax.typing import DTypeLike
from safetensors import safe_open

from dreambooth_jax.families.pipeline import Pipeline, load_pipeline, read_params, save_pipeline
from dreambooth_jax.files import single_file
from dreambooth_jax.files.layouts import SUFFIX, split_weight
from dreambooth_jax.files.lora_read import read_adapters, with_adapters
from dreambooth_jax.models.params import Tensors
from dreambooth_jax.runs.exports import check_reopened


def merge_files(
    base: str, files: Sequence[str], output: Path, *, kind: str | None, dtype: DTypeLike, variant: str = ""
) -> str:
    """Writes a base with adapters merged into it and reads it again; returns what to print.

    Args:
        base: see `load_pipeline`.
        files: "FILE" or "FILE:WEIGHT" each.
        output: folder, or path of a .safetensors file.
        kind: "folder" or "single"; None for what `output` is.
        dtype: stored precision: float32, float16 or bfloat16.
        variant: of a folder's weight files, see `save_pipeline`.

    Raises:
        ValueError: a file has no place in the base, the base is not of the kind, or what was written is not what was
            merged.
    """
    if not files:
        raise ValueError(f"--base {base}: nothing is merged into it; give --lora FILE:WEIGHT")
    is_file = output.suffix == SUFFIX
    kind = kind or ("single" if is_file else "folder")
    if kind not in ("folder", "single") or is_file != (kind == "single") or (variant and is_file):
        raise ValueError(
            f"--output {output}, --format {kind}, --variant {variant!r}: a merged model is a folder, or with --format "
            "single a .safetensors file, which has no variants"
        )
    pipeline = load_pipeline(base)
    if is_file:
        _layout(pipeline)  # an error now, not after the weights are read
    adapters = read_adapters(files, pipeline.shapes)
    params = with_adapters(read_params(pipeline), adapters)
    if is_file:
        _write_single(output, pipeline, params, files, dtype)
        found = single_file.read_single_file(output, pipeline.shapes, _layout(pipeline))
    else:
        save_pipeline(pipeline, params, output, dtype=dtype, variant=variant)
        found = read_params(load_pipeline(str(output)))
    moved = check_reopened(found, params, dtype, output)
    changed = sum(len(factors) for factors, _ in adapters)
    return (
        f"{output}: {base} with {', '.join(files)}\nopened again: {len(found)} tensors, none left over; {changed} "
        f"tensors of the adapters are merged; weights differ by at most {moved:.2g}"
    )


def _layout(pipeline: Pipeline) -> str:
    return single_file.layout_of(pipeline.shapes, pipeline.models.configs)


def _write_single(path: Path, pipeline: Pipeline, params: Tensors, files: Sequence[str], dtype: DTypeLike) -> None:
    layout, paths = _layout(pipeline), [Path(split_weight(entry)[0]) for entry in files]
    predicts_v = single_file.predicts_v(pipeline.models.configs)
    about = single_file.describe(
        layout,
        v_prediction=predicts_v,
        resolution=pipeline.resolution,
        title=path.stem,
        trigger=", ".join(filter(None, map(_trigger, paths))),
    )
    single_file.write_single_file(path, params, layout, dtype=dtype, metadata=about)
    single_file.write_yaml(path, layout, v_prediction=predicts_v)


def _trigger(path: Path) -> str:
    """The words that call an adapter's subject, where its file says so."""
    with safe_open(path, "numpy") as file:
        return (file.metadata() or {}).get("modelspec.trigger_phrase", "")
