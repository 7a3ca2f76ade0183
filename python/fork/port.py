"""What a newer release of upstream does to the series: a report, patch by patch."""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import parse_wheel_filename
from packaging.version import InvalidVersion, Version

from fork import base, series
from fork.ci.watch import Hunk, Report, Verdict
from fork.errors import ForkError, PatchError
from fork.process import AUTHOR, EPOCH, Git, last_line, run, run_module, say
from fork.project import Project
from fork.series import BASE, PREFIX
from fork.upstream import repository

OLDER = "refs/fork/older"
NEWER = "refs/fork/newer"


@dataclass
class Piece:
    """One hunk of a patch, or all of a file that is added, removed or binary.

    Attributes:
        text: A patch of it alone.
        found: What is said of it.
    """

    file: str
    text: str
    found: Hunk


def newest(project: Project, release: str = "") -> tuple[Version, Path]:
    """Fetches a release of upstream, the newest if none is named.

    Returns its version and the path of its wheel in the repository's cache.

    Raises:
        ForkError: There is no such release, or no network.
    """
    name = base.requirement(project).split("==")[0]
    try:
        wanted = f"{name}=={Version(release)}" if release else name
    except InvalidVersion:
        raise ForkError(
            f"--to {release} is no version: say one such as 0.5.23."
        ) from None
    cache = project.cache / "releases"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as fresh:
        say(f"Fetching {wanted} ...")
        done = run(
            [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
            + ["--no-input", "--progress-bar", "off", "--retries", "2", "--no-deps"]
            + ["--only-binary", ":all:", "--dest", fresh, wanted],
            cwd=cache,
        )
        if done.returncode:
            raise ForkError(
                f"{wanted} could not be fetched: {last_line(done)} See that the index "
                "has it, for this Python, and answers."
            )
        (wheel,) = Path(fresh).glob("*.whl")
        return parse_wheel_filename(wheel.name)[1], wheel.replace(cache / wheel.name)


def port(project: Project, wheel: Path) -> list[Verdict]:
    """Applies the series to another release, each patch on what the last ones left.

    Of a patch that conflicts the hunks that fit are kept, for those that follow.
    """
    with _both(project, wheel) as git:
        return [_try(project, git, patch) for patch in project.patches()]


@contextlib.contextmanager
def _both(project: Project, wheel: Path) -> Iterator[Git]:
    """Yields a repository at the newer release, that knows the files of the series
    too: a three-way merge needs them."""
    with repository(project) as git, tempfile.TemporaryDirectory() as folder:
        series.am(git, project.patches())
        run_module("wheel", "unpack", "--dest", folder, wheel, cwd=Path(folder))
        (content,) = Path(folder).iterdir()
        tree = content / "tree"
        (tree / PREFIX).parent.mkdir(parents=True)
        (content / "sglang").rename(tree / PREFIX)
        git("update-ref", OLDER, BASE)
        series.commit_base(git, project, tree)
        git("update-ref", NEWER, BASE)
        git("checkout", "--quiet", "--force", "--detach", NEWER)
        yield git


def _try(project: Project, git: Git, patch: Path) -> Verdict:
    text = patch.read_text("utf-8", "surrogateescape")
    number, _, name = patch.stem.partition("-")
    named = name in [entry.name for entry in project.entries]
    told = Verdict(name if named else number, series.subject(patch), "applies")
    start = git.commit("HEAD")
    for options, verdict in ([], "applies"), (["--3way"], "merges"):
        try:
            series.am(git, [patch], *options)
        except PatchError:
            with contextlib.suppress(ForkError):
                git("am", "--abort")
            git("reset", "--quiet", "--hard", start)
            git("clean", "--quiet", "--force", "-d")
        else:
            moved = git.commit("HEAD") != start
            told.verdict = verdict if moved else "upstream"
            return told
    for piece in pieces(text):
        _try_piece(git, piece)
        told.hunks.append(piece.found)
    if all(hunk.state == "upstream" for hunk in told.hunks):
        told.verdict = "upstream"
        return told
    told.verdict = "conflicts"
    dated = {**AUTHOR, "GIT_AUTHOR_DATE": f"{EPOCH} +0000"}
    git("add", "--all")  # what fits, for the patches that follow
    git("commit", "--quiet", "--allow-empty", "--message", told.subject, **dated)
    return told


def _try_piece(git: Git, piece: Piece) -> None:
    """Applies a hunk if it fits; says what it is else."""
    text, found = {"input": piece.text}, piece.found
    if not git.run("apply", "--reverse", "--check", "-", **text).returncode:
        found.state = "upstream"
    elif not git.run("apply", "-", **text).returncode:
        found.state = "fits"
    elif not (git.folder / piece.file).exists():
        name = piece.file.rsplit("/", 1)[-1]
        files = git.names("ls-tree", "-r", "-z", "--name-only", NEWER)
        found.quoted = [path for path in files if path.endswith(f"/{name}")][:3]
        found.state = "moved" if found.quoted else "gone"
    elif "@@" not in piece.text or "\n@@ -0,0 " in piece.text:
        found.state = "there"
    else:
        old = _lines(git("show", f"{OLDER}:{piece.file}"))
        new = _lines((git.folder / piece.file).read_text("utf-8", "surrogateescape"))
        body = piece.text[piece.text.index("\n@@ ") + 1 :].splitlines()[1:]
        added = _lines("\n".join(ln[1:] for ln in body if ln[:1] == "+"))
        before = [ln for sign in "- " for ln in body if ln[:1] == sign]
        gone = [ln[1:].strip() for ln in before if ln[1:].strip() not in {*new, ""}]
        if added and _has(new, added) and not _has(old, added):
            found.state = "upstream"
        elif gone:
            found.state, found.quoted = "changed", gone[:1]
        else:
            found.state = "apart"


def _lines(text: str) -> list[str]:
    """The lines that are not empty, without their indentation."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def _has(lines: list[str], block: list[str]) -> bool:
    """Whether the lines of a block follow each other somewhere."""
    size = len(block)
    return any(lines[i : i + size] == block for i in range(len(lines) - size + 1))


def pieces(patch: str) -> list[Piece]:
    """Takes a patch apart."""
    found = []
    for part in re.split(r"^(?=diff --git )", patch, flags=re.MULTILINE)[1:]:
        head, *bodies = re.split(r"^(?=@@ )", part, flags=re.MULTILINE)
        file = re.match(r"diff --git a/\S+ b/(\S+)", head)[1]
        new = re.search(r"^(new|deleted) file mode", head, re.MULTILINE)
        if new or not bodies:
            what = {"new": "added", "deleted": "removed"}[new[1]] if new else "binary"
            found.append(Piece(file, part, Hunk(f"{file} ({what})")))
            continue
        for body in bodies:
            line, inside = re.match(r"@@ -(\d+)\S* \S+ @@ ?(.*)", body).groups()
            said = Hunk(f"{file}:{line}", inside.strip())
            # What follows the last hunk of a mail is no part of it.
            body = re.sub(r"\n-- \n.*", "\n", body, flags=re.DOTALL)
            found.append(Piece(file, head + body, said))
    return found


def report(project: Project, release: str = "") -> Report:
    """Says what a release of upstream does to the series, the newest if none is named.

    Raises:
        ForkError: There is no such release, or no network.
    """
    version, wheel = newest(project, release)
    ours = Version(base.requirement(project).split("==")[1])
    return Report(str(ours), str(version), version > ours, port(project, wheel))
