"""How training scales over the chips of a pod slice, as the TPU compiler sees it: 1, 2, 4, ..., 256 chips.

    pip install -e ".[plan]" && python benchmarks/scaling.py                # hours; goes on where it was stopped
    python benchmarks/scaling.py --chips 1 8 256                            # some of them

Stable Diffusion 1.5, UNet, the same images per chip on every slice, weights and optimizer state on every chip
(data-parallel), split over all of them (fsdp), or over eight at a time. Efficiency is the time of the computation over
the time of the step: at best the collectives run behind the computation, at worst one after the other.
"""

import argparse
import functools
import runpy
from pathlib import Path

from kept import kept

from dreambooth_jax.devices import runtime
from dreambooth_jax.runs.slices import Plan, plan

ROOT = Path(__file__).parent.parent
SLICES = {
    1: "v5e:1x1",
    4: "v5e:2x2",
    8: "v5e:2x4",
    16: "v5e:4x4",
    32: "v5e:4x8",
    64: "v5e:8x8",
    128: "v5e:8x16",
    256: "v5e:16x16",
}
GIB = 2**30
# Mode -> devices that share one copy of the weights, of so many chips.
MODES = {"data-parallel": lambda chips: 1, "fsdp": lambda chips: chips, "fsdp of 8": lambda chips: 8}


def row(found: Plan) -> dict:
    """What is kept of a plan."""
    cost = found.cost
    if cost is None:
        return {"missing": found.missing}
    return {
        "peak": cost.peak,
        "compute": cost.roofline_seconds,
        "collectives": cost.collectives,
        "interconnect": cost.interconnect_seconds,
        "compile": cost.compile_seconds,
    }


def line(entry: dict) -> str:
    """A row of the table."""
    head = f"| {entry['name']} | "
    if "missing" in entry:
        return head + f"does not fit, {entry['missing'] / GIB:.2f} GiB too much | | | | |"
    compute, exchange = entry["compute"], entry["interconnect"]
    received = sum(size for _, size in entry["collectives"].values())
    best, worst = compute / max(compute, exchange), compute / (compute + exchange)
    return head + (
        f"{entry['peak'] / GIB:.2f} | {compute * 1e3:.0f} | {received / 1e9:.2f} | {exchange * 1e3:.1f} | "
        f"{worst:.0%} to {best:.0%} |"
    )


def main() -> None:
    runtime.start()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="sd15", help="of configs/dog.py")
    parser.add_argument("--images", type=int, default=4, help="subject images per chip; as many class images join them")
    parser.add_argument("--chips", type=int, nargs="+", default=list(SLICES), choices=list(SLICES))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    options = parser.parse_args()
    log = Path("runs") / f"scaling_{options.base}_{options.images}.jsonl"
    config = runpy.run_path(str(ROOT / "configs" / "dog.py"))["get_config"](options.base)
    config.update(train_text_encoder=False, moment_dtype="bfloat16", remat="layers")
    print("| chips | mode | peak GiB | computation ms | received GB | exchange ms | efficiency |\n|" + "---|" * 7)
    for chips in options.chips:
        for mode in options.modes:
            if mode == "fsdp of 8" and chips <= 8:
                continue
            config.update(batch_size=options.images * chips, mesh_data=-1, mesh_fsdp=MODES[mode](chips))
            compiled = functools.partial(plan, config, SLICES[chips], class_images=False)
            print(line(kept(log, f"{chips} | {mode}", lambda compiled=compiled: row(compiled()))), flush=True)


if __name__ == "__main__":
    main()
