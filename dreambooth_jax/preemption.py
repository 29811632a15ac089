"""SIGTERM: save and leave at once, whatever the main thread is doing.

A Python signal handler runs only between two bytecodes of the main thread, so a flag that the training loop polls is not
seen during a compile, while class images are painted, or in an evaluation. Here the signal wakes a thread of its own
through a file descriptor: outside the training loop that thread saves and exits; inside it (where the state's buffers
belong to the running call) it asks the loop, which looks after every call.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

EXIT_CODE = 128 + signal.SIGTERM  # 143: what a shell reports for a process ended by SIGTERM


class Preemption:
    """Watches for SIGTERM while used as a context manager in the main thread.

    Attributes:
        finish: called before leaving at once; the current phase sets it to whatever must still reach the disk.
        requested: whether SIGTERM came; the training loop polls it.
    """

    def __init__(self) -> None:
        self.finish: Callable[[], None] = lambda: None
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._polled = False

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def __enter__(self) -> "Preemption":
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        # The C-level handler writes the descriptor at once; the Python-level one has nothing left to do.
        self._old_handler = signal.signal(signal.SIGTERM, lambda *_: None)
        self._old_descriptor = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True, name="preemption").start()
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self._old_descriptor)
        signal.signal(signal.SIGTERM, self._old_handler)
        self._write.close()

    def _watch(self) -> None:
        while received := self._read.recv(16):
            if signal.SIGTERM not in received:
                continue
            with self._lock:
                self._event.set()
                if not self._polled:
                    self.leave()

    @contextlib.contextmanager
    def polled(self):
        """Inside, SIGTERM only sets `requested`: the body polls it and calls `leave`."""
        with self._lock:
            self._polled = True
        try:
            yield
        finally:
            with self._lock:
                self._polled = False

    def leave(self) -> None:
        """Runs `finish` and ends the process with EXIT_CODE, without unwinding the main thread."""
        try:
            self.finish()
            print(
                f"\nSIGTERM: saved; leaving with exit code {EXIT_CODE}. The same command goes on from here.",
                file=sys.stderr,
            )
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_CODE)
