"""What all commands share: errors as one line."""

import argparse
import contextlib
import errno
import io
import math
import sys
from collections.abc import Iterator

BEST = "best"  # name of the step of the best checkpoint


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process with `error: ...` and exit code 1 for anything that a person can cause; Ctrl-C ends with 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        remedy = ". Make room on that disk." if getattr(error, "errno", None) == errno.ENOSPC else ""
        sys.exit(f"error: {str(error).encode(errors='backslashreplace').decode()}{remedy}")
    except RuntimeError as error:  # JAX's, which is not imported here
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(
            f"error: the device has too little memory ({str(error).splitlines()[0]}). To train: lower batch_size, "
            "raise accumulate, set remat='layers', or split the model with mesh_fsdp; for TPUs, "
            "python -m dreambooth_jax.plan says what fits. To paint: lower --batch_size, class_batch_size or the "
            "resolution."
        )


def positive(text: str) -> int:
    """A whole number above 0 on a command line."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number above 0")
    return int(text)


def not_negative(text: str) -> int:
    """A whole number on a command line, 0 or more."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, 0 or more")
    return int(text)


def seed_of(text: str) -> int:
    """A seed on a command line."""
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 0 to 2^32 - 1")
    return int(text)


def finite(text: str) -> float:
    """A number on a command line, neither infinite nor NaN."""
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text}: expected a finite number")
    return float(text)


def step_of(text: str) -> int | str:
    """A checkpoint's step on a command line: a number or "best"."""
    if text != BEST and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected a number of steps, or {BEST}")
    return BEST if text == BEST else int(text)
