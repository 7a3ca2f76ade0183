"""The commands as programs, and what they started."""

import os
import subprocess
import sys
from pathlib import Path


def start(*arguments, mark="", cwd=None) -> subprocess.Popen:
    """`python -m gemma4` with these arguments; what it starts inherits the mark."""
    return subprocess.Popen(
        [sys.executable, "-m", "gemma4", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "GEMMA4_TEST_MARK": str(mark)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments, **kwargs) -> subprocess.CompletedProcess:
    running = start(*arguments, **kwargs)
    out, err = running.communicate(timeout=600)
    return subprocess.CompletedProcess(arguments, running.returncode, out, err)


def marked(mark) -> list:
    """The processes that inherited this mark, however they were started."""
    sought, found = f"GEMMA4_TEST_MARK={mark}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if sought in (process / "environ").read_bytes():
                found.append(process)
        except OSError:
            pass  # it ended meanwhile, or is another user's
    return found
