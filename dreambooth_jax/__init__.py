"""DreamBooth (arXiv 2208.12242) on JAX and Flax: fine-tune a text-to-image model on a few photos of one subject.

Commands: python -m dreambooth_jax.{train,sample,export,evaluate,plan,identifier,pretrain}.

The names below are the library's public interface; where they are defined may change. They are imported when they are
first used, so that `import dreambooth_jax` costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    # the mathematics: arrays and functions
    "Batch": "diffusion.loss",
    "dreambooth_loss": "diffusion.loss",
    "EncodedExamples": "diffusion.examples",
    "TrainingData": "diffusion.examples",
    "TrainState": "diffusion.step",
    "Process": "diffusion.process",
    "flow_process": "diffusion.process",
    "process_from_scheduler": "diffusion.schedulers",
    "init_state": "diffusion.step",
    "make_step": "diffusion.step",
    "run_steps": "diffusion.step",
    "make_sampler": "diffusion.sampler",
    "noise_for_seeds": "diffusion.sampler",
    # models on disk
    "load_pipeline": "families.pipeline",
    "read_params": "families.pipeline",
    "save_pipeline": "families.pipeline",
    # a run that was trained
    "open_run": "runs.workdir",
    # JAX on this machine
    "make_mesh": "devices.sharding",
    "start": "devices.runtime",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
