"""Two ways of the same work, timed side by side."""

import statistics
import time
from collections.abc import Callable


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def alternate(works: dict[str, Callable[[], object]], rounds: int) -> None:
    """Prints the times of two named works and the ratio of the second to the first, after a first call of each.

    Rounds of both alternate, so that a machine that is busy elsewhere slows both alike.
    """
    for name, work in works.items():
        print(f"{name:18} first call {seconds_of(work):.1f} s", flush=True)
    times = [[seconds_of(work) for work in works.values()] for _ in range(rounds)]
    for name, values in zip(works, zip(*times, strict=True), strict=True):
        print(f"{name:18} {statistics.median(values):.3f} s  (best {min(values):.3f})")
    ratios = [second / first for first, second in times]
    first, second = works
    print(f"{second} / {first}: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
