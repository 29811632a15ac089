"""An export on a model hub: the files, the newest sheet of samples and a model card."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from dreambooth_jax.files.hub import EMBEDDED
from dreambooth_jax.files.single_file import SD1
from dreambooth_jax.runs.config import fill
from dreambooth_jax.runs.exports import Subject, Written, has_layout, layout_of_run

SHEET = "samples.png"


def model_card(subject: Subject, written: Sequence[Written], sheet: bool) -> str:
    """A README.md that says what the files are and how each tool opens them.

    Args:
        sheet: whether `SHEET` is beside it.
    """
    config, adapter = subject.run.config, subject.run.method.adapter is not None
    tags = ["text-to-image", "dreambooth", "jax", *(["lora"] if adapter else [])]
    base, on_hub = _base_of(config.base)
    front = [
        "---",
        *([f"base_model: {base}"] if on_hub else []),
        f"license: {_licence(subject)}",
        f"instance_prompt: {json.dumps(subject.trigger)}",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]
    files = [f"- `{part.path.name}`: {part.tools}{'; ' + part.says if part.says else ''}" for part in written]
    prompts = [f"- {fill(prompt, config)}" for prompt in config.sample_prompts]
    return "\n".join(
        [
            *front,
            f"# {subject.trigger}",
            "",
            f"{subject.run.method.says} on {base}, {config.steps} steps. Write **{subject.trigger}** in the prompt.",
            "The licence of the base holds for what was made of it.",
            "",
            *([f"![samples]({SHEET})", ""] if sheet else []),
            "## Files",
            "",
            *files,
            "",
            "ComfyUI: put an adapter into `models/loras`, a checkpoint into `models/checkpoints`, an embedding into "
            "`models/embeddings`. A1111 and Forge: `models/Lora`, `models/Stable-diffusion`, `embeddings`; an adapter "
            "is called by `<lora:NAME:1>` in the prompt.",
            "",
            "## Prompts of the samples",
            "",
            *prompts,
            "",
        ]
    )


def _base_of(base: str) -> tuple[str, bool]:
    """(name of a base for strangers, whether a hub has it under this name): of a place on this machine the last part
    alone."""
    place = base.partition("@")[0]
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not Path(base).exists()
    return (base if on_hub else Path(place).name), on_hub


def _licence(subject: Subject) -> str:
    """Licence of the published weights of the base's kind."""
    if subject.run.config.base in EMBEDDED:
        return "apache-2.0"
    if not has_layout(subject.run):  # a cascade's
        return "other"
    return "creativeml-openrail-m" if layout_of_run(subject.run) == SD1 else "openrail++"


def publish(name: str, subject: Subject, written: Sequence[Written], workdir: Path, api: HfApi | None = None) -> str:
    """Uploads exports in one commit; returns the address of the repository, which is made if absent.

    Args:
        name: OWNER/NAME.
        written: the exports; of a folder, their own files alone.
        workdir: of the run, for its newest sheet.
        api: client of the hub; default: the one that the environment configures (HF_ENDPOINT, HF_TOKEN).

    Raises:
        OSError: the hub refuses, or is not reached; names the repository and where the export lies.
    """
    api = api or HfApi()
    sheets = sorted((workdir / "samples").glob("step_*.png"))
    card = model_card(subject, written, bool(sheets)).encode()
    files = {"README.md": card} | ({SHEET: str(sheets[-1])} if sheets else {})
    for part in written:
        folder = part.path if part.path.is_dir() else part.path.parent
        files |= {path.relative_to(folder).as_posix(): str(path) for path in part.files or (part.path,)}
    try:
        url = api.create_repo(name, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=data) for path, data in files.items()]
        api.create_commit(name, operations, commit_message=f"{subject.trigger}, trained with dreambooth_jax")
    except Exception as error:  # offline, unknown or forbidden: the hub client has a type for each
        places = ", ".join(str(part.path) for part in written)
        raise OSError(
            f"{name}: the model hub did not take the export ({error}). The export is complete, at {places}. Check the "
            "name, the network and `hf auth login`, and upload it with the same command."
        ) from error
    return str(url)
