"""How long the two programs of `configs/dog.py` take to compile here: cold, and from the persistent cache.

    python benchmarks/compile.py

Tracing and lowering are counted too: a person waits for them as well. Every time is a new process's, three from the
cache.
"""

import multiprocessing
import os
import runpy
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.families.pipeline import load_pipeline
from dreambooth_jax.runs.job import argument_shapes, lower_painting, lower_steps, make_job

ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "training steps": lambda job, arguments: lower_steps(job, *arguments),
    "class images": lambda job, _: lower_painting(job),
}


def seconds_to_compile(program: str) -> float:
    runtime.start()
    config = runpy.run_path(str(ROOT / "configs" / "dog.py"))["get_config"]()
    job = make_job(config, load_pipeline(config.base), make_mesh())
    arguments = argument_shapes(job, num_instance=5)  # of what a run has: no part of compiling
    started = time.perf_counter()
    PROGRAMS[program](job, arguments).compile()
    return time.perf_counter() - started


def main() -> None:
    print("| program | cold s | from the cache s |\n|---|---|---|")
    new_process = multiprocessing.get_context("spawn")
    for program in PROGRAMS:
        with tempfile.TemporaryDirectory() as cache:
            os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
            with ProcessPoolExecutor(1, mp_context=new_process, max_tasks_per_child=1) as pool:
                cold, *cached = pool.map(seconds_to_compile, [program] * 4)
        times = ", ".join(f"{seconds:.1f}" for seconds in cached)
        print(f"| {program} | {cold:.1f} | {statistics.median(cached):.1f} ({times}) |", flush=True)


if __name__ == "__main__":
    main()
