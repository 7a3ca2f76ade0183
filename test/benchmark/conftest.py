"""Where the package is, for these tests and what they start; and its refusals."""

import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmark")
sys.path.insert(0, BENCHMARKS)
os.environ["PYTHONPATH"] = os.pathsep.join(
    [BENCHMARKS, *filter(None, [os.environ.get("PYTHONPATH")])]
)


@pytest.fixture
def refused(capsys):
    """Runs a command that has to fail; returns its one sentence."""

    def refused(name: str, *arguments: str, status: int = 1) -> str:
        from gemma4.cli import main

        assert main([*name.split(), *arguments]) == status
        said = capsys.readouterr().err.strip()
        assert said.startswith(f"gemma4 {name}: ") and "\n" not in said
        return said

    return refused
