"""The options that commands share, each defined once, and what they mean."""

import argparse
from pathlib import Path
from typing import Iterable, List

from gemma4.engines.host import CACHE, START_SECONDS
from gemma4.errors import UserError
from gemma4.report.results import FOLDER

DEFAULT_PORT = 30000


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0.")
    return int(text)


def listed(text: str) -> List[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def add_result(parser, name: str) -> None:
    parser.add_argument(
        "--name", default=name, help=f"Names the result file (default: {name})."
    )
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="The folder that gets the result file."
    )


def add_logs(parser) -> None:
    parser.add_argument(
        "--logs",
        type=Path,
        default=CACHE / "logs",
        help="The folder that gets the logs (default: .cache/logs).",
    )


def add_arms(parser, default: str) -> None:
    """What is compared; `default` is what --arms means where no arm is named."""
    parser.set_defaults(default_arms=listed(default))
    parser.add_argument(
        "--arms",
        type=listed,
        default=[],
        metavar="A,B",
        help=f"Compares these arms (default: {default}).",
    )
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="ARM",
        help="Adds an arm: NAME=FLAGS, or NAME@WHERE=FLAGS in another environment.",
    )


def add_port(parser) -> None:
    parser.add_argument(
        "--port",
        type=int,
        default=DEFAULT_PORT,
        help=f"The port of the server (default: {DEFAULT_PORT}).",
    )


def add_servers(parser, flags: bool = True) -> None:
    """How servers are started, and where they log."""
    add_port(parser)
    add_logs(parser)
    parser.add_argument(
        "--start-timeout",
        type=float,
        default=START_SECONDS,
        metavar="SECONDS",
        help="How long a server may take to start.",
    )
    if flags:
        parser.add_argument(
            "--flags", default="", help="Adds flags to every server of SGLang."
        )


def add_model(parser) -> None:
    parser.add_argument(
        "--shape",
        default="26b-a4b",
        help="Serves random weights of this shape (default: 26b-a4b).",
    )
    parser.add_argument(
        "--model", type=Path, help="Serves this checkpoint instead of a shape."
    )
    parser.add_argument(
        "--draft", type=Path, help="The checkpoint of the model's MTP draft."
    )


def add_plot(parser) -> None:
    parser.add_argument(
        "--plot", type=Path, metavar="FOLDER", help="Draws the result there, as SVG."
    )


def add_picture_size(parser) -> None:
    for side, pixels in (("height", 480), ("width", 640)):
        parser.add_argument(
            f"--{side}",
            type=positive,
            default=pixels,
            help=f"The {side} of the pictures, in pixels (default: {pixels}).",
        )


def result_path(args: argparse.Namespace) -> Path:
    return args.out / f"{args.name}.json"


def new_result_path(args: argparse.Namespace) -> Path:
    """Raises UserError if there is a result of this name."""
    path = result_path(args)
    if path.exists():
        raise UserError(f"{path} exists: give another --name, or remove it.")
    return path


def check_shapes(option: str, names: Iterable[str]) -> None:
    """Raises UserError unless the checkpoint factory knows all of them."""
    from gemma4.checkpoint import SHAPES

    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise UserError(
            f"{option} {', '.join(unknown)}: choose of {', '.join(SHAPES)}."
        )
