"""Where things are, and what a series says of itself."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from packaging.version import Version

from fork.errors import ForkError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


PREFIX = "python/sglang/"  # where upstream's repository has what a wheel has in sglang/
OUTSIDE = re.compile(rb'^diff --git (?!"?a/%s)' % PREFIX.encode(), re.MULTILINE)
NAME = re.compile("[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Patch:
    """What series.toml says of a patch.

    Attributes:
        tests: The paths of its tests, and of what only they need; a folder in
            series.toml stands for the Python files in it.
        result: The file in benchmark/gemma4/results that its figures are from, without
            its ending, or ``none``.
    """

    name: str
    topic: str
    upstream: str
    tests: tuple[str, ...]
    result: str


@dataclass(frozen=True)
class Project:
    """One release of upstream and the series on it.

    Attributes:
        python: The folder of pyproject.toml.
        series: The folder's name below patches/, such as ``v0.5.23``.
        version: The version of the distribution.
        pins: Requirement name to its new specifier, and the reason.
        entries: What series.toml says of the patches, in their order.
    """

    python: Path
    series: str
    version: Version
    pins: dict[str, dict[str, str]] = field(hash=False)
    entries: tuple[Patch, ...]

    @classmethod
    def load(cls, series: str | None = None, python: Path | None = None) -> Project:
        """Reads a series, the one that pyproject.toml names unless told another.

        Raises:
            ForkError: There is no such series, or its series.toml cannot be right.
        """
        python = python or Path(__file__).resolve().parents[1]
        if not series:
            series = _read(python / "pyproject.toml")["tool"]["fork"]["series"]
        # What is missing says where it was looked for.
        project = cls(python, series, Version("0"), {}, ())
        for path in (project.base, project.settings):
            if not path.is_file():
                raise ForkError(
                    f"{project.show(path)} is missing from {project.root}: name a "
                    f"series that is there ({', '.join(project.names())}), or take the "
                    "whole repository (pip before 21.3 copies python/ alone: update "
                    "it)."
                )
        try:
            told = _read(project.settings)
            patches = told.get("patch", [])
            entries = [_entry(entry, project.root) for entry in patches]
            version = Version(told["version"])
            pins = told.get("pins", {})
        except (TypeError, ValueError, LookupError) as error:
            raise ForkError(
                f"{project.show(project.settings)} cannot be read: {error!r}."
            ) from None
        return replace(project, version=version, pins=pins, entries=tuple(entries))

    def every(self) -> list[Project]:
        """Every series of the repository, this one too."""
        return [Project.load(name, self.python) for name in self.names()]

    def names(self) -> list[str]:
        """The names of the series."""
        found = (self.root / "patches").glob("*/base.txt")
        return sorted(path.parent.name for path in found)

    @property
    def root(self) -> Path:
        """The repository; in an sdist, where patches/ lies beside pyproject.toml,
        that folder."""
        return self.python if (self.python / "patches").exists() else self.python.parent

    @property
    def folder(self) -> Path:
        return self.root / "patches" / self.series

    @property
    def base(self) -> Path:
        return self.folder / "base.txt"

    @property
    def settings(self) -> Path:
        return self.folder / "series.toml"

    @property
    def tree(self) -> Path:
        return self.python / "sglang"

    @property
    def cache(self) -> Path:
        return self.root / ".cache"

    def patches(self) -> list[Path]:
        return sorted(self.folder.glob("*.patch"))

    def complete(self) -> bool:
        """Whether its patches hold their tests too, so that nothing of it is elsewhere.

        That is so of a series that is kept as it was released. What `make upstream`
        writes is such a series.
        """
        return any(OUTSIDE.search(patch.read_bytes()) for patch in self.patches())

    def patch_names(self) -> list[str]:
        """The names of the patches: what series.toml says, or what the files of a
        complete series say; none else, so that git makes them of the subjects."""
        if not self.entries and self.complete():
            return [patch.stem.partition("-")[2] for patch in self.patches()]
        return [entry.name for entry in self.entries]

    def base_digest(self) -> str:
        return hashlib.sha256(self.base.read_bytes()).hexdigest()

    def series_digest(self) -> str:
        digest = hashlib.sha256(self.base.read_bytes())
        for patch in self.patches():
            content = patch.read_bytes()
            digest.update(f"{patch.name} {len(content)}\n".encode() + content)
        return digest.hexdigest()

    def show(self, path: Path) -> str:
        """The path as one types it in the repository's root."""
        return str(path.relative_to(self.root))

    @contextlib.contextmanager
    def lock(self):
        """Held while python/sglang or patches/ is written."""
        self.cache.mkdir(exist_ok=True)
        with open(self.cache / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _read(path: Path) -> dict:
    return tomllib.loads(path.read_text("utf-8"))


def _entry(told: dict, root: Path) -> Patch:
    tests = [file for path in told["tests"] for file in _files(root, path)]
    entry = Patch(**{**told, "tests": tuple(tests)})
    strings = (entry.name, entry.topic, entry.upstream, entry.result, *entry.tests)
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"an empty or missing string in {told}")
    if not NAME.fullmatch(entry.name):
        raise ValueError(f"{entry.name} is no name like verify-split-kv")
    return entry


def _files(root: Path, path: str) -> list[str]:
    """The path itself, or of a folder the Python files in it."""
    found = sorted((root / path).rglob("*.py")) if (root / path).is_dir() else []
    return [f"{path}/{file.relative_to(root / path).as_posix()}" for file in found] or [
        path
    ]
