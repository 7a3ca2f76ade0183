"""The fork's commands; `make` calls them. Run in python/: `python -m fork --help`."""

from __future__ import annotations

import argparse
import errno
import sys


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


def verify(args) -> None:
    """prove that patches/ and python/sglang are what they should be"""
    from fork.verify import verify

    verify(args.project)


def upstream(args) -> None:
    """write dist/upstream/: each patch with the files it adds, for git am"""
    from fork.upstream import write_upstream

    for patch in write_upstream(args.project):
        print(args.project.show(patch))


def lint(args) -> None:
    """check the style of our files, and of the lines that the series adds"""
    from fork.lint import lint

    lint(args.project)


def serve(args) -> None:
    """serve Gemma 4 from python/sglang"""
    from fork.serve import serve

    serve(args.project, args.port, args.model)


def demo(args) -> None:
    """serve, ask one question, stream the answer, stop"""
    from fork.serve import demo

    demo(args.project, args.port, args.model)


COMMANDS = (base, checkout, export, verify, upstream, lint, serve, demo)


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
        if command in (serve, demo):
            added.add_argument("--port", type=int, default=30000)
            added.add_argument(
                "--model", default="", help="a checkpoint, or a tiny one"
            )
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
