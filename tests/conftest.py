"""One environment for all tests: CPU only, eight devices, compiled programs kept between runs; shared models."""

import os
from pathlib import Path

# Before jax is imported, and inherited by the programs that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".pytest_cache" / "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import jaxtyping
import support.typecheck  # noqa: F401  named in the hook

# Annotations are checked at every call, in every module of the package: none is imported before.
jaxtyping.install_import_hook(["dreambooth_jax"], "support.typecheck.checked")

from support.flags import xla_flags  # noqa: E402

from dreambooth_jax.devices import workarounds  # noqa: E402

_FLAGS = f"{xla_flags(8)} {os.environ.get('XLA_FLAGS', '')}"
os.environ["XLA_FLAGS"] = workarounds.with_cpu_flags(_FLAGS)  # as `runtime.start` does

import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402


class Base:
    """A tiny Stable Diffusion written by PyTorch diffusers.

    Attributes:
        folder: where it is.
        torch: the PyTorch pipeline that wrote it.
        pipeline, params: what this library reads there.
    """

    def __init__(self, folder, **parts):
        from support.torch_folders import write_folder

        from dreambooth_jax.families.pipeline import load_pipeline, read_params

        self.folder = folder
        self.torch = write_folder(folder, **parts)
        self.pipeline = load_pipeline(str(folder))
        self.params = read_params(self.pipeline)


@pytest.fixture(scope="session")
def sd15(tmp_path_factory):
    """Like Stable Diffusion 1.x: convolutional projections, quick_gelu, predicts the noise."""
    yield from unchanged_base(Base(tmp_path_factory.mktemp("sd15")))


@pytest.fixture(scope="session")
def sd21(tmp_path_factory):
    """Like Stable Diffusion 2.x: linear projections, heads per block, gelu, predicts the velocity."""
    from diffusers import DDIMScheduler
    from support.torch_folders import SCHEDULE, TEXT_21, UNET_21

    scheduler = DDIMScheduler(clip_sample=False, prediction_type="v_prediction", **SCHEDULE)
    yield from unchanged_base(Base(tmp_path_factory.mktemp("sd21"), unet=UNET_21, text=TEXT_21, scheduler=scheduler))


def unchanged_base(base: Base):
    from support.torch_folders import unchanged

    with unchanged(base.torch):
        yield base


def made_once(tmp_path_factory, name: str, make) -> Path:
    """The folder of that name: the first of pytest-xdist's workers makes it with `make(folder)`, and all use it."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    mark = folder.with_name(f"{name}.made")
    with FileLock(f"{folder}.lock"):
        if not mark.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            mark.touch()
    return folder


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    """A base whose training steps take milliseconds."""
    from support.runs import write_micro

    return str(made_once(tmp_path_factory, "micro", write_micro))


@pytest.fixture(scope="session")
def finished(micro, tmp_path_factory):
    """The workdir of an uninterrupted run of `runs.SMALL`; not to be changed."""
    from support.runs import finish

    return made_once(tmp_path_factory, "finished", lambda folder: finish(folder / "run", base=micro)) / "run"
