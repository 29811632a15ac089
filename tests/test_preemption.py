"""SIGTERM is answered whatever the main thread does, once, and with the state on the disk."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

BEGIN = """
import os, signal, sys, threading, time
from dreambooth_jax.runs.preemption import Preemption

for ignored in (signal.SIGHUP, signal.SIGTERM):  # by who started the tests: nohup, a service
    signal.signal(ignored, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

def say(text):
    print(text, flush=True)

def terminate(times=1, number=signal.SIGTERM):
    for _ in range(times):
        os.kill(os.getpid(), number)
        time.sleep(0.05)
"""


def run(body: str, **kw) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", BEGIN + textwrap.dedent(body)],
        cwd=Path(__file__).parent.parent,
        text=True,
        timeout=20,
        **{"capture_output": True} | kw,
    )


def test_leaves_while_the_main_thread_is_in_c_code():
    began = time.monotonic()
    done = run("""
        import hashlib
        with Preemption() as guard:
            guard.before_leaving(lambda: say("saved"))
            threading.Timer(0.2, terminate).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)
            say("not reached")
    """)
    assert (done.returncode, done.stdout) == (143, "saved\n")
    assert "exit code 143" in done.stderr and time.monotonic() - began < 5


def test_in_the_loop_it_waits_for_the_body():
    done = run("""
        with Preemption() as guard:
            guard.before_leaving(lambda: say("saved"))
            with guard.in_loop():
                terminate(3)
                say(guard.requested)
                guard.leave()
    """)
    assert (done.returncode, done.stdout) == (143, "True\nsaved\n")


def test_a_signal_after_the_last_poll_is_not_lost():
    done = run("""
        with Preemption() as guard:
            guard.before_leaving(lambda: say("saved"))
            with guard.in_loop():
                say(guard.requested)
                terminate()
            say("not reached")
    """)
    assert (done.returncode, done.stdout) == (143, "False\nsaved\n")


def test_an_error_in_the_body_goes_before_a_signal():
    done = run("""
        with Preemption() as guard:
            guard.before_leaving(lambda: say("saved"))
            with guard.in_loop():
                terminate()
                raise FloatingPointError("loss nan")
    """)
    assert done.returncode == 1 and done.stdout == "" and "loss nan" in done.stderr


@pytest.mark.parametrize("in_loop", [True, False])
def test_many_signals_save_once(in_loop):
    done = run(f"""
        def finish():
            say("begin")
            terminate(5)
            say("end")

        with Preemption() as guard:
            guard.before_leaving(finish)
            if {in_loop}:
                with guard.in_loop():
                    terminate(2)
            else:
                terminate(2)
                time.sleep(20)
    """)
    assert (done.returncode, done.stdout) == (143, "begin\nend\n")


def test_while_one_thread_saves_the_other_changes_nothing():
    done = run("""
        def finish():
            terminate()
            time.sleep(0.5)
            say("saved")

        with Preemption() as guard:
            guard.before_leaving(finish)
            threading.Timer(0.1, terminate).start()
            time.sleep(0.3)
            guard.before_leaving(lambda: say("something else"))
            say("not reached")
    """)
    assert (done.returncode, done.stdout) == (143, "saved\n")


def test_at_the_end_of_the_watch_it_waits_for_who_leaves():
    done = run("""
        def finish():
            time.sleep(0.5)
            say("saved")

        with Preemption() as guard:
            guard.before_leaving(finish)
            terminate()
        say("not reached")
    """)
    assert (done.returncode, done.stdout) == (143, "saved\n")


def test_a_save_that_fails_is_told_and_is_no_143():
    done = run("""
        def finish():
            raise OSError(28, "No space left on device")

        with Preemption() as guard:
            guard.before_leaving(finish)
            terminate()
            time.sleep(20)
    """)
    assert done.returncode == 1 and "No space left" in done.stderr and "not saved" in done.stderr


def test_nobody_needs_to_listen():
    done = run("""
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = sys.stderr = open(writer, "w")
        with Preemption() as guard:
            terminate()
            time.sleep(20)
    """)
    assert done.returncode == 143


def test_afterwards_sigterm_is_what_it_was():
    done = run("""
        with Preemption():
            pass
        terminate()
        say("not reached")
    """)
    assert (done.returncode, done.stdout) == (-15, "")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGHUP", 129), ("SIGTERM", 143)])
def test_ctrl_c_and_a_closed_terminal_save_too(name, code):
    done = run(f"""
        with Preemption() as guard:
            guard.before_leaving(lambda: say("saved"))
            terminate(number=signal.{name})
            time.sleep(20)
    """)
    assert (done.returncode, done.stdout) == (code, "saved\n") and f"{name}: leaving with" in done.stderr


def test_a_signal_that_was_ignored_stays_ignored():
    """nohup ignores SIGHUP."""
    done = run("""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Preemption() as guard:
            terminate(number=signal.SIGHUP)
            time.sleep(0.5)
            say("went on")
    """)
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_what_is_deferred_leaves_at_the_end_or_by_itself():
    done = run("""
        with Preemption() as guard:
            guard.before_leaving(lambda: say("saved"))
            with guard.deferred():
                with guard.in_loop():
                    terminate()
                time.sleep(0.3)
                say("still there")
            say("not reached")
    """)
    assert (done.returncode, done.stdout) == (143, "still there\nsaved\n")
