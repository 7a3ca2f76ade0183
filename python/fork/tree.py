"""python/sglang: the base and the series as commits, and their way back."""

from __future__ import annotations

import contextlib
import json
import shutil
import sysconfig
import tempfile
from pathlib import Path

from fork import base, series
from fork.errors import ForkError, PatchError, UnexportedError
from fork.process import Git, say
from fork.project import Project
from fork.series import BASE, PREFIX

SYNCED = "refs/fork/series"  # the commit that is equal to patches/
NEXT = "refs/fork/next"  # while a checkout writes files: the commit they are of
STATE = "fork.json"
RUNNING = {
    "rebase-merge": "rebase",
    "rebase-apply": "am",
    "MERGE_HEAD": "merge",
    "CHERRY_PICK_HEAD": "cherry-pick",
    "REVERT_HEAD": "revert",
}


class Tree:
    """The checked-out fork, a git repository of its own.

    It is of one series at a time, and goes to another's base if asked to.

    What it knows of the past, in .git/fork.json: ``base``, the digest of the base.txt
    that BASE is the commit of, None while that is changed; ``series``, the digest of
    the series that SYNCED is the end of, None while that is open; ``compiled``, the
    Pythons whose compiled modules lie in it.
    """

    def __init__(self, project: Project):
        self.project = project
        self.path = project.tree
        self.git = Git(self.path)

    @property
    def name(self) -> str:
        return self.project.show(self.path)

    def exists(self) -> bool:
        """Whether there is one.

        Raises:
            ForkError: Something else has its place.
        """
        if (self.path / ".git" / STATE).is_file():
            return True
        if self.path.is_symlink() or self.path.exists():
            raise ForkError(
                f"{self.name} exists and was not written by `make fork`: move it "
                "elsewhere and run again."
            )
        return False

    def checkout(self) -> None:
        """Makes python/sglang the base with the series on it.

        Raises:
            UnexportedError: It holds work that would be lost.
            PatchError: A patch does not apply; the tree is ready for it to be mended.
        """
        with self.project.lock():
            if not self.exists():
                self._create()
            self._resume()
            self._refuse_running()
            ours = self.owner() == self.project
            if ours:
                self._add_compiled()
                base.write_version(self.project.version, self.path)
            if self._is_current():
                return
            self._refuse_work()
            if not ours:
                self._change_base()
            self._apply()

    def export(self) -> list[str]:
        """Writes the tree's commits to patches/ and returns the names that changed.

        Raises:
            UnexportedError: Not all of the work is in commits, or patches/ has
                changes that would be lost.
        """
        with self.project.lock():
            if not self.exists():
                raise ForkError(f"There is no {self.name} yet: run `make fork`.")
            self._refuse_another()
            self._resume()
            self._refuse_running()
            self._refuse_unexportable()
            head = self.git.commit("HEAD")
            names = self._names()
            with tempfile.TemporaryDirectory(dir=self.project.cache) as folder:
                made = series.write(
                    self.git, f"{BASE}..{head}", Path(folder), PREFIX, names
                )
                self._set_state(series=None)
                changed = replace_patches(made, self.project.folder)
            self.git("update-ref", SYNCED, head)
            self._set_state(series=self.project.series_digest())
            return changed

    def edit(self, name: str) -> tuple[str, list[str]]:
        """Checks out the series; returns the commit of a patch and the files it changes.

        Raises:
            ForkError: There is no such patch, or it is not what patches/ holds; and as
                in checkout.
        """
        named = {p.stem.partition("-")[2]: p for p in self.project.patches()}
        if name not in named:
            raise ForkError(
                f"{self.project.show(self.project.folder)} has no patch of the name "
                f"{name!r}, but {', '.join(named) or 'none at all'}."
            )
        self.checkout()
        wanted = series.subject(named[name])
        for line in self.git.lines("log", "--format=%h %s", f"{BASE}..HEAD"):
            commit, subject = line.split(" ", 1)
            if subject == wanted:
                show = ["show", "--format=", "--name-only", "--no-renames", "-z"]
                return commit, self.git.names(*show, commit)
        raise ForkError(
            f'{self.name} has no commit "{wanted}" any more: `make patches` says what '
            "is to be done about what it has."
        )

    def owner(self) -> Project | None:
        """The series whose base it stands on, if that is in patches/."""
        base = self._state()["base"]
        every = (self.project, *self.project.every())
        return next((one for one in every if one.base_digest() == base), None)

    def refuse_unexported(self) -> None:
        """Raises UnexportedError, with what to do, if it holds more than patches/."""
        self._refuse_running()
        self._refuse_work(to_checkout=False)

    # What the tree holds

    def _state(self) -> dict:
        return json.loads((self.path / ".git" / STATE).read_text("utf-8"))

    def _set_state(self, **changes) -> None:
        file = self.path / ".git" / STATE
        state = {**(self._state() if file.exists() else {}), **changes}
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(state, indent=1) + "\n", "utf-8")
        partial.replace(file)

    def _patches_changed(self) -> bool:
        now, owner = self._state()["series"], self.owner()
        return now is not None and (not owner or now != owner.series_digest())

    def _is_current(self) -> bool:
        return self._state()["series"] == self.project.series_digest()

    def _has_moved(self) -> bool:
        return self.git.commit("HEAD") != self.git.commit(SYNCED)

    def _files(self) -> list[str]:
        status = ["status", "--porcelain", "--no-renames", "--untracked-files=all"]
        return [line[3:] for line in self.git.names(*status, "-z")]

    # What stands in the way

    def _refuse_running(self) -> None:
        for file, command in RUNNING.items():
            if (self.path / ".git" / file).exists():
                git = f"git -C {self.name} {command}"
                raise UnexportedError(
                    f"A git {command} is under way in {self.name}: finish it with "
                    f"`{git} --continue` and then `make patches`, or drop it with "
                    f"`{git} --abort`, and run again."
                )

    def _refuse_another(self) -> None:
        owner = self.owner()
        if self.project.complete():
            raise ForkError(
                f"The patches of {self.project.series} hold files outside {self.name} "
                "too, which an export would drop: that series is kept as it is."
            )
        if owner != self.project:
            has = f"has {owner.series}" if owner else "has the base of no series"
            raise UnexportedError(
                f"{self.name} {has}, not {self.project.series}: run "
                f"`make fork SERIES={self.project.series}` first."
            )

    def _refuse_work(self, to_checkout: bool = True) -> None:
        moved, files = self._has_moved(), self._files()
        if not moved and not files:
            return
        git, owner = f"git -C {self.name}", self.owner()
        other = owner is not None and owner != self.project
        make = f" SERIES={owner.series}" if other else ""
        work = ["commits"] * moved + [_list(files, "uncommitted file")] * bool(files)
        of = f" on {owner.series}" if other else ""
        what = f"{self.name} holds work{of} that was not exported: {' and '.join(work)}"
        if moved and self._patches_changed():
            since = self.git("rev-parse", "--short", SYNCED).strip()
            raise UnexportedError(
                f"{what}; and the series in patches/ has changed too. To have both, "
                f"commit what is uncommitted, then `{git} branch mine`, "
                f"`{git} reset --hard {since}`, `make fork{make}`, "
                f"`{git} cherry-pick {since}..mine` and `make patches{make}`."
            )
        if to_checkout and not moved and not other:
            keep = f"`{git} stash -u`, run again, `{git} stash pop`"
        else:
            keep = f"`{git} commit` and " * bool(files) + f"`make patches{make}`"
        raise UnexportedError(
            f"{what}. To keep it: {keep}. To throw it away: "
            f"`{git} reset --hard {SYNCED}` and `{git} clean -fd`."
        )

    def _refuse_unexportable(self) -> None:
        git = f"git -C {self.name}"
        if self._patches_changed():
            if self._has_moved():
                self._refuse_work()
            raise UnexportedError(
                f"{self.project.show(self.project.folder)} has changed since "
                f"{self.name} was made from it, and an export would undo that: run "
                "`make fork` first."
            )
        files = self._files()
        if files:
            raise UnexportedError(
                f"{self.name} has {_list(files, 'uncommitted file')}: "
                f"commit (`{git} commit --fixup` the patch it belongs to) or stash "
                "first; only commits are exported."
            )
        if self.git.run("merge-base", "--is-ancestor", BASE, "HEAD").returncode:
            raise ForkError(
                f"HEAD of {self.name} is not based on {BASE}: check out the branch "
                f"with the series (`{git} checkout fork`)."
            )
        if self.git.lines("rev-list", "--merges", f"{BASE}..HEAD"):
            raise ForkError(
                f"{self.name} has a merge commit, and a series is a line: "
                f"`{git} rebase {BASE}` makes it one."
            )
        subjects = self.git.lines("log", "--format=%s", f"{BASE}..HEAD")
        marks = ("fixup!", "squash!", "amend!")
        left = [s for s in subjects if s.startswith(marks)]
        if left:
            raise ForkError(
                f"{self.name} has {_list(left, 'fixup commit')} left: "
                f"`{git} rebase -i --autosquash {BASE}` first."
            )

    def _names(self) -> list[str]:
        """The names of the commits after BASE, if series.toml names any.

        Raises:
            UnexportedError: It does not name each of them once, in their order.
        """
        names = [entry.name for entry in self.project.entries]
        subjects = self.git.lines("log", "--reverse", "--format=%s", f"{BASE}..HEAD")
        if not names:
            return []
        known = {
            series.subject(patch): name
            for patch in self.project.patches()
            if (name := patch.stem.partition("-")[2]) in names
        }
        settings = self.project.show(self.project.settings)
        order = f"give {settings} one [[patch]] for each commit, in their order"
        if len(names) != len(subjects):
            new = [f'"{subject}"' for subject in subjects if subject not in known]
            gone = [name for name in names if name not in known.values()] or [
                name for subject, name in known.items() if subject not in subjects
            ]
            raise UnexportedError(
                f"{settings} names {len(names)} patches and {self.name} has "
                f"{len(subjects)} commits: {order}; new here: "
                f"{', '.join(new) or 'none'}; of no commit here: "
                f"{', '.join(gone) or 'none'}."
            )
        for subject, name in zip(subjects, names):
            if known.get(subject, name) != name:
                raise UnexportedError(
                    f'The commit "{subject}" of {self.name} is {known[subject]}, and '
                    f"{settings} has {name} in its place: {order}."
                )
        return names

    # Writing it

    def _create(self) -> None:
        """Writes the base beside its place and renames it, so it is whole or absent."""
        partial = Tree(self.project)
        partial.path = self.path.with_name(".sglang.partial")
        if partial.path.exists():
            shutil.rmtree(partial.path)
        partial.path.mkdir()
        partial.git = series.init(partial.path)
        partial._change_base()
        partial._switch(BASE)
        partial.path.rename(self.path)

    def _change_base(self) -> None:
        with base.unpacked(self.project) as content:
            name = self.project.show(self.project.tree)
            say(f"Writing {name}: {base.requirement(self.project)} ...")
            self._set_state(base=None, series=None, compiled=[])
            self._remove_generated()
            series.commit_base(self.git, self.project, content / "sglang")
            self._copy_compiled(content / "sglang")
            base.write_version(self.project.version, self.path)
            base_digest = self.project.base_digest()
            compiled = [sysconfig.get_config_var("SOABI")]
            self._set_state(base=base_digest, compiled=compiled)

    def _remove_generated(self) -> None:
        """Removes what is in no commit, and the folders of nothing else: Python would
        import those."""
        for name in ("*.py[co]", *base.GENERATED):
            for file in [*self.path.rglob(name)]:
                file.unlink()
                with contextlib.suppress(OSError):
                    file.parent.rmdir()

    def _add_compiled(self) -> None:
        compiled, this = self._state()["compiled"], sysconfig.get_config_var("SOABI")
        if this not in compiled:
            with base.unpacked(self.project) as content:
                self._copy_compiled(content / "sglang")
            self._set_state(compiled=[*compiled, this])

    def _copy_compiled(self, package: Path) -> None:
        for name in base.GENERATED:
            for file in package.rglob(name):
                copy = self.path / file.relative_to(package)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)

    def _apply(self) -> None:
        patches, digest = self.project.patches(), self.project.series_digest()
        say(f"Writing {self.name}: {len(patches)} patches ...")
        try:
            commit = series.apply(self.git, patches, in_tree=True)
        except PatchError as error:
            self._stop_at(error, patches)
        self._switch(commit)
        self._set_state(series=digest)

    def _switch(self, commit: str) -> None:
        """Writes the files of a commit that nothing is to be added to yet."""
        self.git("update-ref", NEXT, commit)
        self._set_state(series=None)
        self.git("reset", "--quiet", "--hard", commit)
        self.git("update-ref", SYNCED, commit)
        self.git("update-ref", "-d", NEXT)

    def _resume(self) -> None:
        """Ends a switch that was interrupted, if nothing was edited since."""
        commit = self.git.commit(NEXT)
        if not commit:
            return
        (self.path / ".git" / "index.lock").unlink(missing_ok=True)
        between = ["diff", "--name-only", "--no-renames", "-z", "HEAD", commit]
        if set(self._files()) <= set(self.git.names(*between)):
            self._switch(commit)
        else:
            self.git("update-ref", "-d", NEXT)

    def _stop_at(self, error: PatchError, patches: list[Path]) -> None:
        """Applies what applies, and leaves the tree where the user can go on."""
        git = f"git -C {self.name}"
        self._switch(BASE)
        try:
            series.am(self.git, patches, "--3way", in_tree=True)
        except PatchError:
            if not self.git.lines("diff", "--name-only", "--diff-filter=U"):
                # Git has no common ancestor to merge with: leave what does not fit.
                rest = self.path / ".git" / "rebase-apply" / "patch"
                self.git.run("apply", "--reject", *series.IN_TREE, rest)
            raise PatchError(
                f"{error}. {self.name} stands at this patch: mend the files there "
                f"(`{git} status`; hunks that did not fit are in *.rej files), "
                f"`{git} add` them, `{git} am --continue`, and then `make patches`."
            ) from None
        raise PatchError(
            f"{error}. Git could merge it in {self.name}: see that the result is right "
            f"(`{git} log -p`), and then `make patches`."
        )


def replace_patches(made: list[Path], folder: Path) -> list[str]:
    """Makes these the patches of a folder; returns the names of those that changed."""
    new = {patch.name: patch.read_bytes() for patch in made}
    old = {patch.name: patch.read_bytes() for patch in folder.glob("*.patch")}
    for name in old.keys() - new.keys():
        (folder / name).unlink()
    changed = [name for name in new if new[name] != old.get(name)]
    for patch in made:
        if patch.name in changed:
            partial = folder / f".{patch.name}.partial"
            partial.write_bytes(new[patch.name])
            partial.replace(folder / patch.name)
    return sorted({*changed, *(old.keys() - new.keys())})


def _list(things: list[str], name: str) -> str:
    """Such as "2 files (a, b)"."""
    plural, more = "s" * (len(things) > 1), ", ..." * (len(things) > 3)
    return f"{len(things)} {name}{plural} ({', '.join(sorted(things)[:3])}{more})"
