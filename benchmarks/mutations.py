"""Mutations of the folders of mathematics, data and adapters: which of them the tests notice.

    pip install cosmic-ray && nice python benchmarks/mutations.py      # goes on where it stopped
    python benchmarks/mutations.py --only data/encode --again          # survivors of one module once more
    python benchmarks/mutations.py --table                             # what is known so far

cosmic-ray's operators change one operator, comparison, number, condition or loop of a copy of the package; annotations,
docstrings and error messages stay. For every mutant the tests of its module (`TESTS`) run until one fails. Python, JAX
and PyTorch are imported once; every mutant is tested in a fork. The same source gives the same sample.
"""

import argparse
import ast
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
COPY, LOG = Path("runs/mutations"), Path("runs/mutations.json")
FOLDERS = ("data", "adapters", "diffusion", "ops")
# Module -> the tests that belong to it, fast ones first.
TESTS = {
    "data/buckets": "test_buckets",
    "data/captions": (
        "test_sources test_images test_masks_and_captions::test_tags_change_places_and_the_first_one_stays"
    ),
    "data/class_folders": "test_prior::test_a_named_folder_must_hold_images_or_be_made_on_purpose",
    "data/class_images": (
        "test_prior test_masks_and_captions::test_a_run_with_all_of_them_has_the_shapes_that_plans_have"
    ),
    "data/contradictions": "test_contradictions",
    "data/encode": "test_encode test_masks_and_captions",
    "data/held_out": (
        "test_watch::test_held_out_photos_do_not_train test_buckets::test_held_out_photos_keep_their_shapes"
    ),
    "data/identifiers": "test_identifier",
    "data/images": "test_images test_masks_and_captions test_sources",
    "data/latents": "test_latents",
    "data/low_resolution": "test_low_resolution",
    "data/paths": "test_sources test_images",
    "data/sources": "test_sources test_images test_hub_data test_sources_fuzz",
    "adapters/extract": "test_extract",
    "adapters/factors": "test_extract test_lora_forms test_lora_files",
    "adapters/inversion": "test_inversion",
    "adapters/lora": "test_lora_forms test_lora::test_targets_that_match_nothing_are_an_error",
    "adapters/many": "test_many",
    "adapters/method": "test_lora::test_it_starts_at_the_base_with_the_shapes_it_promised",
    "adapters/quantised": "test_quantised",
    "diffusion/adam": "test_adam",
    "diffusion/buckets": "test_buckets",
    "diffusion/examples": (
        "test_examples test_step::test_every_example_is_used_once_per_epoch test_step::test_what_is_drawn "
        "test_step::test_means_without_spread_are_used_as_they_are test_step::test_draws_do_not_depend_on_devices "
        "test_step::test_flat_data_are_the_same_examples"
    ),
    "diffusion/loss": "test_loss test_process test_masks_and_captions test_prior_target",
    "diffusion/low_resolution": "test_low_resolution",
    "diffusion/optimizer": "test_optimizer test_lora_forms",
    "diffusion/process": "test_process test_loss test_sampler",
    "diffusion/sampler": "test_sampler test_process test_pixel_sampler",
    "diffusion/schedulers": "test_process test_sampler test_pixel_sampler",
    "diffusion/step": (
        "test_step::test_frozen_parameters_are_neither_differentiated_nor_clipped_nor_in_the_state "
        "test_step::test_ema_is_that_of_diffusers test_step::test_accumulated_parts_are_the_whole_batch "
        "test_step::test_training_lowers_the_loss test_step::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit "
        "test_recompute::test_the_step_is_the_same"
    ),
    "ops/attention": "test_attention",
    "ops/barriers": "test_recompute",
    "ops/convolve": "test_models::test_convolution",
    "ops/flash": "test_flash",
    "ops/group_norm": "test_group_norm",
    "ops/pixels": "test_low_resolution test_pipeline",
    "ops/quantise": "test_quantised",
    "ops/recompute": "test_recompute",
}
# Operators left out: they change names, cannot change `except a.B`, or make errors of type that any call would find.
OTHERS = re.compile("Decorator|Variable|ExceptionReplacer|_(Bit|RShift|LShift|Invert)")
# CPU seconds after which a mutant that hangs counts as noticed: this, and a multiple of the unchanged module's.
PATIENCE, MULTIPLE = 30, 3


