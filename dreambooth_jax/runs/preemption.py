"""SIGTERM: save and leave at once, whatever the main thread is doing.

A Python signal handler runs only between two bytecodes of the main thread, so a flag that the training loop polls is
not seen during a compile, while class images are painted, or in an evaluation. Here the signal wakes a thread of its
own through a file descriptor: outside the training loop that thread saves and exits; inside it (where the state's
buffers belong to the running call) it asks the loop, which looks after every call.

A save of several processes is made by all of them at the same step: they settle by `Agreement` when to leave.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dreambooth_jax.devices import runtime

EXIT_CODE = 128 + signal.SIGTERM  # 143: what a shell reports for a process ended by SIGTERM


class Preemption:
    """Watches for SIGTERM while used as a context manager in the main thread."""

    def __init__(self) -> None:
        self._finish: Callable[[], None] = lambda: None
        self._requested = threading.Event()
        # Held by whoever leaves: the main thread then waits here for the end instead of changing what is being saved.
        self._lock = threading.Lock()
        self._polled = 0

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
        """Inside, SIGTERM only sets `requested`: the body polls it and calls `leave`, or the end of the body does (the
        outermost, where one stands in another)."""
        with self._lock:
            self._polled += 1
        try:
            yield
        finally:
            with self._lock:
                self._polled -= 1
                if self.requested and not self._polled and sys.exception() is None:
                    self.leave()

    def leave(self) -> None:
        """Saves and ends the process with EXIT_CODE, or 1 if that fails, without unwinding the main thread."""
        try:
            self._finish()
            code, text = EXIT_CODE, f"leaving with exit code {EXIT_CODE}; the same command goes on from here"
        except BaseException:
            code, text = 1, f"{traceback.format_exc()}not saved; the same command goes on from the checkpoint before"
        if not runtime.is_alone() and runtime.is_first_process():
            time.sleep(1)  # the others end with an error of their own when the coordinator is gone before them
        with contextlib.suppress(OSError, ValueError):  # nobody reads our output any more
            print(f"\nSIGTERM: {text}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class Agreement:
    """Settles, without waiting for anybody, after which call all processes leave.

    Each process tells after every call whether it was asked to leave; what all of them told is computed behind the call
    and read after the next one, when it is there, by all processes alike.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._flags = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._shape = (mesh.size,)
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._earlier: jax.Array | None = None

    def __call__(self, requested: bool) -> bool:
        """Whether to leave now; a single process leaves when it is asked."""
        if runtime.is_alone():
            return requested
        flags = jax.make_array_from_callback(self._shape, self._flags, lambda index: np.full(1, requested))
        earlier, self._earlier = self._earlier, self._any(flags)
        return earlier is not None and bool(earlier)
