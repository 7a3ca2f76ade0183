"""Kernels that are read from their files alone, beside the installed ones."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path
from types import ModuleType
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
import triton
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


def of_peer(
    name: str, file: str, functions: Sequence[str], sites: List[str]
) -> Optional[Tuple[str, ModuleType]]:
    """(version, module of these functions alone) of a distribution's first copy in
    `sites`, or here, that has this file; None, and a line that says so, if none has.

    The package, which may need what is not here, is not imported.
    """
    versions = []
    path = [*sites, *sys.path]
    for found in importlib.metadata.Distribution.discover(name=name, path=path):
        versions.append(found.version)
        source = Path(found.locate_file(file))
        if source.exists():
            tree = ast.parse(source.read_text())
            tree.body = [n for n in tree.body if getattr(n, "name", "") in functions]
            module = types.ModuleType(f"{name}_kernels")
            vars(module).update(torch=torch, triton=triton, tl=triton.language)
            sys.modules[module.__name__] = module
            exec(compile(tree, str(source), "exec"), vars(module))
            return found.version, module
    reason = f"{versions[0]} has no {file}" if versions else "is not installed"
    print(f"{name} {reason}: skipped")
    return None
