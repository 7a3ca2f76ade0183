"""Reads patches into commits, and writes commits as patches."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from fork import base
from fork.errors import ForkError, PatchError
from fork.process import AUTHOR, EPOCH, Git, GitError
from fork.project import OUTSIDE, PREFIX, Project

BASE = "refs/fork/base"

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
    dates = {
        "GIT_AUTHOR_DATE": f"{EPOCH} +0000",
        "GIT_COMMITTER_DATE": f"{EPOCH} +0000",
    }
    message = f"{base.requirement(project)}\n\nThe release as it is, for the series.\n"
    commit = git("commit-tree", tree, input=message, **AUTHOR, **dates).strip()
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


def am(git: Git, patches: Sequence[Path], *options: str, in_tree: bool = False) -> None:
    """Commits the patches on HEAD.

    Args:
        in_tree: The repository is python/sglang, not upstream's: what the patches hold
            of other folders is left out.

    Raises:
        PatchError: One does not apply; names it, the files and the hunks.
    """
    if not patches:
        return
    with tempfile.TemporaryDirectory() as folder:
        if in_tree:
            options = (*options, *IN_TREE)
            patches = [_of_tree(patch, Path(folder)) for patch in patches]
        try:
            git(*AM, *options, "--", *patches)
        except GitError as error:
            raise _refusal(error.output, patches) or error from None


def patch_package(project: Project, patches: Sequence[Path], package: Path) -> None:
    """Applies patches to the package sglang of an unpacked base.

    Raises:
        PatchError: One does not apply.
    """
    git = init(package)
    commit_base(git, project, package)
    git("reset", "--quiet", BASE)
    am(git, patches, in_tree=True)
    shutil.rmtree(package / ".git")


def _of_tree(patch: Path, folder: Path) -> Path:
    """The patch without what it holds of files outside python/sglang."""
    content = patch.read_bytes()
    if not OUTSIDE.search(content):
        return patch
    parts = re.split(rb"^(?=diff --git )", content, flags=re.MULTILINE)
    kept = folder / patch.name
    kept.write_bytes(b"".join(part for part in parts if not OUTSIDE.match(part)))
    return kept


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


def apply(
    git: Git, patches: Sequence[Path], *, in_tree: bool = False, onto: str = BASE
) -> str:
    """Returns the commit that the patches lead to. Touches neither HEAD nor files.

    Raises:
        PatchError: One does not apply.
    """
    with scratch(git, onto) as worktree:
        am(worktree, patches, in_tree=in_tree)
        return worktree.commit("HEAD")


def write(
    git: Git,
    commits: str,
    folder: Path,
    prefix: str = "",
    names: Sequence[str] = (),
) -> list[Path]:
    """Writes a range of commits as patches that plain ``git am`` applies.

    They depend on the commits' content alone: not on settings, git's version, ids.

    Args:
        prefix: The path of the repository's root in upstream's.
        names: What the patches are called, where their subjects are not.

    Raises:
        ForkError: Git am would not make the same commits of them.
    """
    paths = [f"--src-prefix=a/{prefix}", f"--dst-prefix=b/{prefix}"]
    with tempfile.TemporaryDirectory() as scratch_folder:
        # Mail has no carriage returns: such files travel as binary ones.
        attributes = Path(scratch_folder) / "attributes"
        _write_attributes(attributes, _with_carriage_returns(git, commits))
        config = {"core.attributesFile": attributes}
        args = [*paths, "--output-directory", folder, commits]
        done = git.run(*FORMAT, *args, config=config)
        if done.returncode:
            raise GitError("format-patch", done)
    patches = sorted(folder.glob("*.patch"))
    _check(git, commits, patches, in_tree=bool(prefix))
    if not names:
        return patches
    return [
        patch.rename(folder / file_name(number, name))
        for number, (patch, name) in enumerate(zip(patches, names), 1)
    ]


def commit_again(git: Git, commit: str, tree: str, parent: str) -> str:
    """Makes a commit of another tree, with the author and message of one that is."""
    form = "--format=%an%x01%ae%x01%ad%x01%B"
    told = git("show", "--no-patch", "--date=raw", form, commit)
    name, email, date, message = told.split("\x01")
    return git(
        *["commit-tree", tree, "-p", parent],
        input=message.strip() + "\n",
        GIT_AUTHOR_NAME=name,
        GIT_AUTHOR_EMAIL=email,
        GIT_AUTHOR_DATE=date,
        GIT_COMMITTER_DATE=date,
    ).strip()


def file_name(number: int, name: str) -> str:
    """The file of a patch that has a name."""
    return f"{number:04}-{name}.patch"


def subject(patch: Path) -> str:
    """The subject of the commit that a patch makes."""
    text = patch.read_text("utf-8", "surrogateescape")
    # Lines of the subject, which mail may break, up to the first header after it.
    found = re.search(r"^Subject: \[PATCH\] (.*(?:\n .*)*)", text, re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


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


def _check(git: Git, commits: str, patches: Sequence[Path], in_tree: bool) -> None:
    """Raises ForkError unless the patches make the same commits again."""
    try:
        found = unlike(git, commits, patches, in_tree)
    except (PatchError, GitError) as error:
        raise ForkError(f"The commits cannot be patches: {error} {ADVICE}") from None
    if found:
        _, commit, lost = found
        raise ForkError(
            f"The commit {commit} cannot be a patch, as `git am` makes another "
            f"{' and '.join(lost) or 'series'} of it. {ADVICE}"
        )


def unlike(
    git: Git, commits: str, patches: Sequence[Path], in_tree: bool
) -> tuple[int, str, list[str]] | None:
    """Finds the first commit of a range that the patches do not make again.

    Returns its place, its id and subject, and what differs; None if there is none.

    Raises:
        PatchError: One of them does not apply to the start of the range.
    """
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
    end = apply(git, patches, in_tree=in_tree, onto=start)
    theirs = read(f"{start}..{end}")
    for place, (mine, other) in enumerate(zip_longest(ours, theirs, fillvalue=[""])):
        if mine[1:] != other[1:]:
            lost = [p for p, a, b in zip(parts, mine[1:], other[1:]) if a != b]
            return place, mine[0] or other[0], lost
    return None
