"""Proves that patches/ and python/sglang are what they should be."""

from __future__ import annotations

import json
import os
import py_compile
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fork import base, series
from fork.errors import ForkError, PatchError
from fork.process import Git, say
from fork.project import Project
from fork.series import BASE, PREFIX
from fork.tree import Tree
from fork.upstream import check_entries, repository


def verify(project: Project) -> None:
    """Checks every series of patches/, python/sglang against the one that it is of,
    and each prefix of the one whose base this Python has.

    Raises:
        ForkError: What is wrong, and what to do.
    """
    tree, every = Tree(project), project.every()
    owner = None
    if tree.exists():
        tree.refuse_unexported()
        owner = tree.owner()
        if not owner:
            raise ForkError(
                f"{tree.name} has the base of no series of patches/: `make fork` "
                "writes it anew."
            )
    tags = [one.version.local for one in every]
    for one in every:
        if tags.count(one.version.local) > 1:
            raise ForkError(
                f"The version of {one.series} ends like that of another series, in "
                f"+{one.version.local}: a tag is the name of one release."
            )
    for one in every:
        _verify_series(one, tree if one == owner else None)


def _verify_series(project: Project, tree: Tree | None) -> None:
    patches, release = project.patches(), base.requirement(project)
    _check_numbers(project, patches)
    check_entries(project)
    with repository(project) as git:
        try:
            series.am(git, patches)
        except PatchError as error:
            raise ForkError(
                f"{error}. `make fork SERIES={project.series}` stops at it in "
                f"{project.show(project.tree)}, for it to be mended there."
            ) from None
        say(f"The series of {len(patches)} applies to {release} with git am.")
        _check_bytes(project, git)
        say("An export of it is the same to the byte.")
        tests = {path for entry in project.entries for path in entry.tests}
        if tests:
            say(f"The {len(tests)} tests that its series.toml names are there.")
        if tree:
            _check_tree(project, tree)
            say(f"{tree.name} holds nothing that was not exported.")
        if not base.is_installed(project):
            say(f"This Python has no {release}, so the imports are not tried.")
        elif patches:
            _check_prefixes(git)


def _check_numbers(project: Project, patches: list[Path]) -> None:
    for number, patch in enumerate(patches, 1):
        if not re.match(rf"{number:04}-", patch.name):
            raise ForkError(
                f"{project.show(project.folder)} has no patch {number:04}, only "
                f"{patch.name} in its place: bring it back (`git status patches`), or, "
                "if it was dropped on purpose, `make fork` and `make patches` renumber "
                "the rest."
            )


def _check_bytes(project: Project, git: Git) -> None:
    """Compares patches/ with an export of the commits that they make."""
    with tempfile.TemporaryDirectory() as folder:
        names = project.patch_names()
        made = series.write(git, f"{BASE}..HEAD", Path(folder), names=names)
        expected = {patch.name: patch.read_bytes() for patch in made}
    found = {patch.name: patch.read_bytes() for patch in project.patches()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            path = project.show(project.folder / name)
            raise ForkError(
                f"{path} is not what an export writes; it was changed by hand, or "
                "another tool wrote it: `make fork` and `make patches` write it anew."
            )


def _check_tree(project: Project, tree: Tree) -> None:
    """Compares patches/ with the commits of python/sglang."""
    found = series.unlike(tree.git, f"{BASE}..HEAD", project.patches(), in_tree=True)
    if found:
        place, commit, lost = found
        raise ForkError(
            f"Patch {place + 1} of {project.show(project.folder)} is not the commit "
            f"{commit} of {tree.name} ({' and '.join(lost) or 'one is missing'}): "
            "`make fork` takes it from patches/ (or `git checkout -- patches` takes "
            "patches/ back)."
        )


def _check_prefixes(git: Git) -> None:
    """Byte-compiles and imports, after each patch, the modules touched so far.

    A module of the base may fail, as one that needs a GPU does where there is none,
    for as long as it has not been imported once.
    """
    commits = git.lines("rev-list", "--reverse", f"{BASE}..HEAD")
    files = _touched(git, f"{BASE}..HEAD")
    git("checkout", "--quiet", "--detach", BASE)
    with Importer((git.folder / PREFIX).parent) as importer:
        unable = importer.errors(_modules(git, files))
        touched: set[str] = set()
        for number, commit in enumerate(commits, 1):
            git("checkout", "--quiet", "--detach", commit)
            where = f'With the first {number} patches, up to "{_subject(git, commit)}",'
            new = _touched(git, f"{commit}~..{commit}")
            for path in new:
                if (git.folder / path).exists():
                    _compile(git.folder / path, f"{where} {path}")
            touched.update(new)
            modules = _modules(git, touched)
            errors = importer.errors(modules)
            for module in modules:
                if module not in errors:
                    unable.pop(module, None)
                elif module not in unable:
                    raise ForkError(
                        f"{where} {module} cannot be imported ({errors[module]}): "
                        "mend that patch."
                    )
            imported = len(modules) - len(errors)
            say(f"{number}/{len(commits)}: {imported} modules import.")
    for module, error in unable.items():
        say(f"Only byte-compiled, as the base fails here too: {module} ({error}).")


def _touched(git: Git, commits: str) -> list[str]:
    names = git.names("log", "--format=", "--name-only", "--no-renames", "-z", commits)
    return sorted({name for name in names if name.endswith(".py")})


def _modules(git: Git, paths: Iterable[str]) -> list[str]:
    """The modules of those files that are there and can be imported by name."""
    names = []
    for path in sorted(paths):
        parts = Path(path).relative_to(Path(PREFIX).parent).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if (git.folder / path).exists() and all(map(str.isidentifier, parts)):
            names.append(".".join(parts))
    return names


def _compile(file: Path, where: str) -> None:
    try:
        # Unchecked by time: two prefixes can be written in one second.
        py_compile.compile(str(file), doraise=True)
    except py_compile.PyCompileError as error:
        raise ForkError(f"{where} does not compile ({error.exc_value}).") from None


def _subject(git: Git, commit: str) -> str:
    return git("show", "--no-patch", "--format=%s", commit).strip()


class Importer:
    """A process that imports modules, see imports.py."""

    def __init__(self, folder: Path):
        self.log = tempfile.TemporaryFile("w+")
        program = Path(__file__).with_name("imports.py")
        env = dict(os.environ)
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # prefixes share most modules
        self.process = subprocess.Popen(
            [sys.executable, program],
            cwd=folder,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def errors(self, modules: list[str]) -> dict[str, str]:
        """Returns why those that do not import do not."""
        if not modules:
            return {}
        try:
            self.process.stdin.write(json.dumps(modules) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self.log.seek(0)
            raise ForkError(f"The imports died: {self.log.read()[-500:]}") from None

    def __enter__(self) -> Importer:
        return self

    def __exit__(self, *error) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.log.close()
