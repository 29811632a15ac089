"""SIGTERM: save and leave at once, whatever the main thread is doing.

A Python signal handler runs only between two bytecodes of the main thread, so a flag that the training loop polls is
not seen during a compile, while class images are painted, or in an evaluation. Here the signal wakes a thread of its
own through a file descriptor: outside the training loop that thread saves and exits; inside it (where the state's
buffers belong to the running call) it asks the loop, which looks after every call.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable

EXIT_CODE = 128 + signal.SIGTERM  # 143: what a shell reports for a process ended by SIGTERM


class Preemption:
    """Watches for SIGTERM while used as a context manager in the main thread."""

    def __init__(self) -> None:
        self._finish: Callable[[], None] = lambda: None
        self._requested = threading.Event()
        # Held by whoever leaves: the main thread then waits here for the end instead of changing what is being saved.
        self._lock = threading.Lock()
        self._polled = False

    @property
    def requested(self) -> bool:
        """Whether SIGTERM came; the training loop polls it."""
        return self._requested.is_set()

    def before_leaving(self, finish: Callable[[], None]) -> None:
        """Sets what must still reach the disk from now on; outside `polled` it is called from another thread."""
        with self._lock:
            self._finish = finish

    def __enter__(self) -> "Preemption":
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        # The C-level handler writes the descriptor at once; the Python-level one has nothing left to do.
        self._old_handler = signal.signal(signal.SIGTERM, lambda *_: None)
        self._old_descriptor = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True, name="preemption").start()
        return self

    def __exit__(self, *_) -> None:
        with self._lock:
            signal.set_wakeup_fd(self._old_descriptor)
            signal.signal(signal.SIGTERM, self._old_handler)
            self._write.close()

    def _watch(self) -> None:
        while received := self._read.recv(16):
            if signal.SIGTERM in received:
                with self._lock:
                    self._requested.set()
                    if not self._polled:
                        self.leave()

    @contextlib.contextmanager
    def polled(self):
        """Inside, SIGTERM only sets `requested`: the body polls it and calls `leave`, or the end of the body does."""
        with self._lock:
            self._polled = True
        try:
            yield
        finally:
            with self._lock:
                self._polled = False
                if self.requested and sys.exception() is None:
                    self.leave()

    def leave(self) -> None:
        """Saves and ends the process with EXIT_CODE, or 1 if that fails, without unwinding the main thread."""
        try:
            self._finish()
            code, text = EXIT_CODE, f"leaving with exit code {EXIT_CODE}; the same command goes on from here"
        except BaseException:
            code, text = 1, f"{traceback.format_exc()}not saved; the same command goes on from the checkpoint before"
        with contextlib.suppress(OSError, ValueError):  # nobody reads our output any more
            print(f"\nSIGTERM: {text}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
