"""What a newer release of upstream does to the series: a report, patch by patch."""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from packaging.utils import parse_wheel_filename
from packaging.version import InvalidVersion, Version

from fork import base, series
from fork.ci.github import GitHub
from fork.errors import ForkError, PatchError
from fork.process import AUTHOR, EPOCH, Git, last_line, run, run_module, say
from fork.project import Project
from fork.series import BASE, PREFIX
from fork.upstream import repository

OLDER = "refs/fork/older"
NEWER = "refs/fork/newer"
LABEL = "base-watch"
VERDICTS = {  # what is said of one, and of several
    "applies": ("applies", "apply"),
    "merges": ("applies by a three-way merge", "apply by a three-way merge"),
    "upstream": ("is upstream already", "are upstream already"),
    "conflicts": ("conflicts", "conflict"),
}


@dataclass
class Hunk:
    """One hunk of a patch, or all of a file that is added, removed or binary.

    Attributes:
        place: The path, the line in the older release and what encloses it.
        state: ``fits``, ``upstream``, or why it does neither.
        text: A patch of the hunk alone.
    """

    file: str
    place: str
    text: str
    state: str = ""


@dataclass
class Verdict:
    """What became of a patch: a key of VERDICTS, and its hunks if it conflicts."""

    name: str
    subject: str
    verdict: str
    hunks: list[Hunk] = field(default_factory=list)


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
        return [_try(git, patch) for patch in project.patches()]


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


def _try(git: Git, patch: Path) -> Verdict:
    text = patch.read_text("utf-8", "surrogateescape")
    told = Verdict(patch.name, series.subject(patch), "applies")
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
    told.hunks = hunks(text)
    for hunk in told.hunks:
        _try_hunk(git, hunk)
    if all(hunk.state == "upstream" for hunk in told.hunks):
        told.verdict = "upstream"
        return told
    told.verdict = "conflicts"
    dated = {**AUTHOR, "GIT_AUTHOR_DATE": f"{EPOCH} +0000"}
    git("add", "--all")  # what fits, for the patches that follow
    git("commit", "--quiet", "--allow-empty", "--message", told.subject, **dated)
    return told


def _try_hunk(git: Git, hunk: Hunk) -> None:
    """Applies a hunk if it fits; says what it is else."""
    text = {"input": hunk.text}
    if not git.run("apply", "--reverse", "--check", "-", **text).returncode:
        hunk.state = "upstream"
    elif not git.run("apply", "-", **text).returncode:
        hunk.state = "fits"
    elif not (git.folder / hunk.file).exists():
        name = hunk.file.rsplit("/", 1)[-1]
        files = git.names("ls-tree", "-r", "-z", "--name-only", NEWER)
        named = [path for path in files if path.endswith(f"/{name}")]
        moved = f", {' and '.join(named)} has its name" * bool(named)
        hunk.state = f"the file is gone{moved}"
    elif "@@" not in hunk.text or "\n@@ -0,0 " in hunk.text:
        hunk.state = "the file is there already, or is another"
    else:
        old = _lines(git("show", f"{OLDER}:{hunk.file}"))
        new = _lines((git.folder / hunk.file).read_text("utf-8", "surrogateescape"))
        body = hunk.text[hunk.text.index("\n@@ ") + 1 :].splitlines()[1:]
        added = _lines("\n".join(ln[1:] for ln in body if ln[:1] == "+"))
        before = [ln for sign in "- " for ln in body if ln[:1] == sign]
        gone = [ln[1:].strip() for ln in before if ln[1:].strip() not in {*new, ""}]
        if added and _has(new, added) and not _has(old, added):
            hunk.state = "upstream"
        elif gone:
            hunk.state = f"upstream has no `{gone[0]}` any more"
        else:
            hunk.state = "its lines are there, but not together"


