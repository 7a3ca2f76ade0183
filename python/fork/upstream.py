"""The series as upstream would take it: each patch with its tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path, PurePosixPath

from fork import base, series
from fork.errors import ForkError
from fork.process import Git
from fork.project import Patch, Project
from fork.series import BASE, PREFIX
from fork.tree import replace_patches

MOST_LINES = 699  # that one pull request adds, for one person to review it


@contextlib.contextmanager
def repository(project: Project, sources: bool = True) -> Iterator[Git]:
    """Yields a temporary repository with the base where upstream's has it.

    Args:
        sources: Its compiled modules may be another Python's.
    """
    with base.unpacked(project, sources) as content:
        folder = content.parent / "repository"
        (folder / PREFIX).parent.mkdir(parents=True)
        (content / "sglang").rename(folder / PREFIX)
        git = series.init(folder)
        series.commit_base(git, project, folder)
        git("reset", "--quiet", BASE)
        yield git


def check_entries(project: Project) -> None:
    """Checks that series.toml says all of the patches, and of what there is.

    A series whose patches hold their tests needs to say nothing.

    Raises:
        ForkError: It has not one entry a patch, or names a test that cannot be.
    """
    settings = project.show(project.settings)
    if not project.entries and project.complete():
        return
    names = [entry.name for entry in project.entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ForkError(f"{settings} names {', '.join(twice)} more than once.")
    expected = [series.file_name(number, name) for number, name in enumerate(names, 1)]
    found = [patch.name for patch in project.patches()]
    if expected != found:
        place = next(
            i for i, (a, b) in enumerate(zip_longest(expected, found)) if a != b
        )
        named, there = (
            dict(enumerate(names)).get(place, "nothing") for names in (expected, found)
        )
        raise ForkError(
            f"{settings} has {named} in the place of patch {place + 1}, and "
            f"{project.show(project.folder)} has {there}. If a file is lost, bring it "
            "back (`git status patches`); else mend the entries, then `make fork` and "
            "`make patches`."
        )
    for entry in project.entries:
        for path in entry.tests:
            inside = ".." not in PurePosixPath(path).parts and not os.path.isabs(path)
            if not inside or not (project.root / path).is_file():
                raise ForkError(
                    f"{settings} says that {path} tests {entry.name}, and the "
                    "repository has no such file."
                )
            if path.startswith(PREFIX):
                raise ForkError(
                    f"{settings} says that {path} tests {entry.name}: what is in "
                    f"{PREFIX} is in the patch itself."
                )
        result = f"benchmark/gemma4/results/{entry.result}.json"
        if entry.result != "none" and not (project.root / result).is_file():
            raise ForkError(
                f"{settings} says that the figures of {entry.name} are from {result}, "
                "and the repository has no such file."
            )


def write_upstream(project: Project) -> list[Path]:
    """Writes dist/upstream/*.patch for `git am` in upstream's repository at the tag
    of the base, and returns them.

    Raises:
        ForkError: One adds too many lines.
    """
    check_entries(project)
    folder = project.root / "dist" / "upstream"
    with repository(project) as git:
        series.am(git, project.patches())
        head = git.commit("HEAD")
        if project.entries:
            commits = git.lines("rev-list", "--reverse", f"{BASE}..HEAD")
            head = _add_tests(project, git, dict(zip(commits, project.entries)))
        with tempfile.TemporaryDirectory() as made:
            commits, names = f"{BASE}..{head}", project.patch_names()
            patches = series.write(git, commits, Path(made), names=names)
            if project.entries:
                _check_sizes(project, git, patches)
            folder.mkdir(parents=True, exist_ok=True)
            replace_patches(patches, folder)
    return sorted(folder.glob("*.patch"))


def _check_sizes(project: Project, git: Git, patches: list[Path]) -> None:
    for entry, patch in zip(project.entries, patches):
        counts = git.lines("apply", "--numstat", patch)
        # A binary file has "-" for a number.
        added = sum(int(line.split("\t")[0].replace("-", "0")) for line in counts)
        if added > MOST_LINES:
            raise ForkError(
                f"{entry.name} adds {added} lines with the tests that come with it, and "
                f"a pull request may add {MOST_LINES}: split it by its concerns, or have "
                f"{project.show(project.settings)} name a test with an earlier patch that "
                "it tests too."
            )


def write_one(project: Project, name: str) -> Path:
    """Writes dist/alone/NAME.patch, one patch with its tests for `git am` at the tag of
    the base without the others, and returns it.

    Raises:
        ForkError: There is no such patch, or it needs others.
    """
    check_entries(project)
    names = [entry.name for entry in project.entries]
    if name not in names:
        raise ForkError(
            f"{project.show(project.settings)} names no patch {name!r}, but "
            f"{', '.join(names) or 'none at all'}."
        )
    folder = project.root / "dist" / "alone"
    with repository(project) as git:
        series.am(git, project.patches())
        commits = git.lines("rev-list", "--reverse", f"{BASE}..HEAD")
        commit = commits[names.index(name)]
        git("checkout", "--quiet", "--detach", BASE)
        if git.run("cherry-pick", commit).returncode:
            files = git.names("diff", "--name-only", "--diff-filter=U", "-z")
            touching = [
                before
                for before, made in zip(names[: names.index(name)], commits)
                if git.names(
                    *("diff-tree", "-r", "-z", "--no-commit-id", "--name-only"),
                    *(made, "--", *files),
                )
            ]
            raise ForkError(
                f"{name} needs patches before it, as git cannot put it on "
                f"{base.requirement(project)} alone; of those that change "
                f"{', '.join(files)} as well: {', '.join(touching)}. Send them first, "
                "or all with `make upstream`."
            )
        head = _add_tests(
            project, git, {git.commit("HEAD"): project.entries[names.index(name)]}
        )
        with tempfile.TemporaryDirectory() as made:
            (patch,) = series.write(git, f"{BASE}..{head}", Path(made), names=[name])
            folder.mkdir(parents=True, exist_ok=True)
            return shutil.move(patch, folder / f"{name}.patch")


def _add_tests(project: Project, git: Git, commits: dict[str, Patch]) -> str:
    """Makes the commits of these patches once more, each with its tests. A test of
    several comes with the first. Returns the last commit."""
    git = Git(git.folder, GIT_INDEX_FILE=git.folder.parent / "index")
    parent, files = git.commit(BASE), []
    for commit, entry in commits.items():
        for path in entry.tests:
            source = project.root / path
            blob = git("hash-object", "-w", "--no-filters", "--", source).strip()
            mode = "100755" if os.access(source, os.X_OK) else "100644"
            files += ["--cacheinfo", f"{mode},{blob},{path}"]
        git("read-tree", commit)
        if files:
            git("update-index", "--add", *files)
        parent = series.commit_again(git, commit, git("write-tree").strip(), parent)
    return parent
