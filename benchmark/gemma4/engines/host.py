"""This machine: its folders, its GPU, and who may listen at a port."""

import ctypes
import functools
import os
import socket
from pathlib import Path
from typing import Dict, List

from gemma4.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
BENCHMARKS = PACKAGE.parent
CACHE = BENCHMARKS.parent / ".cache"
HOST = "127.0.0.1"
LAST_PORT = 55535  # SGLang takes the port 10000 above, too
# Of a real checkpoint, with its kernels built for the first time.
START_SECONDS = 900
# The tiny model's context many times over; without it the pool takes most of the RAM.
TINY_POOL_TOKENS = 65536


@functools.cache
def has_gpu() -> bool:
    """Whether there is a GPU; it needs no torch, which takes seconds to import."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


def check_port(port: int) -> None:
    """Raises UserError unless a server can listen there."""
    if not 1 <= port <= LAST_PORT:
        raise UserError(f"Port {port} is none that SGLang takes: 1 to {LAST_PORT}.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise UserError(
                f"Port {port} of {HOST} is in use: stop what listens there, or name "
                "another (--port, or PORT= of make)."
            ) from None


def inherited_path() -> List[str]:
    """The folders of this process's PYTHONPATH, wherever a child is started."""
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [os.path.abspath(folder) for folder in path if folder]


def own_environment() -> Dict[str, str]:
    """For a process of this Python that imports this package and serves nothing."""
    path = os.pathsep.join([str(BENCHMARKS), *inherited_path()])
    return {**os.environ, **offline(), "PYTHONPATH": path}


def offline() -> Dict[str, str]:
    """What keeps Hugging Face's libraries from the network."""
    env = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return env if has_gpu() else {**env, "SGLANG_USE_CPU_ENGINE": "1"}
