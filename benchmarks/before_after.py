"""Speed and memory of the main job, before and after: an earlier commit and this tree, side by side.

    git worktree add ../before c134e27
    python benchmarks/before_after.py ../before                        # ten minutes on two idle cores
    python benchmarks/before_after.py ../before --rounds 1 --steps 10

Both run with the same Python environment, embedded base, photos and fields (those of the earlier configs/dog.py). A
round starts, for each tree, one process of the shortened main job (8 class images, some steps) and one of
`train --help`; every third round also compiles without the cache and times the other commands' --help (--every 1: all
rounds, a quarter of an hour). The order of the trees changes every round.
Ratios are those of the two trees within a round: median, smallest and largest.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
COMMANDS = ("train", "sample", "export", "plan", "identifier", "pretrain")


class Enough(Exception):
    """Ends the loop, which would otherwise run to the last step, save and paint."""


class Training(NamedTuple):
    """A run that is ready for its first step.

    Attributes:
        state, arguments: of the compiled steps, (state, *arguments, count) -> (state, metrics).
        lower: () -> the lowered steps.
        loop: (state, advance) -> runs the tree's training loop on `advance`.
    """

    state: Any
    arguments: tuple
    lower: Callable[[], Any]
    loop: Callable[[Any, Callable], None]


def prepared_before(config, folder: Path) -> Training:
    """By the modules of c134e27."""
    import functools

    import jax
    from dreambooth_jax.checkpoint import open_checkpoints
    from dreambooth_jax.pipeline import read_params
    from dreambooth_jax.preemption import Preemption
    from dreambooth_jax.program import lower_steps
    from dreambooth_jax.sharding import param_sharding, replicated

    from dreambooth_jax.train import loop, prepare_data, set_up, start_state

    run = set_up(config)
    params = read_params(run.pipeline, functools.partial(param_sharding, run.mesh))
    data = prepare_data(run, params)
    key = jax.device_put(jax.random.key(0), replicated(run.mesh))
    trainable, frozen = run.job.method.start(params, key)
    del params
    manager = open_checkpoints(folder / "checkpoints")
    state = start_state(run, trainable, manager)
    del trainable

    def looped(state, advance) -> None:
        with Preemption() as guard:
            loop(run, guard, manager, state, frozen, advance)

    return Training(state, (frozen, data, key), lambda: lower_steps(run.job, state, frozen, data, key), looped)


def prepared_after(config, folder: Path) -> Training:
    """By the modules of this tree."""
    from dreambooth_jax.families.pipeline import read_params
    from dreambooth_jax.runs.checkpoint import open_checkpoints
    from dreambooth_jax.runs.job import lower_steps, read_shapes
    from dreambooth_jax.runs.loop import Progress, Sheets, Store, loop
    from dreambooth_jax.runs.preemption import Preemption
    from dreambooth_jax.runs.report import Reporter
    from dreambooth_jax.runs.setup import begin, prepare_data, set_up, start_state

    run = set_up(config)
    params = read_params(run.pipeline, run.mesh, read_shapes(run.job))
    trainable, frozen, key = begin(run.job, params)
    del params
    (data,) = prepare_data(run, run.job.method.combine(frozen, trainable))
    state = start_state(run.job, trainable, open_checkpoints(folder / "checkpoints"))
    del trainable

    def looped(state, advance) -> None:
        done = int(state.step)
        with Preemption() as guard:
            loop(
                config,
                Progress(done, state),
                advance,
                store=Store(lambda *_: None, lambda: None, lambda: None),
                sheets=Sheets(lambda _: None, lambda *_: None, lambda _: False),
                reporter=Reporter(run.workdir, first_step=done, steps=config.steps),
                guard=guard,
                agree=lambda requested: requested,
            )

    return Training(state, (frozen, data, key), lambda: lower_steps(run.job, state, frozen, data, key), looped)


def measure(tree: Path, fields: dict, steps: int, *, cold: bool) -> dict[str, float]:
    """What one process of the main job measures, in the tree whose package is imported."""
    import jax
    import jax.numpy as jnp

    is_before = (tree / "dreambooth_jax" / "program.py").exists()
    if is_before:
        from dreambooth_jax import runtime
    else:
        from dreambooth_jax.devices import runtime
    runtime.start()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        config = runpy.run_path(str(tree / "configs" / "dog.py"))["get_config"]()
        known = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items() if n in config}
        config.update(known | {"workdir": folder})
        ready = (prepared_before if is_before else prepared_after)(config, Path(folder))
        started = time.perf_counter()
        compiled = ready.lower().compile()
        warm = time.perf_counter() - started
        per_call = jnp.asarray(config.steps_per_call)
        state, _ = compiled(ready.state, *ready.arguments, per_call)

        started = time.perf_counter()
        for _ in range(steps // config.steps_per_call):
            state, _ = compiled(state, *ready.arguments, per_call)
        jax.block_until_ready(state)
        bare = time.perf_counter() - started

        latest, last, between = [state], int(state.step) + steps, [time.perf_counter()]

        def advance(state, count):
            between.append(time.perf_counter() - between.pop())
            if int(state.step) >= last:
                raise Enough
            latest[0], metrics = jax.block_until_ready(compiled(state, *ready.arguments, count))
            between.append(time.perf_counter())
            return latest[0], metrics

        started = time.perf_counter()
        with contextlib.suppress(Enough):
            ready.loop(state, advance)
        looped = time.perf_counter() - started
        found = {
            "step, ms": 1e3 * bare / steps,
            "loop between two calls, ms": 1e3 * statistics.median(between[1:]),
            "step in the loop, ms": 1e3 * looped / steps,
            "trace and compile, warm, s": warm,
            "peak memory (RSS), MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        if cold:
            jax.config.update("jax_enable_compilation_cache", False)
            jax.clear_caches()
            started = time.perf_counter()
            ready._replace(state=latest[0]).lower().compile()
            found["trace and compile, cold, s"] = time.perf_counter() - started
    return found


def child(tree: Path, *arguments: str, codes: tuple[int, ...] = (0,)) -> tuple[str, float]:
    """(output, CPU seconds) of Python in `tree`, which must end with one of `codes`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode not in codes:
        sys.exit(f"{tree}: {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def one_round(tree: Path, fields: dict, steps: int, *, commands: tuple[str, ...]) -> dict[str, float]:
    """All figures of one tree."""
    job = json.dumps({"tree": str(tree), "fields": fields, "steps": steps})
    output, _ = child(tree, str(Path(__file__).resolve()), "--measure", job)
    found = json.loads(output.splitlines()[-1])
    for name in commands:
        _, seconds = child(tree, "-m", f"dreambooth_jax.{name}", "--help", codes=(0, 1))  # absl's help ends with 1
        found[f"{name} --help, CPU s"] = seconds
    return found


def line(name: str, pairs: list[tuple[float, float]]) -> str:
    """A row of the table."""
    before, after = (f"{statistics.median(values):.4g}" for values in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    text = f"{statistics.median(ratios):.3f} | {ratios[0]:.3f} to {ratios[-1]:.3f}"
    return f"| {name} | {before} | {after} | {text} | {len(pairs)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", nargs="?", type=Path, help="a checkout of the earlier commit")
    parser.add_argument("--rounds", type=int, default=9, help="alternating rounds (default: 9)")
    parser.add_argument("--steps", type=int, default=20, help="training steps, bare and in the loop (default: 20)")
    parser.add_argument("--every", type=int, default=3, help="rounds from one cold compile to the next (default: 3)")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        job = options.measure
        print(json.dumps(measure(Path(job["tree"]), job["fields"], job["steps"], cold=job["fields"].pop("cold"))))
        return
    before = options.before.resolve()
    fields = json.loads(runpy.run_path(str(before / "configs" / "dog.py"))["get_config"]().to_json())
    fields |= {"base": str(ROOT / "dreambooth_jax/tiny/base"), "instance_images": str(ROOT / "examples/subjects/dog")}
    fields |= {"num_class_images": 8, "class_batch_size": 8}
    fields |= dict.fromkeys(("steps", "save_every", "sample_every"), 10**6)
    pairs: dict[str, list[tuple[float, float]]] = {}
    for tree in (before, ROOT):  # fills the caches of compiled programs and of Python's files
        one_round(tree, fields | {"cold": False}, options.steps, commands=COMMANDS)
        print(f"{tree} is ready", file=sys.stderr, flush=True)
    for number in range(options.rounds):
        trees = (before, ROOT) if number % 2 == 0 else (ROOT, before)
        whole = number % options.every == 0
        found = {
            tree: one_round(tree, fields | {"cold": whole}, options.steps, commands=COMMANDS if whole else COMMANDS[:1])
            for tree in trees
        }
        for name, value in found[ROOT].items():
            pairs.setdefault(name, []).append((found[before][name], value))
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    print("| | before | after | ratio | range | rounds |\n|" + "---|" * 6)
    for name, values in pairs.items():
        print(line(name, values))


if __name__ == "__main__":
    main()
