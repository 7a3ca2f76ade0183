"""Runs git, pip and wheel so that nobody's settings change a result."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

from fork.errors import ForkError

# Settings that change what git reads or writes, at their defaults. The user's own
# configuration is not read; these also beat the repository's.
CONFIG = {
    "am.threeWay": "false",
    "commit.gpgSign": "false",
    "core.abbrev": "auto",
    "core.attributesFile": os.devnull,
    "core.autocrlf": "false",
    "core.compression": "0",  # one form of binary patches, whichever zlib git has
    "core.excludesFile": os.devnull,
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "core.quotePath": "true",
    "diff.context": "3",
    "diff.interHunkContext": "0",
    "diff.noprefix": "false",
    "diff.orderFile": os.devnull,
    "diff.suppressBlankEmpty": "false",
    "format.filenameMaxLength": "64",
    "gc.auto": "0",
    "i18n.commitEncoding": "UTF-8",
    "i18n.logOutputEncoding": "UTF-8",
    "init.defaultBranch": "fork",
    "log.showSignature": "false",
    "mailinfo.scissors": "false",
    "safe.directory": "*",
}
COMMITTER = {
    "GIT_COMMITTER_NAME": "SGLang fork",
    "GIT_COMMITTER_EMAIL": "fork@localhost",
}
AUTHOR = {
    name.replace("COMMITTER", "AUTHOR"): value for name, value in COMMITTER.items()
}
EPOCH = "946684800"  # 2000-01-01, the date of whatever must not depend on the clock


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def run(
    command: list[str | Path], *, cwd: Path, **kwargs
) -> subprocess.CompletedProcess:
    """Runs a command to its end, its output captured as text of any bytes.

    Raises:
        OSError: The disk is full, which few commands say so that one can tell.
    """
    done = subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        **kwargs,
    )
    if done.returncode:
        told = "No space left on device" in done.stdout + done.stderr
        if told or shutil.disk_usage(cwd).free < 1 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(cwd))
    return done


def last_line(done: subprocess.CompletedProcess) -> str:
    lines = (done.stdout + done.stderr).strip().splitlines()
    told = [ln for ln in lines if ln.lower().startswith(("fatal:", "error:"))]
    return (told or lines or [f"exit status {done.returncode}"])[-1]


def run_module(*args: str | Path, cwd: Path) -> None:
    """Runs ``python -m`` with these arguments.

    Raises:
        ForkError: It failed, with its last line.
    """
    done = run([sys.executable, "-m", *args], cwd=cwd)
    if f"No module named {args[0]}" in done.stderr:
        install = f"{sys.executable} -m pip install {args[0]}"
        raise ForkError(f"{sys.executable} has no {args[0]}: run `{install}`.")
    if done.returncode:
        raise ForkError(f"`python -m {args[0]} {args[1]}` failed: {last_line(done)}.")


class GitError(ForkError):
    def __init__(self, command: str, done: subprocess.CompletedProcess):
        super().__init__(f"`git {command}` failed: {last_line(done)}.")
        self.output = done.stdout + done.stderr


class Git:
    """Git in one folder, which has to be the root of a repository or of a worktree.

    Calling it runs a git command and returns what that wrote.
    """

    def __init__(self, folder: Path, **env: str | Path):
        self.folder = folder
        self.env = env

    def __call__(self, *args: str | Path, input: str | None = None, **env) -> str:
        done = self.run(*args, input=input, **env)
        if done.returncode:
            raise GitError(str(args[0]), done)
        return done.stdout

    def run(self, *args, input=None, config=(), **env) -> subprocess.CompletedProcess:
        git = shutil.which("git")
        if git is None:
            raise ForkError(
                "git is not installed, or not on PATH; it applies the patches: "
                "install it and run again."
            )
        command = [git]
        for name, value in {**CONFIG, **dict(config)}.items():
            command += ["-c", f"{name}={value}"]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        env = {
            **kept,
            **COMMITTER,
            "GIT_ATTR_NOSYSTEM": "1",
            # Never the repository that the folder happens to lie in.
            "GIT_CEILING_DIRECTORIES": str(self.folder.resolve().parent),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_LITERAL_PATHSPECS": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "HOME": os.devnull,
            "XDG_CONFIG_HOME": os.devnull,
            "LC_ALL": "C",
            "TZ": "UTC",
            **{k: str(v) for k, v in {**self.env, **env}.items()},
        }
        return run([*command, *args], cwd=self.folder, env=env, input=input)

    def lines(self, *args: str | Path) -> list[str]:
        return self(*args).splitlines()

    def names(self, *args: str | Path) -> list[str]:
        """What a command with ``-z`` lists."""
        return [name for name in self(*args).split("\0") if name]

    def commit(self, revision: str) -> str | None:
        """The id of the commit of this name, if there is one."""
        done = self.run("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
        return done.stdout.strip() or None
