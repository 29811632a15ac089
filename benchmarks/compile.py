"""How long the two programs of `configs/dog.py` take to compile here: cold, and from the persistent cache.

    python benchmarks/compile.py

Tracing and lowering are counted too: a person waits for them as well.
"""

import runpy
import tempfile
import time
from pathlib import Path

import jax

from dreambooth_jax import runtime
from dreambooth_jax.pipeline import load_pipeline
from dreambooth_jax.program import argument_shapes, lower_painting, lower_steps, make_job
from dreambooth_jax.sharding import make_mesh

ROOT = Path(__file__).parent.parent


def main() -> None:
    runtime.start()
    config = runpy.run_path(str(ROOT / "configs" / "dog.py"))["get_config"]()
    job = make_job(config, load_pipeline(config.base), make_mesh())
    arguments = argument_shapes(job, num_instance=5)
    programs = {
        "training steps": lambda: lower_steps(job, *arguments),
        "class images": lambda: lower_painting(job),
    }
    print("| program | cold s | from the cache s |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        for name, lower in programs.items():
            times = []
            for _ in range(2):
                jax.clear_caches()
                started = time.perf_counter()
                lower().compile()
                times.append(time.perf_counter() - started)
            print(f"| {name} | {times[0]:.1f} | {times[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
