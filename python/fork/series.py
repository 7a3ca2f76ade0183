"""Reads patches into commits, and writes commits as patches."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fork import base
from fork.errors import ForkError, PatchError
from fork.process import COMMITTER, EPOCH, Git, GitError
from fork.project import Project

BASE = "refs/fork/base"
PREFIX = "python/sglang/"  # where upstream's repository has what a wheel has in sglang/

# Committer and committer date come from the patch, so a series has the same commit
# ids everywhere. Mail's rule that [brackets] before a subject are dropped is for
# "[PATCH 1/2]", not for the "[Gemma4]" of upstream's titles.
AM = ["am", "--quiet", "--committer-date-is-author-date", "--keep-non-patch"]
IN_TREE = ["-p3"]  # a/python/sglang/srt/… is srt/… in python/sglang

FORMAT = [
    *["format-patch", "--quiet", "--patch", "--no-stat", "--no-numbered"],
    *["--zero-commit", "--full-index", "--no-signature", "--no-encode-email-headers"],
    *["--subject-prefix=PATCH", "--start-number=1", "--suffix=.patch", "--no-attach"],
    *["--no-thread", "--no-cover-letter", "--no-base", "--no-from", "--no-notes"],
    *["--no-to", "--no-cc", "--no-add-header", "--no-color", "--no-ext-diff"],
    *["--no-textconv", "--no-relative", "--no-renames", "--unified=3"],
    *["--diff-algorithm=myers", "--indent-heuristic"],
]
ADVICE = (
    "An empty commit is dropped, a subject of two lines becomes one, and lines that "
    "begin with '---', 'diff -', 'Index: ' or 'From: ' end or change a message: mend "
    "that with `git -C python/sglang rebase -i refs/fork/base`."
)
LOG = ["log", "--reverse", "--topo-order", "--date=raw"]


def init(folder: Path) -> Git:
    """Makes a repository that keeps every byte of a file, whatever the user's git
    is set to."""
    git = Git(folder)
    git("init", "--quiet", "--template=")
    git("config", "core.autocrlf", "false")
    info = folder / ".git" / "info"
    info.mkdir(exist_ok=True)
    (info / "attributes").write_text("* -text -filter -ident -working-tree-encoding\n")
    ignored = [*base.GENERATED, "__pycache__/", "*.py[co]", "*.rej"]
    (info / "exclude").write_text("".join(f"{name}\n" for name in ignored))
    return git


def commit_base(git: Git, project: Project, content: Path) -> str:
    """Commits the files of an unpacked base, and marks the commit by a ref.

    Compiled modules stay out, so that it is one commit for each Python and platform.

    Args:
        content: The folder that is the root of the repository; need not lie in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        git = Git(
            git.folder,
            GIT_WORK_TREE=content,
            GIT_INDEX_FILE=Path(folder) / "index",
            GIT_LITERAL_PATHSPECS=0,
        )
        excluded = [f":(exclude,glob)**/{name}" for name in base.GENERATED]
        git("add", "--force", "--", ".", *excluded)
        tree = git("write-tree").strip()
    by = {name.replace("COMMITTER", "AUTHOR"): who for name, who in COMMITTER.items()}
    dates = {
        "GIT_AUTHOR_DATE": f"{EPOCH} +0000",
        "GIT_COMMITTER_DATE": f"{EPOCH} +0000",
    }
    message = f"{base.requirement(project)}\n\nThe release as it is, for the series.\n"
    commit = git("commit-tree", tree, input=message, **by, **dates).strip()
    git("update-ref", BASE, commit)
    return commit


@contextlib.contextmanager
def scratch(git: Git, commit: str) -> Iterator[Git]:
    """Yields a temporary worktree at a commit, empty: git writes what patches touch."""
    with tempfile.TemporaryDirectory(prefix="sglang-series-") as folder:
        worktree = Git(Path(folder) / "tree")
        args = ["--quiet", "--detach", "--no-checkout"]
        git("worktree", "prune")  # those of runs that were killed
        git("worktree", "add", *args, worktree.folder, commit)
        try:
            worktree("read-tree", "HEAD")
            yield worktree
        finally:
            git("worktree", "remove", "--force", "--force", worktree.folder)


def am(git: Git, patches: Sequence[Path], *options: str) -> None:
    """Commits the patches on HEAD.

    Raises:
        PatchError: One does not apply; names it, the files and the hunks.
    """
    if not patches:
        return
    try:
        git(*AM, *options, "--", *patches)
    except GitError as error:
        raise _refusal(error.output, patches) or error from None


