"""A training run with a signal that it sends to itself in the middle of what the first argument names.

The main thread goes on with that work for as long as it lives, as it does in a long compile or a large grid.
"""

import argparse
import os
import signal
import sys
import threading
import time

import jax

from dreambooth_jax.devices import runtime
from dreambooth_jax.runs import config_file
from dreambooth_jax.runs.preemption import Preemption
from dreambooth_jax.runs.report import Reporter
from dreambooth_jax.runs.setup import set_up
from dreambooth_jax.runs.training import train

PLACE = sys.argv.pop(1)


def send_soon() -> None:
    def send() -> None:
        time.sleep(0.3)  # the work of the main thread is then under way
        print(f"sending SIGTERM during {PLACE}", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()


def stopped_painter(paint):
    """Slow class images with a signal at the sixth; samples without end."""

    def stopped(params, requests, *args, **kw):
        if PLACE == "sampling" and len(requests) == 4:  # two prompts, two seeds: a sheet
            send_soon()
            while True:
                list(paint(params, requests, *args, **kw))
        for number, painted in enumerate(paint(params, requests, *args, **kw), 1):
            if PLACE == "class images":
                if number == 6:
                    send_soon()
                time.sleep(0.1)
            yield painted

    return stopped


def stopped_compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    if PLACE != "compile":
        return lowered.compile()
    send_soon()
    lowered.compile()
    print("the compile was not interrupted", flush=True)
    sys.exit(1)


class StoppedReporter(Reporter):
    calls = 0

    def record(self, *args) -> None:
        self.calls += 1
        if PLACE == "training":
            if self.calls == 9:
                send_soon()
            time.sleep(0.1)
        super().record(*args)


if __name__ == "__main__":
    _, config, _ = config_file.parse(argparse.ArgumentParser(), None, "configs/dog.py")
    runtime.start()
    with Preemption() as guard:
        run = set_up(config)
        run = run._replace(paint=stopped_painter(run.paint), paint_class=stopped_painter(run.paint_class))
        train(run, guard, compile_steps=stopped_compile, reporter=StoppedReporter)
