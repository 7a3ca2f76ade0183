"""Lists what is installed here, a line for each distribution: what a result's
`environment` is the sha256 of.

    python -m gemma4 report environment
"""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

PACKAGES = ("sglang", "torch", "triton", "transformers", "vllm", "flashinfer-python")


def arguments(parser) -> None:
    pass


def run(args) -> None:
    print(environment(), end="")


def command() -> str:
    """The command that runs, as others can type it."""
    return shlex.join(
        [Path(sys.executable).name, "-m", "gemma4", *map(_shown, sys.argv[1:])]
    )


def _shown(argument: str) -> str:
    """An argument as others can type it: relative to the repository, or to nothing."""
    option, equals, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return argument
    root = Path(__file__).resolve().parents[3]
    inside = path.is_relative_to(root)
    return f"{option}{equals}{path.relative_to(root) if inside else path.name}"


def commit() -> tuple:
    """The checkout's commit and whether tracked files differ; ("", False) without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = _output([*git, "rev-parse", "--short=12", "HEAD"])
        return head, bool(_output([*git, "status", "--porcelain", "-uno"]))
    except (OSError, subprocess.CalledProcessError):
        return "", False


def _output(command: List[str]) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout.strip()


def hardware() -> Dict[str, object]:
    found: Dict[str, object] = {"cpu": platform.machine(), "cores": os.cpu_count()}
    try:
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version",
            "--format=csv,noheader",
        ]
        gpus = [line.split(", ") for line in _output(query).splitlines()]
    except (OSError, subprocess.CalledProcessError):
        gpus = []
    if gpus:
        found.update(gpu=gpus[0][0], gpus=len(gpus), driver=gpus[0][1])
    return found


def versions() -> Dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return versions


def environment() -> str:
    """A line for each installed distribution, such as ``torch==2.11.0``, sorted."""
    found = set()
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # what a broken removal leaves has none
            name = re.sub(r"[-_.]+", "-", name).lower()
            found.add(f"{name}=={distribution.version}\n")
    return "".join(sorted(found))
