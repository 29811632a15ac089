"""The train command with a signal that it sends to itself in the middle of what the first argument names.

The main thread goes on with that work for as long as it lives, as it does in a long compile or a large grid.
"""

import os
import signal
import sys
import threading
import time

import jax
from absl import app
from ml_collections import config_flags

from dreambooth_jax import train
from dreambooth_jax.data import class_images as prior
from dreambooth_jax.runs import report

PLACES = {
    "class images": (prior, "save_png", 6),
    "compile": (jax.stages.Lowered, "compile", 1),
    "training": (report.Reporter, "record", 9),
    "sampling": (train, "paint_sheet", 1),
}


def signal_at(place: str) -> None:
    module, name, at = PLACES[place]
    original, calls = getattr(module, name), []

    def send() -> None:
        time.sleep(0.3)  # the work below is then under way
        print(f"sending SIGTERM during {place}, after {len(calls)} calls", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    def stopped(*args, **kw):
        calls.append(name)
        if len(calls) == at:
            threading.Thread(target=send, daemon=True).start()
            while place == "sampling":
                original(*args, **kw)
        if place in ("class images", "training"):
            time.sleep(0.1)
        result = original(*args, **kw)
        if place == "compile":
            print("the compile was not interrupted", flush=True)
        return result

    setattr(module, name, stopped)


if __name__ == "__main__":
    signal_at(sys.argv.pop(1))
    config_flags.DEFINE_config_file("config", None, "of the run")
    app.run(train.main)
