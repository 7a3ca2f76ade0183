"""Where things are, and what pyproject.toml says of them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from packaging.version import Version

from fork.errors import ForkError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


@dataclass(frozen=True)
class Project:
    """One release of upstream and the series on it.

    Attributes:
        python: The folder of pyproject.toml.
        series: The folder's name below patches/, such as ``v0.5.12.post1``.
        version: The version of the distribution.
        pins: Requirement name to its new specifier, and the reason.
    """

    python: Path
    series: str
    version: Version
    pins: dict[str, dict[str, str]] = field(hash=False)

    @classmethod
    def load(cls, series: str | None = None, python: Path | None = None) -> Project:
        python = python or Path(__file__).resolve().parents[1]
        settings = tomllib.loads((python / "pyproject.toml").read_text("utf-8"))
        fork = settings["tool"]["fork"]
        project = cls(
            python,
            series or fork["series"],
            Version(settings["project"]["version"]),
            fork.get("pins", {}),
        )
        if not project.base.is_file():
            raise ForkError(
                f"{project.show(project.base)} is missing from {project.root}: "
                "name a series that is there, or take the whole repository (pip "
                "before 21.3 copies python/ alone: update it)."
            )
        return project

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
    def tree(self) -> Path:
        return self.python / "sglang"

    @property
    def cache(self) -> Path:
        return self.root / ".cache"

    def patches(self) -> list[Path]:
        return sorted(self.folder.glob("*.patch"))

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