class Mutant(NamedTuple):
    """A mutation.

    Attributes:
        module: such as "data/encode".
        line: number of the changed line.
        change: the line before and after.
        source: the whole changed file.
    """

    module: str
    line: int
    change: str
    source: str

    @property
    def key(self) -> str:
        return f"{self.module}:{self.line}: {self.change}"


def untouched(source: str) -> set[int]:
    """Lines of docstrings, error messages, annotations, decorators and heads of functions."""
    tree, lines = ast.parse(source), set()
    nodes = [
        node for node in ast.walk(tree) if isinstance(node, (ast.AnnAssign, ast.Raise, ast.Import, ast.ImportFrom))
    ]
    nodes += [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp)]
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            nodes += node.decorator_list
        if isinstance(node, ast.FunctionDef):
            lines |= set(range(node.lineno, node.body[0].lineno))
        is_warning = isinstance(node, ast.Call) and "warning" in ast.unparse(node.func)
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        nodes += [node] if is_warning or is_text else []
    return lines.union(*(range(node.lineno, node.end_lineno + 1) for node in nodes))


def sample(module: str, count: int) -> list[Mutant]:
    """Mutants of up to `count` lines of a module, one for each, the same for the same source; more lines are further
    ones."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider

    source, provider = (ROOT / "dreambooth_jax" / f"{module}.py").read_text(), OperatorProvider()
    skipped, nodes = untouched(source), list(ast_nodes(get_ast(source)))
    lines = source.splitlines()
    found: dict[int, dict[int, list]] = {}  # line -> column -> (operator, occurrence)
    for operator in (provider[name]() for name in provider if not OTHERS.search(name)):
        places = [place for node in nodes for place in operator.mutation_positions(node)]
        for occurrence, ((line, column), _) in enumerate(places):
            is_strict = lines[line - 1][:column].endswith("strict=")  # lengths that always agree
            if line not in skipped and not is_strict:
                found.setdefault(line, {}).setdefault(column, []).append((operator, occurrence))
    chosen = []
    for line in random.Random(module).sample(sorted(found), len(found))[:count]:
        draw = random.Random(f"{module}:{line}")
        operator, occurrence = draw.choice(found[line][draw.choice(sorted(found[line]))])
        changed = mutate_code(source, operator, occurrence)
        pairs = zip(lines, changed.splitlines(), strict=True)
        before, after = next((old.strip(), new.strip()) for old, new in pairs if old != new)
        chosen.append(Mutant(module, line, f"{before} -> {after}", changed))
    return chosen


def copy_project() -> None:
    """A copy in which mutants are written, without the weights, which are linked."""
    for name in ("dreambooth_jax", "tests", "configs", "examples", "benchmarks", "docs"):
        shutil.copytree(
            ROOT / name, COPY / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("base", "__pycache__")
        )
    for name in ("pyproject.toml", "setup.py", "README.md", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, COPY / name)
    cache = ROOT / ".pytest_cache" / "compiled"
    cache.mkdir(parents=True, exist_ok=True)
    (COPY / ".pytest_cache").mkdir(exist_ok=True)
    for link, target in (
        (COPY / "dreambooth_jax/tiny/base", ROOT / "dreambooth_jax/tiny/base"),
        (COPY / ".pytest_cache/compiled", cache),
    ):
        if not link.exists():
            link.symlink_to(target.resolve())


def import_what_tests_import() -> None:
    """Before the forks. The variables are those of tests/conftest.py that are read by the import of JAX."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str((COPY / ".pytest_cache" / "compiled").absolute())
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True
    import beartype  # noqa: F401
    import diffusers
    import flax.nnx  # noqa: F401
    import hypothesis  # noqa: F401
    import optax  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401
    import transformers

    diffusers.StableDiffusionPipeline, diffusers.DDPMScheduler, transformers.CLIPTextModel  # noqa: B018


