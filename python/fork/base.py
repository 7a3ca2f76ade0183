"""Fetches, checks and unpacks the upstream wheel that a series is based on."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.tags import Tag, sys_tags
from packaging.utils import parse_wheel_filename
from packaging.version import Version

from fork.errors import ForkError
from fork.process import last_line, run, run_module, say
from fork.project import Project

OFFLINE = re.compile(
    "connection broken|Max retries exceeded|Failed to establish|Name or service not"
    "|name resolution|timed out|ProxyError|SSLError|Could not fetch URL",
    re.IGNORECASE,
)
# What differs between the wheels of one release, or states its version: never in git.
GENERATED = ("*.so", "_version.py")


def requirement(project: Project) -> str:
    """The release, such as ``sglang==0.5.12.post1``."""
    for line in project.base.read_text("utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            return line.split()[0]
    raise ForkError(f"{project.show(project.base)} names no release.")


def is_installed(project: Project) -> bool:
    """Whether this Python has the release that a series is on, or the fork of it."""
    try:
        found = Version(metadata.version("sglang"))
    except metadata.PackageNotFoundError:
        return False
    return found.public == requirement(project).split("==")[1]


def installed() -> Project:
    """The series that the environment of this Python is for.

    Raises:
        ForkError: It is for none.
    """
    for project in Project.load().every():
        if is_installed(project):
            return project
    raise ForkError(f"{sys.executable} has no release of patches/: run `make env`.")


def wheels(project: Project) -> list[str]:
    """The file names of the release's wheels."""
    return re.findall(r"^#\s*(\S+\.whl)\s*$", project.base.read_text("utf-8"), re.M)


def _tags(project: Project) -> frozenset[Tag]:
    return frozenset().union(*(parse_wheel_filename(w)[3] for w in wheels(project)))


def check_python(project: Project) -> None:
    """Raises ForkError if the release has no wheel for this Python or platform."""
    tags = _tags(project)
    if tags and tags.isdisjoint(sys_tags()):
        pythons = ", ".join(sorted({tag.interpreter for tag in tags}))
        platforms = ", ".join(sorted({tag.platform for tag in tags}))
        raise ForkError(
            f"{requirement(project)} has no wheel for this interpreter, "
            f"{platform.python_implementation()} {platform.python_version()} on "
            f"{platform.system()} {platform.machine()} ({sys.executable}); use one "
            f"that a wheel is made for: {pythons} on {platforms}."
        )


def fetch(project: Project, sources: bool = False) -> Path:
    """Returns the wheel of the base for this Python, checked against its sha256.

    It is downloaded once, and then taken from the repository's cache.

    Args:
        sources: Another Python's will do, as it has the same sources.

    Raises:
        ForkError: No wheel for this Python, no network, or not the pinned content.
    """
    tags = _tags(project)
    ours = not sources or not tags.isdisjoint(sys_tags())
    if ours:
        check_python(project)
    cache = project.cache / "base"
    cache.mkdir(parents=True, exist_ok=True)
    for name in wheels(project):
        path = cache / name
        fits = sources or not parse_wheel_filename(name)[3].isdisjoint(sys_tags())
        if fits and path.is_file() and _sha256(path) in project.base.read_text("utf-8"):
            return path
    target = []
    if not ours:
        tag = min(parse_wheel_filename(wheels(project)[0])[3], key=str)
        version = re.sub(r"^\D+(\d)", r"\1.", tag.interpreter)
        target += ["--implementation", "cp", "--python-version", version]
        target += ["--abi", tag.abi, "--platform", tag.platform]
    with tempfile.TemporaryDirectory(dir=cache) as fresh:
        say(f"Fetching {requirement(project)} ...")
        done = run(
            [sys.executable, "-m", "pip", "--disable-pip-version-check"]
            + ["download", "--no-input", "--progress-bar", "off", "--no-deps"]
            + ["--require-hashes", "--only-binary", ":all:", "--dest", fresh]
            + [*target, "--retries", "2", "--requirement", str(project.base)],
            cwd=cache,
        )
        if done.returncode:
            raise ForkError(_explain(project, done))
        (wheel,) = Path(fresh).glob("*.whl")
        return wheel.replace(cache / wheel.name)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _explain(project: Project, done) -> str:
    said, name = done.stdout + done.stderr, requirement(project)
    if "DO NOT MATCH THE HASHES" in said:
        return (
            f"The {name} that pip was given is not the one that "
            f"{project.show(project.base)} pins by its sha256: nothing was installed; "
            "see which index or mirror pip uses (`pip config list`)."
        )
    if OFFLINE.search(said):
        return (
            f"{name} could not be downloaded, as the package index does not answer: "
            "see that the network is up and run again."
        )
    if "No matching distribution found" in said:
        return (
            f"The package index that pip uses has no wheel of {name} for this Python: "
            "see which index it is (`pip config list`)."
        )
    if "No module named pip" in said:
        return f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip`."
    return f"pip could not download {name}: {last_line(done)}"


@contextlib.contextmanager
def unpacked(project: Project, sources: bool = False) -> Iterator[Path]:
    """Yields a temporary folder with what the base's wheel holds, see `fetch`."""
    wheel = fetch(project, sources)
    with tempfile.TemporaryDirectory(prefix="sglang-base-") as folder:
        run_module("wheel", "unpack", "--dest", folder, wheel, cwd=Path(folder))
        (content,) = Path(folder).iterdir()
        yield content


def write_version(version: Version, package: Path) -> None:
    """Makes ``sglang.__version__`` the version of the distribution, as upstream's
    build does with the same file."""
    parts = [*version.release]
    parts += [f"post{version.post}"] if version.post is not None else []
    parts += [f"dev{version.dev}"] if version.dev is not None else []
    parts += [version.local] if version.local else []
    text = (
        f"__version__ = version = {str(version)!r}\n"
        f"__version_tuple__ = version_tuple = {tuple(parts)!r}\n"
        "__commit_id__ = commit_id = None\n"
    )
    path = package / "_version.py"
    if not path.exists() or path.read_text("utf-8") != text:
        path.write_text(text, "utf-8")
