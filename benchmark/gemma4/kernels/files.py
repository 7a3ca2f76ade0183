"""Kernels that are read from their files alone, beside the installed ones."""

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Optional

from gemma4.engines.arms import release
from gemma4.engines.host import BENCHMARKS
from gemma4.errors import UserError

CHECKOUT = BENCHMARKS.parent / "python"


class Kernel(NamedTuple):
    """A file of kernels; what it imports comes from this Python."""

    module: ModuleType
    sha256: str


def load(path: Path, function: str = "") -> Kernel:
    """The kernels of a file, which has to have this function.

    Raises:
        UserError: There is no such file, or no such function in it.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: name the folder that holds sglang/.")
    name = f"kernels_{len(sys.modules)}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    if function and not hasattr(module, function):
        raise UserError(f"{path} has no {function}: is the series applied?")
    return Kernel(module, hashlib.sha256(path.read_bytes()).hexdigest())


def of_fork(file: str, path: Optional[Path] = None) -> Path:
    """Where the fork's `file` is, such as sglang/kernels/…: at `path`, in the checkout,
    or installed."""
    if path:
        return path
    found = importlib.util.find_spec("sglang")
    if (CHECKOUT / file).exists() or not found:
        return CHECKOUT / file
    return Path(found.origin).parents[1] / file


def of_base(file: str, folder: Optional[Path] = None) -> Path:
    """Where the release's `file` is: in `folder`, or in the release as it is unpacked
    into the cache."""
    return (folder or release()) / file
