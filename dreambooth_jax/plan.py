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
from dreambooth_jax.runs.flags import fill, refuse
from dreambooth_jax.runs.places import check_base
from dreambooth_jax.runs.stages import chosen, stage_configs

DEFAULTS = {"topology": "v5e:2x4", "advise": True, "subjects": 0, "chip_hour_price": 0.0}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dreambooth_jax.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--topology", help=f"TPU slice: v4, v5e, v5p, v6e or tpu7x, and its shape (default: {DEFAULTS['topology']})"
    )
    parser.add_argument("--sweep", action="store_true", help="compare slices and settings in one table")
    parser.add_argument(
        "--full", action="store_true", help="compile as the TPU will, with cycle estimates: ten times as long"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--advise", action=argparse.BooleanOptionalAction, help="when it does not fit, compile what would (default: on)"
    )
    parser.add_argument("--protocol", action="store_true", help="cost of the whole protocol of configs/protocol.py")
    parser.add_argument(
        "--subjects", type=not_negative, help="so many subjects in one program; default: those of the config"
    )
    parser.add_argument("--chip_hour_price", type=finite, help="price of one chip for an hour (--protocol, --subjects)")
    with one_line_errors():
        options, config, preset = config_file.parse(parser, arguments, "configs/dog.py:sd15")
        check_flags(options, config)
        chip_of(options.topology)
        if not options.protocol:
            check_config(config)
            check_effects(config, preset)
            config = absolute_paths(config)
            for base in (config.base, *config.stages):
                check_base(base, weights=False)
            stage_configs(config)
        run(config, options)


def check_flags(options: argparse.Namespace, config: ConfigDict) -> None:
    """Fills the options that were not given.

    Raises:
        ValueError: options without effect.
    """
    many = bool(options.subjects or (not options.protocol and config.subjects))
    if options.protocol:
        refuse(options, ["subjects", "sweep", "json", "advise"], "with --protocol: the cost is planned, as text")
    elif options.sweep:
        idle = ("subjects", "topology", "full", "json", "advise")
        refuse(options, idle, "with --sweep, a table of slices for one subject: leave one out")
    elif many or options.json:
        refuse(options, ["advise"], f"with {'subjects' if many else '--json'}: nothing else is compiled")
    if options.sweep and config.subjects:
        raise ValueError(
            f"--sweep plans one subject, not subjects = {config.subjects!r}: plan them without it, one --topology at a "
            "time, or give a config of one subject"
        )
    if not (options.protocol or many):
        refuse(options, ["chip_hour_price"], "without --protocol or --subjects, whose price it gives")
        if options.json and config.stages and not config.stage:
            raise ValueError("--json: the plan of one stage; give --config.stage=1, or another of this cascade")
    fill(options, DEFAULTS)


def run(config: ConfigDict, options: argparse.Namespace) -> None:
    """Prints what the options ask for."""
    from dreambooth_jax.devices import runtime  # here, so that a wrong config is refused without JAX
    from dreambooth_jax.runs import protocol_plan, slices, together

    runtime.start()
    if options.protocol:
        print(protocol_plan.plan_protocol(config, options), flush=True)
        return
    if options.subjects or (config.subjects and not options.sweep):
        together.print_together(config, options)
        return
    configs = stage_configs(config)
    for number, own in chosen(config, configs):
        if len(configs) > 1 and not options.json:
            print(f"Stage {number} of {len(configs)}: {own.base}", flush=True)
        if options.sweep:
            slices.print_sweep(own)
        else:
            slices.print_plan(own, options)


if __name__ == "__main__":
    main()
