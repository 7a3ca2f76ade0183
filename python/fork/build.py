"""The PEP 517 and PEP 660 backend: the base's wheel, with the series in it."""

from __future__ import annotations

import email
import functools
import gzip
import io
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from email.policy import EmailPolicy
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from fork import base, series
from fork.errors import ForkError, UnexportedError
from fork.process import EPOCH, run_module, say
from fork.project import Project
from fork.tree import Tree

SERIES = re.compile(r'^series = ".*"', re.MULTILINE)
METADATA = EmailPolicy(utf8=True, max_line_length=0, refold_source="none")


def hook(function: Callable) -> Callable:
    """Ends the build with the sentence of a ForkError, not with its traceback."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except ForkError as error:
            sys.exit(f"error: {error}")
        except OSError as error:
            sys.exit(f"error: {error.strerror}: {error.filename}")

    return wrapped


def _project(config_settings: dict | None) -> Project:
    """The series that ``-C series=…`` names, or pyproject.toml."""
    return Project.load((config_settings or {}).get("series"))


@hook
def build_wheel(directory, config_settings=None, metadata_directory=None) -> str:
    project = _project(config_settings)
    with base.unpacked(project) as content:
        package = content / "sglang"
        series.patch_package(project, project.patches(), package)
        base.write_version(project.version, package)
        _write_metadata(project, content)
        return _pack(content, directory)


@hook
def build_editable(directory, config_settings=None, metadata_directory=None) -> str:
    project = _project(config_settings)
    try:
        Tree(project).checkout()
    except UnexportedError as error:
        say(f"note: installed as it is. {error}")
    with base.unpacked(project) as content:
        info = _write_metadata(project, content)
        for other in content.iterdir():
            if other != info:
                shutil.rmtree(other)
        path = content / f"__editable__.{info.stem}.pth"
        path.write_text(f"{project.python}\n", "utf-8")
        return _pack(content, directory)


@hook
def prepare_metadata_for_build_wheel(directory, config_settings=None) -> str:
    project = _project(config_settings)
    with base.unpacked(project) as content:
        info = _write_metadata(project, content)
        shutil.copytree(info, Path(directory) / info.name)
        return info.name


prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel


@hook
def build_sdist(directory, config_settings=None) -> str:
    project = _project(config_settings)
    name = f"sglang-{project.version}"
    with (
        gzip.GzipFile(Path(directory) / f"{name}.tar.gz", "w", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as sdist,
    ):

        def add(file: Path, inside: str) -> None:
            sdist.add(file, f"{name}/{inside}", filter=_anonymous)

        def write(content: bytes, inside: str) -> None:
            entry = tarfile.TarInfo(f"{name}/{inside}")
            entry.size = len(content)
            sdist.addfile(_anonymous(entry), io.BytesIO(content))

        # It has one series, so that is what it builds.
        settings = (project.python / "pyproject.toml").read_text("utf-8")
        settings = SERIES.sub(f'series = "{project.series}"', settings)
        write(settings.encode(), "pyproject.toml")
        for file in sorted((project.python / "fork").rglob("*.py")):
            add(file, str(file.relative_to(project.python)))
        for file in [project.base, project.settings, *project.patches()]:
            add(file, project.show(file))
        info = email.message_from_string("", policy=METADATA)
        info["Metadata-Version"] = "2.2"
        info["Name"] = "sglang"
        info["Version"] = str(project.version)
        for field in ("Requires-Dist", "Provides-Extra", "Requires-Python"):
            info["Dynamic"] = field
        write(info.as_bytes(), "PKG-INFO")
    return f"{name}.tar.gz"


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime = int(EPOCH)
    return entry


def _write_metadata(project: Project, content: Path) -> Path:
    """Gives an unpacked base our version and pins; returns its .dist-info."""
    (info,) = content.glob("*.dist-info")
    text = (info / "METADATA").read_text("utf-8")
    metadata = email.message_from_string(text, policy=METADATA)
    metadata.replace_header("Version", str(project.version))
    pins = {canonicalize_name(name): pin for name, pin in project.pins.items()}
    unused = set(pins)
    required = metadata.get_all("Requires-Dist", [])
    del metadata["Requires-Dist"]
    for line in required:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name in pins:
            requirement.specifier = SpecifierSet(pins[name]["specifier"])
            line = str(requirement)
            unused.discard(name)
        metadata["Requires-Dist"] = line
    if unused:
        raise ForkError(
            f"{project.show(project.settings)} pins {', '.join(sorted(unused))}, which "
            f"{base.requirement(project)} does not require: drop the pin."
        )
    (info / "METADATA").write_text(metadata.as_string(), "utf-8")
    return info.rename(content / f"sglang-{project.version}.dist-info")


def _pack(content: Path, directory: str) -> str:
    os.environ.setdefault("SOURCE_DATE_EPOCH", EPOCH)
    with tempfile.TemporaryDirectory(dir=directory) as packed:
        run_module("wheel", "pack", "--dest-dir", packed, content, cwd=content)
        (wheel,) = Path(packed).iterdir()
        wheel.replace(Path(directory) / wheel.name)
        return wheel.name
