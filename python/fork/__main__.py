"""The fork's commands; `make` calls them. Run in python/: `python -m fork --help`."""

from __future__ import annotations

import argparse
import errno
import signal
import sys
from pathlib import Path

BASE = "refs/fork/base"


def base(args) -> None:
    """fetch the upstream wheel, check it and print its path"""
    from fork.base import fetch

    print(fetch(args.project))


def checkout(args) -> None:
    """write python/sglang: the base and the series"""
    from fork.tree import Tree

    Tree(args.project).checkout()


def export(args) -> None:
    """write the commits of python/sglang to patches/"""
    from fork.process import say
    from fork.tree import Tree

    for name in Tree(args.project).export():
        path = args.project.folder / name
        say(f"{'Wrote' if path.exists() else 'Removed'} {args.project.show(path)}")


def edit(args) -> None:
    """write python/sglang, and say where a change of one patch is committed"""
    from fork.tree import Tree

    tree = Tree(args.project)
    commit, files = tree.edit(args.patch)
    git = f"git -C {tree.name}"
    print(f"{args.patch} is the commit {commit} of {tree.name}; it changes")
    print("".join(f"    {tree.name}/{file}\n" for file in files), end="")
    print("Edit there, then")
    print(f"    {git} commit --all --fixup {commit}")
    print(f"    GIT_SEQUENCE_EDITOR=: {git} rebase -i --autosquash {BASE}")
    print("    make patches")


def verify(args) -> None:
    """prove that patches/ and python/sglang are what they should be"""
    from fork.verify import verify

    verify(args.project)


def prove(args) -> None:
    """prove of each patch, or of some, that its tests fail without it"""
    from fork.errors import ForkError
    from fork.prove import changed, prove, table

    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: sys.exit(1))  # ends the tests on its way
    chosen = args.patches or None
    if args.since:
        chosen = changed(args.project, args.since)
    proofs = prove(args.project, chosen)
    print(table(proofs), end="")
    failed = [p.name for p in proofs if p.reason in ("fails", "passes")]
    if failed:
        raise ForkError(
            f"{', '.join(failed)} {'is' if len(failed) == 1 else 'are'} not proved: see "
            "dist/prove/."
        )


def upstream(args) -> None:
    """write dist/upstream/: each patch with its tests, for git am; or one alone"""
    from fork.upstream import write_one, write_upstream

    one = [write_one(args.project, args.patch)] if args.patch else []
    for patch in one or write_upstream(args.project):
        print(args.project.show(patch))


def test(args) -> None:
    """run the tests of the series"""
    from fork.complete import test

    test(args.project, args.files)


def lint(args) -> None:
    """check the style of our files, and of the lines that the series adds"""
    from fork.lint import lint

    lint(args.project)


def port(args) -> None:
    """say which patches apply to a newer release of SGLang"""
    from fork.ci.watch import FILE, markdown
    from fork.port import report

    told = report(args.project, args.to)
    told.write(args.project.root / FILE)
    print(markdown(told), end="")


def rehearse(args) -> None:
    """apply dist/upstream/ to SGLang's own repository at the tag"""
    from fork.rehearse import rehearse

    rehearse(args.project, args.repository)


def smoke(args) -> None:
    """install the wheel of dist/wheels/ alone, and have it answer"""
    from fork.release import smoke

    smoke(args.project, args.port, args.dependencies)


def release(args) -> None:
    """write dist/release/: the wheels, sdist, patches, notes and checksums"""
    from fork.release import write_release

    for path in write_release(args.project, args.tag):
        print(args.project.show(path))


COMMANDS = (base, checkout, edit, export, verify, prove, upstream, test, lint)
COMMANDS += (port, rehearse, smoke, release)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fork", description=__doc__)
    parser.add_argument(
        "--series",
        metavar="RELEASE",
        help="a folder of patches/ other than the one that pyproject.toml names",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        added = commands.add_parser(command.__name__, help=command.__doc__)
        added.set_defaults(command=command)
        if command is edit:
            added.add_argument("patch", help="its name")
        elif command is upstream:
            added.add_argument("patch", nargs="?", help="dist/alone/ with this one")
        elif command is prove:
            added.add_argument("patches", nargs="*", help="all of them unless named")
            added.add_argument(
                "--since", default="", metavar="COMMIT", help="those changed since"
            )
        elif command is test:
            added.add_argument("files", nargs="*", help="all of them unless named")
        elif command is port:
            added.add_argument(
                "--to", default="", metavar="RELEASE", help="the newest unless named"
            )
        elif command is rehearse:
            added.add_argument("--repository", required=True)
        elif command is smoke:
            added.add_argument("--port", type=int, default=30000)
            added.add_argument(
                "--dependencies",
                type=Path,
                help="a site-packages that has what the wheel requires",
            )
        elif command is release:
            added.add_argument("--tag", default="", help="the tag that is released")
    return parser.parse_args()


def main() -> str | int:
    args = parse()
    try:
        from fork.errors import ForkError
        from fork.project import Project
    except ModuleNotFoundError as error:
        return (
            f"error: {sys.executable} has no {error.name}: run "
            f"`{sys.executable} -m pip install packaging wheel tomli`."
        )
    try:
        args.project = Project.load(args.series)
        args.command(args)
    except ForkError as error:
        return f"error: {error}"
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return f"error: The disk of {error.filename} is full: make room, run again."
        return f"error: {error.strerror}: {error.filename}."
    except KeyboardInterrupt:
        return "error: Interrupted; nothing is lost, run it again."
    return 0


if __name__ == "__main__":
    sys.exit(main())