def _refusal(output: str, patches: Sequence[Path]) -> PatchError | None:
    failed = re.search(r"^Patch failed at (\d+)", output, re.MULTILINE)
    if not failed:
        return None
    hunks = re.findall(r"^error: patch failed: (.+):(\d+)$", output, re.MULTILINE)
    causes = [
        f"{PREFIX}{path.removeprefix(PREFIX)}, the hunk at line {line}"
        for path, line in hunks
    ]
    if not causes:
        causes = re.findall(r"^error: (.+)$", output, re.MULTILINE)
    if not causes:
        causes = ["git am cannot read it"]
    name = patches[int(failed[1]) - 1].name
    return PatchError(f"{name} does not apply: {'; '.join(causes)}")


def apply(git: Git, patches: Sequence[Path], *options: str, onto: str = BASE) -> str:
    """Returns the commit that the patches lead to. Touches neither HEAD nor files.

    Raises:
        PatchError: One does not apply.
    """
    with scratch(git, onto) as worktree:
        am(worktree, patches, *options)
        return worktree.commit("HEAD")


def write(git: Git, commits: str, folder: Path, prefix: str = "") -> list[Path]:
    """Writes a range of commits as patches that plain ``git am`` applies.

    They depend on the commits' content alone: not on settings, git's version, ids.

    Args:
        prefix: The path of the repository's root in upstream's.

    Raises:
        ForkError: Git am would not make the same commits of them.
    """
    names = [f"--src-prefix=a/{prefix}", f"--dst-prefix=b/{prefix}"]
    with tempfile.TemporaryDirectory() as scratch_folder:
        # Mail has no carriage returns: such files travel as binary ones.
        attributes = Path(scratch_folder) / "attributes"
        _write_attributes(attributes, _with_carriage_returns(git, commits))
        config = {"core.attributesFile": attributes}
        args = [*names, "--output-directory", folder, commits]
        done = git.run(*FORMAT, *args, config=config)
        if done.returncode:
            raise GitError("format-patch", done)
    patches = sorted(folder.glob("*.patch"))
    _check(git, commits, patches, f"-p{1 + prefix.count('/')}")
    return patches


def _with_carriage_returns(git: Git, commits: str) -> set[str]:
    changed = git.names(
        "log", "--format=", "--name-only", "--no-renames", "-z", commits
    )
    if not changed:
        return set()
    revisions = [*git.lines("rev-list", commits), commits.split("..")[0]]
    args = ["-I", "-z", "--files-with-matches", "-e", "\r$", *revisions, "--"]
    found = git.run("grep", *args, *sorted(set(changed))).stdout
    return {name.split(":", 1)[1] for name in found.split("\0") if name}


def _write_attributes(file: Path, binary: set[str]) -> None:
    lines = []
    for name in sorted(binary):
        pattern = "/" + re.sub(r"([*?\[\\])", r"\\\1", name)
        quoted = re.sub(r'(["\\])', r"\\\1", pattern).replace("\n", "\\n")
        lines.append(f'"{quoted}" -diff\n')
    file.write_text("".join(lines), "utf-8", "surrogateescape", newline="\n")


def _check(git: Git, commits: str, patches: Sequence[Path], *options: str) -> None:
    """Raises ForkError unless the patches make the same commits again."""
    start = commits.split("..")[0]
    parts = {
        "content": "%T",
        "author": "%an <%ae>",
        "author's date": "%ad",
        "message": "%B",
    }
    form = "--format=%h %s%x01" + "%x01".join(parts.values()) + "%x02"

    def read(revisions: str) -> list[list[str]]:
        commits = git(*LOG, form, revisions).split("\x02")[:-1]
        return [commit.strip("\n").split("\x01") for commit in commits]

    ours = read(commits)
    try:
        theirs = read(f"{start}..{apply(git, patches, *options, onto=start)}")
    except (PatchError, GitError) as error:
        raise ForkError(f"The commits cannot be patches: {error} {ADVICE}") from None
    for mine, other in zip(ours, [*theirs, *[None] * len(ours)]):
        if other is None or mine[1:] != other[1:]:
            lost = [p for p, a, b in zip(parts, mine[1:], (other or [])[1:]) if a != b]
            raise ForkError(
                f"The commit {mine[0]} cannot be a patch, as `git am` makes another "
                f"{' and '.join(lost) or 'series'} of it. {ADVICE}"
            )
