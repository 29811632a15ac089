"""What all commands share: errors as one line."""

import argparse
import contextlib
import errno
import io
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


def step_of(text: str) -> int | str:
    """A checkpoint's step on a command line: a number or "best"."""
    if text != BEST and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected a number of steps, or {BEST}")
    return BEST if text == BEST else int(text)
