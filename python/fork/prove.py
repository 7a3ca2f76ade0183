"""Proves of each patch that its tests fail without it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from fork import base, series
from fork.errors import ForkError
from fork.process import AUTHOR, Git, say
from fork.project import PREFIX, Patch, Project
from fork.series import BASE
from fork.upstream import check_entries, repository

SECONDS = 1800  # of one run of a patch's tests; without the patch one may hang
NO_TESTS = 5  # pytest's exit status
REASONS = {  # why a patch is not proved
    "fails": "its tests fail with the series",
    "passes": "its tests pass without it",
    "none": "none of its tests can run here",
}


@dataclass(frozen=True)
class Outcome:
    """How tests ended.

    Attributes:
        failed: Failures and errors, of which a run that died or took too long is one.
    """

    passed: int
    failed: int
    skipped: int


@dataclass(frozen=True)
class Proof:
    """How the tests of a patch ended with and without it.

    Attributes:
        alone: Whether the tree without it is the series but for this patch; it is the
            patches before it where git cannot take it out alone.
    """

    name: str
    with_it: Outcome
    without: Outcome | None
    alone: bool

    @property
    def reason(self) -> str:
        """Why it is none, a key of REASONS; nothing if it is one."""
        if self.with_it.failed:
            return "fails"
        if not self.with_it.passed:
            return "none"
        return "" if self.without.failed else "passes"


def changed(project: Project, since: str) -> list[str]:
    """The names of the patches that are not as they were at a commit of the
    repository, or whose tests are not."""
    files = set(Git(project.root).names("diff", "--name-only", "-z", since, "--"))
    return [
        entry.name
        for entry, patch in zip(project.entries, project.patches())
        if files & {project.show(patch), *entry.tests}
    ]


def prove(project: Project, chosen: Sequence[str] | None = None) -> list[Proof]:
    """Runs each patch's tests with the whole series, where they have to pass, and with
    the patch taken out of it, where one of them has to fail.

    What they print is in dist/prove/, and what was proved: a patch that is there, and
    has not changed since, nor its tests, is not proved again.

    Args:
        chosen: The names of the patches that are proved, all of them unless given.

    Raises:
        ForkError: There is no such patch, or this Python cannot run the tests.
    """
    check_entries(project)
    names = [entry.name for entry in project.entries]
    chosen = names if chosen is None else chosen
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise ForkError(
            f"{project.show(project.settings)} names no patch {', '.join(unknown)}, "
            f"but {', '.join(names) or 'none at all'}."
        )
    if not chosen:
        return []
    logs = project.root / "dist" / "prove"
    logs.mkdir(parents=True, exist_ok=True)
    proofs = []
    with repository(project, sources=False) as git:
        base.write_version(project.version, git.folder / PREFIX)
        series.am(git, project.patches())
        commits = git.lines("rev-list", "--reverse", f"{BASE}..HEAD")
        without = _worktree(git)
        for tree in (git, without):
            _check_imported(tree)
        for entry, patch, commit in zip(project.entries, project.patches(), commits):
            if entry.name not in chosen:
                continue
            kept = logs / f"{entry.name}.json"
            digest = _digest(project, entry, patch)
            proof = _read(kept, digest)
            if proof is None:
                log = logs / f"{entry.name}.log"
                log.write_text("")
                proof = _prove(project, entry, log, git, without, commit)
                if not proof.reason:
                    text = json.dumps({"of": digest, **dataclasses.asdict(proof)})
                    kept.write_text(text + "\n")
            proofs.append(proof)
    return proofs


def _digest(project: Project, entry: Patch, patch: Path) -> str:
    """What a patch and its tests are, on a base."""
    digest = hashlib.sha256()
    for path in (project.base, patch, *(project.root / test for test in entry.tests)):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _read(kept: Path, digest: str) -> Proof | None:
    """A proof that was kept, of what has this digest."""
    found = json.loads(kept.read_text()) if kept.exists() else {}
    if found.pop("of", None) != digest:
        return None
    for key in ("with_it", "without"):
        found[key] = Outcome(**found[key])
    return Proof(**found)


def _prove(
    project: Project, entry: Patch, log: Path, git: Git, without: Git, commit: str
) -> Proof:
    found = _run(project, git, entry, log, "with it", [])
    if found.failed or not found.passed:
        return Proof(entry.name, found, None, True)
    alone = _take_out(without, git.commit("HEAD"), commit)
    place = "without it" if alone else "with the patches before it"
    # One failure proves it; each test behind it may wait for a timeout.
    missed = _run(project, without, entry, log, place, ["--exitfirst"])
    return Proof(entry.name, found, missed, alone)


def _worktree(git: Git) -> Git:
    """Makes a second worktree at HEAD, with the compiled modules of the first."""
    other = Git(git.folder.parent / "without")
    git("worktree", "add", "--quiet", "--detach", other.folder, "HEAD")
    for name in base.GENERATED:
        for file in git.folder.rglob(name):
            copy = other.folder / file.relative_to(git.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, copy)
    return other


def _take_out(git: Git, whole: str, commit: str) -> bool:
    """Writes the series without one patch; returns whether that went alone."""
    before = git.commit("HEAD")
    git("reset", "--quiet", "--hard", whole)
    alone = not git.run("revert", "--no-edit", commit, **AUTHOR).returncode
    if not alone:
        git("reset", "--quiet", "--hard", f"{commit}~")
    for path in git.names("diff", "--name-only", "-z", before, "HEAD"):
        # Python takes what it compiled for fresh, of a file of one size and second.
        file = git.folder / path
        for compiled in file.parent.glob(f"__pycache__/{file.stem}.*.pyc"):
            compiled.unlink()
    return alone


def _environment(git: Git) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(git.folder / "python")}


def _check_imported(git: Git) -> None:
    code = "from importlib.util import find_spec as s; print(s('sglang').origin)"
    command = [sys.executable, "-c", code]
    kwargs = {"env": _environment(git), "cwd": git.folder, "text": True}
    found = subprocess.run(command, capture_output=True, **kwargs).stdout.strip()
    if not Path(found or "nowhere").is_relative_to(git.folder):
        raise ForkError(
            f"{sys.executable} imports sglang from {found or 'nowhere'}, not from where "
            "PYTHONPATH says: the tests would prove nothing."
        )


def _run(
    project: Project, git: Git, entry: Patch, log: Path, place: str, options: list[str]
) -> Outcome:
    """Runs the tests of a patch with the sglang of a repository, and pytest's options."""
    say(f"{entry.name}, its tests {place} ...")
    with tempfile.TemporaryDirectory() as folder, open(log, "a") as output:
        print(f"=== {entry.name}: its tests {place}", file=output, flush=True)
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
        tests = [test for test in entry.tests if fnmatch(test, "*/test_*.py")]
        command += [f"--junitxml={report}", *tests]
        process = subprocess.Popen(
            command,
            cwd=project.root,
            env=_environment(git),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            print(f"=== more than {SECONDS} s", file=output)
            return Outcome(0, 1, 0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if status == NO_TESTS:
            return Outcome(0, 0, 0)
        if status not in (0, 1, 2) or not report.exists():
            print(f"=== pytest died, status {status}", file=output)
            return Outcome(0, 1, 0)
        (suite,) = xml.parse(report).getroot().iter("testsuite")
        ran, failures, errors, skipped = (
            int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")
        )
        failed = failures + errors
        return Outcome(max(ran - failed - skipped, 0), failed, skipped)


def table(proofs: list[Proof]) -> str:
    """What was proved, in Markdown."""
    lines = [
        "| patch | pass with it | fail without it | |",
        "| --- | ---: | --- | --- |",
    ]
    for proof in proofs:
        notes = [REASONS[proof.reason]] if proof.reason else []
        notes += [f"{proof.with_it.failed} fail with it"] * bool(proof.with_it.failed)
        notes += [f"{proof.with_it.skipped} skipped"] * bool(proof.with_it.skipped)
        if not proof.alone:
            notes.append("without it and those after it, which need it")
        failed = ("yes" if proof.without.failed else "no") if proof.without else ""
        cells = [proof.name, proof.with_it.passed, failed, "; ".join(notes)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"
