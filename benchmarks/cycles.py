"""Where a training step spends its time: the TPU compiler's cycle estimates by operation.

    python benchmarks/tpu_step.py --full --only "v5e, (1+1)"
    python benchmarks/cycles.py "runs/tpu_step_full/v5e, (1+1).txt.gz"

Attention kernels are not in it, which the compiler cannot see into.
"""

import argparse
import collections
import gzip
import re
from pathlib import Path

from dreambooth_jax.devices.chips import CHIPS

SHOWN = 12


def kind(op: str) -> str:
    """What an instruction belongs to, by the name of the traced operation."""
    operation = op.rsplit("/", 1)[-1]
    if "jvp(" not in op:
        return "optimizer" if "while/body" in op else "other"
    recomputed = ", recomputed" if "rematted" in op else ""
    return f"{'backward' if 'transpose(' in op else 'forward'} {operation}{recomputed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("hlo", type=Path, help="optimized HLO text, gzipped")
    parser.add_argument("--chip", default="v5e", choices=list(CHIPS))
    options = parser.parse_args()
    cycles, number = collections.Counter(), collections.Counter()
    for line in gzip.decompress(options.hlo.read_bytes()).decode().splitlines():
        estimate, op = re.search(r'"estimated_cycles":"(\d+)"', line), re.search(r'op_name="([^"]*)"', line)
        if estimate:
            name = kind(op[1] if op else "")
            cycles[name] += int(estimate[1])
            number[name] += 1
    total = sum(cycles.values())
    print("| operation | instructions | ms | share |\n|---|---|---|---|")
    shown = cycles.most_common(SHOWN)
    for name, count in shown:
        ms = count / CHIPS[options.chip].clock * 1e3
        print(f"| {name} | {number[name]} | {ms:.1f} | {count / total:.1%} |")
    rest = total - sum(count for _, count in shown)
    print(f"| all others | | {rest / CHIPS[options.chip].clock * 1e3:.1f} | {rest / total:.1%} |")


if __name__ == "__main__":
    main()