def run_tests(module: str, cpu_seconds: int) -> tuple[str, float]:
    """("passed", "failed" or "stopped", CPU seconds) of the module's tests in a fork."""
    names = (name.partition("::") for name in TESTS[module].split())
    files = [f"tests/{file}.py{separator}{test}" for file, separator, test in names]
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(COPY)
        output = os.open(f"{module.replace('/', '_')}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
        sys.path[:0] = [os.getcwd()]
        os.environ["PYTHONPATH"] = os.getcwd()
        import pytest

        code = 1
        try:
            code = pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-n", "0", *files])
        finally:
            os._exit(int(code))
    # A mutant may sleep: ten times as long on the clock.
    deadline, usage, status = time.monotonic() + 10 * cpu_seconds, None, None
    while usage is None:
        done, code, spent = os.wait4(child, os.WNOHANG)
        if done:
            status, usage = code, spent
        elif time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            time.sleep(1)
        else:
            time.sleep(0.1)
    ended = "stopped" if os.WIFSIGNALED(status) else "passed" if os.WEXITSTATUS(status) == 0 else "failed"
    return ended, usage.ru_utime + usage.ru_stime


def tested(chosen: list[Mutant], known: dict[str, dict], again: bool) -> Iterator[tuple[str, dict]]:
    """(key, result) of the mutants of one module that are not known yet."""
    left = [m for m in chosen if m.key not in known or (again and known[m.key]["result"] == "survived")]
    if not left:
        return
    module = left[0].module
    ended, cpu = run_tests(module, 3600)
    if ended != "passed":
        print(f"{module}: its tests fail without a mutation; see {COPY}/{module.replace('/', '_')}.log", flush=True)
        return
    path = COPY / "dreambooth_jax" / f"{module}.py"
    source = path.read_text()
    for mutant in left:
        path.write_text(mutant.source)
        try:
            ended, seconds = run_tests(module, int(PATIENCE + MULTIPLE * cpu))
        finally:
            path.write_text(source)
        result = {"passed": "survived", "failed": "killed", "stopped": "hung"}[ended]
        yield mutant.key, {"result": result, "seconds": round(seconds, 1)}


def table(known: dict[str, dict]) -> None:
    """Prints what is known: the share of mutants that are noticed, and the others by name."""
    print("| folder | mutants | noticed | share |\n|---|---|---|---|")
    for folder in (*FOLDERS, ""):
        results = [value["result"] for key, value in known.items() if key.startswith(folder)]
        noticed = sum(result != "survived" for result in results)
        if results:
            print(f"| {folder or 'all'} | {len(results)} | {noticed} | {noticed / len(results):.0%} |")
    for key, value in known.items():
        if value["result"] == "survived":
            print(f"survived: {key}")


def check_that_all_are_listed() -> None:
    """Raises ValueError: a module of the folders has no entry in `TESTS`."""
    paths = (path for folder in FOLDERS for path in (ROOT / "dreambooth_jax" / folder).glob("*.py"))
    modules = {f"{path.parent.name}/{path.stem}" for path in paths if path.stem != "__init__"}
    if modules != TESTS.keys():
        raise ValueError(f"TESTS of {__file__}: missing or without a module: {sorted(modules ^ TESTS.keys())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10, help="mutants per module (default: 10)")
    parser.add_argument("--only", nargs="+", default=list(TESTS), help="modules, such as data/encode")
    parser.add_argument("--again", action="store_true", help="test the known survivors again")
    parser.add_argument("--table", action="store_true", help="print what is known, test nothing")
    options = parser.parse_args()
    known = json.loads(LOG.read_text()) if LOG.exists() else {}
    if options.table:
        return table(known)
    check_that_all_are_listed()
    COPY.mkdir(parents=True, exist_ok=True)
    copy_project()
    import_what_tests_import()
    for module in options.only:
        chosen = sample(module, options.count)
        keys = {mutant.key for mutant in chosen}
        known = {key: value for key, value in known.items() if not key.startswith(f"{module}:") or key in keys}
        for key, value in tested(chosen, known, options.again):
            known[key] = value
            LOG.write_text(json.dumps(known, indent=1))
            print(f"{value['result']:9} {value['seconds']:6.1f} s  {key}", flush=True)
    table(known)


if __name__ == "__main__":
    main()