def _lines(text: str) -> list[str]:
    """The lines that are not empty, without their indentation."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def _has(lines: list[str], block: list[str]) -> bool:
    """Whether the lines of a block follow each other somewhere."""
    size = len(block)
    return any(lines[i : i + size] == block for i in range(len(lines) - size + 1))


def hunks(patch: str) -> list[Hunk]:
    """Takes a patch apart."""
    found = []
    for part in re.split(r"^(?=diff --git )", patch, flags=re.MULTILINE)[1:]:
        head, *bodies = re.split(r"^(?=@@ )", part, flags=re.MULTILINE)
        file = re.match(r"diff --git a/\S+ b/(\S+)", head)[1]
        new = re.search(r"^(new|deleted) file mode", head, re.MULTILINE)
        if new or not bodies:
            what = {"new": "added", "deleted": "removed"}[new[1]] if new else "binary"
            found.append(Hunk(file, f"{file} ({what})", part))
            continue
        for body in bodies:
            line, inside = re.match(r"@@ -(\d+)\S* \S+ @@ ?(.*)", body).groups()
            place = f"{file}:{line}" + (f" in `{inside.strip()}`" if inside else "")
            # What follows the last hunk of a mail is no part of it.
            body = re.sub(r"\n-- \n.*", "\n", body, flags=re.DOTALL)
            found.append(Hunk(file, place, head + body))
    return found


def report(project: Project, version: Version, verdicts: list[Verdict]) -> str:
    """The report, in Markdown."""
    counts = [
        f"{count} {VERDICTS[key][count > 1]}"
        for key in VERDICTS
        if (count := sum(told.verdict == key for told in verdicts))
    ]
    lines = [
        f"# The series of {base.requirement(project)} on {version}",
        "",
        f"{len(verdicts)} patches: {', '.join(counts) or 'none'}.",
        "",
        "| patch | |",
        "| --- | --- |",
    ]
    titles = {}
    for told in verdicts:
        number, _, name = Path(told.name).stem.partition("-")
        known = name in [entry.name for entry in project.entries]
        titles[told.name] = f"{f'`{name}`:' if known else number} {told.subject}"
        lines.append(f"| {titles[told.name]} | {VERDICTS[told.verdict][0]} |")
    for told in verdicts:
        if told.verdict != "conflicts":
            continue
        states = [hunk.state for hunk in told.hunks]
        kept = f"Of {len(states)} hunks {states.count('fits')} fit"
        if "upstream" in states:
            kept += f" and {states.count('upstream')} are upstream already"
        lines += [
            "",
            f"## {titles[told.name]}",
            "",
            f"{kept}.",
            "",
        ]
        for hunk in told.hunks:
            if hunk.state not in ("fits", "upstream"):
                lines.append(f"- {hunk.place}: {hunk.state}")
    return "\n".join(lines) + "\n"


def watch(project: Project, github: GitHub) -> str:
    """Keeps one issue that says what the newest release does to the series.

    It is opened by the first newer release, rewritten as its report changes, opened
    again by a release after the one that it was closed at, and closed when the series
    is at the newest. Returns what was done.
    """
    mine = [
        issue
        for issue in github.pages("issues", state="all", labels=LABEL)
        if "pull_request" not in issue
    ]
    issue = mine[0] if mine else None
    version, wheel = newest(project)
    if version <= Version(base.requirement(project).split("==")[1]):
        if issue and issue["state"] == "open":
            github("PATCH", f"issues/{issue['number']}", {"state": "closed"})
            return f"Closed #{issue['number']}: the series is at the newest release."
        return f"The series is at the newest release, {version}."
    told = {
        "title": f"SGLang {version} is out, and the series is at "
        f"{base.requirement(project).split('==')[1]}",
        "body": report(project, version, port(project, wheel))
        + "\n`make port` says this on any machine; docs/releasing.md says how the "
        "series is carried forward.\n",
    }
    if not issue:
        issue = github("POST", "issues", {**told, "labels": [LABEL]})
        return f"Opened #{issue['number']} for {version}."
    if issue["title"] == told["title"] and issue["state"] == "closed":
        return f"#{issue['number']} was closed for {version}: left as it is."
    if all(issue[key] == told[key] for key in told):
        return f"#{issue['number']} says so already."
    github("PATCH", f"issues/{issue['number']}", {**told, "state": "open"})
    return f"Updated #{issue['number']} for {version}."
