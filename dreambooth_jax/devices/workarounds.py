"""Everything in the library that exists because of a fault or limit of another project's releases.

A row of `WORKAROUNDS` says what, why, for which releases, and where it is applied. Every row names the test that fails
when the row is no longer needed.
"""

import dataclasses
import importlib.metadata
import re

Version = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Workaround:
    """One row.

    Attributes:
        name: short name.
        why: fault or limit, and its effect.
        package: distribution that has it.
        first: first release that has it.
        before: first release without it; None: the newest release has it.
        issue: upstream report; "" where there is none.
        where: module that applies it.
        test: test that fails when it is no longer needed; "" where only programs of full size show it.
        xla_flag: flag of XLA's CPU backend that applies it; "" for none. Releases outside the range may not know the
            flag, and XLA ends the process over an unknown one.
    """

    name: str
    why: str
    package: str
    first: Version
    before: Version | None
    issue: str
    where: str
    test: str
    xla_flag: str = ""


WORKAROUNDS = (
    Workaround(
        name="YNNPACK",
        why="some sums over a product are wrong on CPU (a sum of squares as -1e17) and differ from call to call; "
        "convolutions and compiling take longer",
        package="jaxlib",
        first=(0, 10),
        before=(0, 11),
        issue="",
        where="devices/runtime.py",
        test="test_workarounds.py::test_a_supported_release_needs_it",
        xla_flag="--xla_cpu_experimental_ynn_fusion_type=",
    ),
    Workaround(
        name="products without a sum",
        why="without YNNPACK, the CPU does not compile attention's gradient for one query or one key in bfloat16",
        package="jaxlib",
        first=(0, 10),
        before=(0, 11),
        issue="",
        where="ops/attention.py",
        test="test_attention.py::test_one_query_or_one_key_in_low_precision",
    ),
    Workaround(
        name="garbage collection",
        why="Python's collector, at its default threshold of 700 objects, takes a quarter of the time of tracing",
        package="jax",
        first=(0, 4),
        before=None,
        issue="",
        where="devices/runtime.py",
        test="test_workarounds.py::test_collections_take_time_from_tracing",
    ),
    Workaround(
        name="convolution gradients",
        why="XLA's own gradients of convolutions are ten times slower on CPU, inside loops and with strides",
        package="jaxlib",
        first=(0, 4),
        before=None,
        issue="https://github.com/jax-ml/jax/issues/12868",
        where="ops/convolve.py",
        test="test_workarounds.py::test_xla_s_gradients_of_convolutions_are_slow_on_cpu",
    ),
    Workaround(
        name="sums over rows",
        why="XLA's CPU backend takes sums over all axes but the last one element at a time, and computes the argument "
        "of several such sums once for each",
        package="jaxlib",
        first=(0, 4),
        before=None,
        issue="",
        where="ops/channels.py",
        test="test_workarounds.py::test_xla_s_sums_over_rows_are_slow_on_cpu",
    ),
    Workaround(
        name="recomputed gradients",
        why="XLA keeps all gradients until their norm is known: to recompute some, a jaxpr is evaluated equation by "
        "equation, with attributes of JAX that are not public; an unknown release keeps the gradients",
        package="jax",
        first=(0, 9),
        before=None,
        issue="",
        where="ops/recompute.py",
        test="test_recompute.py::test_on_a_tpu_wide_gradients_are_not_kept",
    ),
    Workaround(
        name="barriers",
        why="XLA's simplifier merges a second computation with the first",
        package="jaxlib",
        first=(0, 4),
        before=None,
        issue="",
        where="ops/barriers.py",
        test="test_recompute.py::test_on_a_tpu_wide_gradients_are_not_kept",
    ),
    Workaround(
        name="one key for shapes",
        why="tracing the call counter of nnx.Rngs takes time quadratic in the number of parameters",
        package="flax",
        first=(0, 12),
        before=None,
        issue="",
        where="models/params.py",
        test="test_workarounds.py::test_counting_keys_takes_time_from_tracing",
    ),
    Workaround(
        name="whole products",
        why="large products of v6e become loops over slices, which abort in quick mode and are costed once",
        package="libtpu",
        first=(0, 0, 52),
        before=None,
        issue="",
        where="devices/compiler_options.py",
        test="",  # benchmarks/tpu_step.py, its rows of v6e
    ),
    Workaround(
        name="XLA_FLAGS and libtpu",
        why="the TPU compiler reads XLA_FLAGS and ends the process over a flag that only the CPU backend knows",
        package="libtpu",
        first=(0, 0, 52),
        before=None,
        issue="",
        where="devices/tpu.py",
        test="test_workarounds.py::test_libtpu_ends_the_process_over_flags_of_the_cpu",
    ),
)


def version_of(package: str) -> Version:
    """The installed release of a distribution, such as (0, 10, 2).

    Raises:
        ImportError: it is not installed.
    """
    return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version(package)))


def applies(workaround: Workaround) -> bool:
    """Whether the installed release has the fault."""
    version = version_of(workaround.package)
    return workaround.first <= version and (workaround.before is None or version < workaround.before)


def with_cpu_flags(flags: str) -> str:
    """XLA_FLAGS for a process that computes on CPU: `flags` and those of the table that the installed release needs and
    that `flags` does not set."""
    added = [w.xla_flag for w in WORKAROUNDS if w.xla_flag and applies(w)]
    return " ".join([flags, *(flag for flag in added if flag.partition("=")[0] not in flags)]).strip()
