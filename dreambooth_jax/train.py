"""Fine-tunes a text-to-image model on a subject (arXiv 2208.12242).

    python -m dreambooth_jax.train --config configs/dog.py
    python -m dreambooth_jax.train --config configs/many.py
    python -m dreambooth_jax.train --config configs/dog.py:sd15 --config.workdir=runs/rex --config.steps=400

Running the same command again goes on from the last checkpoint. SIGTERM, Ctrl-C and a closed terminal save and exit
with code 128 + the signal's number.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from ml_collections import ConfigDict

from dreambooth_jax.runs import config_file
from dreambooth_jax.runs.command import one_line_errors
from dreambooth_jax.runs.config import absolute_paths, check_config
from dreambooth_jax.runs.effects import check_effects
from dreambooth_jax.runs.places import check_places
from dreambooth_jax.runs.stages import chosen, stage_configs


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dreambooth_jax.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    with one_line_errors():
        _, config, preset = config_file.parse(parser, arguments, "configs/dog.py or configs/dog.py:sd15")
        check_config(config)
        check_effects(config, preset)
        config = absolute_paths(config)
        for own in stage_configs(config):
            check_places(own)
        run(config)


def run(config: ConfigDict) -> None:
    """Sets up and trains; of a cascade, one stage or all, one after the other."""
    import jax  # here, so that a wrong config is refused without it

    from dreambooth_jax.devices import runtime
    from dreambooth_jax.families.pipeline import describe_base
    from dreambooth_jax.painting.painter import check_divided
    from dreambooth_jax.runs import lease
    from dreambooth_jax.runs.many import train_many
    from dreambooth_jax.runs.preemption import Preemption
    from dreambooth_jax.runs.setup import set_up
    from dreambooth_jax.runs.training import train

    runtime.start()
    with Preemption() as guard, lease.holding(config.workdir, guard.at_exit):
        try:
            if config.subjects:
                train_many(config, guard)
                return
            configs = stage_configs(config)
            for _, own in chosen(config, configs):  # a later stage too, before the first one trains
                if own.reuse_features > 1:
                    check_divided(describe_base(own.base), own.reuse_features)
            for number, own in chosen(config, configs):
                train(set_up(own, before=configs[: number - 1]), guard)
        except jax.errors.JaxRuntimeError as error:
            if runtime.is_alone():
                raise
            print(
                f"error: process {jax.process_index()} cannot go on without the others ({str(error).splitlines()[0]}). "
                "See the log of the one that stopped first; the same command on all hosts goes on from the checkpoint.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)  # an orderly end would wait for the process that is gone


if __name__ == "__main__":
    main()
