"""Says before a TPU is rented whether a training run fits it, how long it takes, and what to change if it does not.

    python -m dreambooth_jax.plan --config configs/dog.py:sd15 --topology v5e:2x4
    python -m dreambooth_jax.plan --config configs/dog.py:sd15 --sweep
    python -m dreambooth_jax.plan --config configs/many.py:sd15 --subjects 8 --topology v5e:1x1 --chip_hour_price 1.2
    python -m dreambooth_jax.plan --config configs/protocol.py:sd15 --protocol --chip_hour_price 1.2

The TPU compiler (`pip install -e ".[plan]"`) compiles the very programs that `train` would run, from shapes alone, on
any machine: no TPU and no weights are needed. Memory figures are the compiler's own, times are estimates: docs/tpu.md
says how far both can be trusted.
"""

import argparse
from collections.abc import Sequence

from ml_collections import ConfigDict

from dreambooth_jax.devices.chips import chip_of
from dreambooth_jax.runs import config_file
from dreambooth_jax.runs.command import finite, not_negative, one_line_errors
from dreambooth_jax.runs.config import absolute_paths, check_config
from dreambooth_jax.runs.effects import check_effects
from dreambooth_jax.runs.places import check_base
from dreambooth_jax.runs.stages import stage_configs


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dreambooth_jax.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x4", help="TPU slice: v4, v5e, v5p, v6e or tpu7x, and its shape")
    parser.add_argument("--sweep", action="store_true", help="compare slices and settings in one table")
    parser.add_argument(
        "--full", action="store_true", help="compile as the TPU will, with cycle estimates: ten times as long"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--advise", action=argparse.BooleanOptionalAction, default=True, help="when it does not fit, compile what would"
    )
    parser.add_argument("--protocol", action="store_true", help="cost of the whole protocol of configs/protocol.py")
    parser.add_argument(
        "--subjects", type=not_negative, default=0, help="so many subjects in one program; default: those of the config"
    )
    parser.add_argument(
        "--chip_hour_price", type=finite, default=0.0, help="price of one chip for an hour (--protocol, --subjects)"
    )
    with one_line_errors():
        options, config, preset = config_file.parse(parser, arguments, "configs/dog.py:sd15")
        if options.subjects and (options.protocol or options.sweep):
            parser.error(f"--subjects {options.subjects}: expected without --protocol or --sweep")
        chip_of(options.topology)
        if not options.protocol:
            check_config(config)
            check_effects(config, preset)
            config = absolute_paths(config)
            for base in (config.base, *config.stages):
                check_base(base, weights=False)
        run(config, options)


def run(config: ConfigDict, options: argparse.Namespace) -> None:
    """Prints what the options ask for."""
    from dreambooth_jax.devices import runtime  # here, so that a wrong config is refused without JAX
    from dreambooth_jax.runs import slices, together

    runtime.start()
    if options.protocol:
        print(slices.plan_protocol(config, options), flush=True)
        return
    if options.subjects or (config.subjects and not options.sweep):
        together.print_together(config, options)
        return
    config = stage_configs(config)[max(1, config.stage) - 1]
    if options.sweep:
        slices.print_sweep(config)
    else:
        slices.print_plan(config, options)


if __name__ == "__main__":
    main()
