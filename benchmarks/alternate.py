"""Ways of the same work, timed side by side."""

import statistics
import time
from collections.abc import Callable, Sequence


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def alternate(
    works: dict[str, Callable[[], object]], rounds: int, pairs: Sequence[tuple[str, str]] | None = None
) -> None:
    """Prints the times of named works, after a first call of each, and the ratio of the second to the first of `pairs`;
    None: of the first two works.

    Rounds of all alternate, so that a machine that is busy elsewhere slows all alike.
    """
    for name, work in works.items():
        print(f"{name:18} first call {seconds_of(work):.1f} s", flush=True)
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds_of(work))
    for name, values in times.items():
        print(f"{name:18} {statistics.median(values):.3f} s  (best {min(values):.3f})")
    for first, second in pairs or [tuple(works)[:2]]:
        ratios = [b / a for a, b in zip(times[first], times[second], strict=True)]
        print(f"{second} / {first}: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
