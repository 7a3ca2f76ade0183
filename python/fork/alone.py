"""Runs parts of the tests in processes of their own, which begin with the modules of
others that the engine imports: importing them takes longer than most files of tests.

    python -m fork.alone '[["test/one.py"], ["test/two.py"]]'

Each list is what pytest is called with.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

from fork.imports import import_all, share

# What a server and its scheduler import.
ENGINE = ["sglang.srt.entrypoints.http_server", "sglang.srt.managers.scheduler"]
AT_A_TIME = 2
OK = (0, 5)  # pytest's statuses: all passed; all are for a GPU


def main(parts: list[list[str]]) -> list[str]:
    """Runs pytest with each of these lists; returns the first argument of each that
    failed."""
    preload()
    failed, running, parts = [], {}, list(parts)
    with tempfile.TemporaryDirectory() as folder:
        while parts or running:
            if parts and len(running) < AT_A_TIME:
                part = parts.pop(0)
                output = Path(folder) / str(len(parts))
                running[_start(part, output)] = part[0], output, time.monotonic()
                continue
            pid, status = os.wait()
            name, output, started = running.pop(pid)
            sys.stdout.write(output.read_text("utf-8", errors="replace"))
            print(f"{name}: {time.monotonic() - started:.0f} s.", flush=True)
            if os.waitstatus_to_exitcode(status) not in OK:
                failed.append(name)
    return failed


def _start(part: list[str], output: Path) -> int:
    """Returns the process that runs one part."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            with open(output, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            import pytest

            status = pytest.main(["--durations=3", "--durations-min=10", *part])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # What the parent has yet to start, and to clean up, is not the child's.
            os._exit(status)
    return pid


def preload() -> None:
    """Imports what the engine does, but not the engine, in the order of conftest.py."""
    share(["torch"])
    torch = sys.modules.get("torch")
    environment = {}
    if torch is not None and not torch.cuda.is_available():
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            share(["triton.language"])
    with mock.patch.dict(os.environ, environment):
        _, loaded = import_all(ENGINE)
    share([name for name in loaded if name.split(".")[0] != "sglang"], "sglang")


if __name__ == "__main__":
    failed = main(json.loads(sys.argv[1]))
    sys.exit(f"error: tests failed: {', '.join(failed)}." if failed else 0)
