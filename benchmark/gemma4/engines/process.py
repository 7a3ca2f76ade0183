"""A process, which is ended with all that it started, whatever ends this one."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
import types
from collections.abc import Iterator
from typing import List

# A signal that comes while a process is started: Python drops what a handler raises in
# the functions that it runs around a fork.
SPAWNING = types.SimpleNamespace(now=False, interrupted=False)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes a KeyboardInterrupt of every signal that ends a program."""

    def interrupt(signum, frame):
        if SPAWNING.now:
            SPAWNING.interrupted = True
        else:
            raise KeyboardInterrupt

    signums = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(signum, interrupt) for signum in signums]
    try:
        yield
    finally:
        for signum, handler in zip(signums, before):
            signal.signal(signum, handler)


def _die_with_parent() -> None:
    # Whatever ends this process, SIGKILL too, ends its servers.
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def spawn(command: List[str], **kwargs) -> subprocess.Popen:
    SPAWNING.now = True
    try:
        process = subprocess.Popen(
            command, start_new_session=True, preexec_fn=_die_with_parent, **kwargs
        )
    finally:
        SPAWNING.now = False
    if SPAWNING.interrupted:
        stop(process)
        raise KeyboardInterrupt
    return process


def stop(process: subprocess.Popen) -> None:
    """Ends a process with all that it started."""
    try:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(15)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 15
        while _group_lives(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
        return True
    except ProcessLookupError:
        return False
