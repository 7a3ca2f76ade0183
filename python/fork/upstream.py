"""The series as upstream would take it: each patch with the files it adds."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from fork import base, series
from fork.errors import ForkError
from fork.process import Git
from fork.project import Project
from fork.series import BASE, PREFIX
from fork.tree import replace_patches


@contextlib.contextmanager
def repository(project: Project) -> Iterator[Git]:
    """Yields a temporary repository with the base where upstream's has it."""
    with base.unpacked(project) as content:
        folder = content.parent / "repository"
        (folder / PREFIX).parent.mkdir(parents=True)
        (content / "sglang").rename(folder / PREFIX)
        git = series.init(folder)
        series.commit_base(git, project, folder)
        git("reset", "--quiet", BASE)
        yield git


def added_files(project: Project, git: Git) -> dict[str, list[str]]:
    """Returns what the Adds: trailers of the commits after BASE name, by commit.

    A file that several name comes with the first.

    Raises:
        ForkError: A file that is not in the repository, or an Adds: line that is no
            trailer.
    """
    added = {}
    for commit in git.lines("rev-list", "--reverse", f"{BASE}..HEAD"):
        subject = git("show", "--no-patch", "--format=%s", commit).strip()
        values = "--format=%(trailers:key=Adds,valueonly,unfold)"
        paths = [p for p in git.lines("show", "--no-patch", values, commit) if p]
        body = git.lines("show", "--no-patch", "--format=%B", commit)
        if sum(line.startswith("Adds:") for line in body) != len(paths):
            raise ForkError(
                f'"{subject}" has an Adds: line outside the trailers: move it to the '
                "last paragraph of the message, which holds nothing but trailers."
            )
        for path in paths:
            inside = ".." not in PurePosixPath(path).parts and not os.path.isabs(path)
            if not inside or not (project.root / path).is_file():
                raise ForkError(
                    f'"{subject}" says "Adds: {path}", and the repository has no such '
                    "file: add it, or correct the trailer."
                )
            if path.startswith(PREFIX):
                raise ForkError(
                    f'"{subject}" says "Adds: {path}": files of {PREFIX} are added '
                    "by the patch itself; drop the trailer."
                )
        added[commit] = paths
    return added


def write_upstream(project: Project) -> list[Path]:
    """Writes dist/upstream/*.patch for `git am` in upstream's repository at the tag
    of the base, and returns them."""
    folder = project.root / "dist" / "upstream"
    with repository(project) as git:
        series.am(git, project.patches())
        head = _with_files(project, git, added_files(project, git))
        with tempfile.TemporaryDirectory() as made:
            patches = series.write(git, f"{BASE}..{head}", Path(made))
            folder.mkdir(parents=True, exist_ok=True)
            replace_patches(patches, folder)
    return sorted(folder.glob("*.patch"))


def _with_files(project: Project, git: Git, added: dict[str, list[str]]) -> str:
    """Makes the commits once more, with their files and without their trailers."""
    git = Git(git.folder, GIT_INDEX_FILE=git.folder.parent / "index")
    parent, files = git.commit(BASE), []
    for commit, paths in added.items():
        for path in paths:
            source = project.root / path
            blob = git("hash-object", "-w", "--no-filters", "--", source).strip()
            mode = "100755" if os.access(source, os.X_OK) else "100644"
            files += ["--cacheinfo", f"{mode},{blob},{path}"]
        git("read-tree", commit)
        if files:
            git("update-index", "--add", *files)
        tree = git("write-tree").strip()
        form = "--format=%an%x01%ae%x01%ad%x01%B"
        told = git("show", "--no-patch", "--date=raw", form, commit)
        name, email, date, message = told.split("\x01")
        lines = [ln for ln in message.splitlines() if not ln.startswith("Adds:")]
        parent = git(
            *["commit-tree", tree, "-p", parent],
            input="\n".join(lines).strip() + "\n",
            GIT_AUTHOR_NAME=name,
            GIT_AUTHOR_EMAIL=email,
            GIT_AUTHOR_DATE=date,
            GIT_COMMITTER_DATE=date,
        ).strip()
    return parent
