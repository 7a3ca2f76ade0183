"""The options that commands share, each defined once, and what they mean."""

import argparse
from pathlib import Path
from typing import Iterable, List

from gemma4.engines.host import CACHE, START_SECONDS
from gemma4.errors import UserError
from gemma4.report.results import FOLDER


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0.")
    return int(text)


def listed(text: str) -> List[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


class Parser(argparse.ArgumentParser):
    """A command's, with the options that several have."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see --help.\n")

    def add(self, names: str, sentence: str, default=None, to=None, **more) -> None:
        """Adds an option, or a word that has to be there.

        Args:
            names: Such as `--loads/--load`.
            default: It says what values are: a number's are whole numbers above 0 unless
                `type` says otherwise.
            to: A group of the parser's.
        """
        if "type" not in more and "action" not in more:
            kinds = {int: positive, float: float, list: listed}
            more["type"] = kinds.get(type(default), str)
        if default not in (None, "", []):
            shown = " ".join(map(str, default)) if type(default) is tuple else default
            shown = ",".join(default) if type(default) is list else shown
            sentence = f"{sentence[:-1]} (default: {shown})."
        if default is not None:
            more["default"] = default
        (to or self).add_argument(*names.split("/"), help=sentence, **more)

    def add_result(self, name: str) -> None:
        self.add("--name", "Names the result file.", name)
        self.add("--out", "The folder that gets the result file.", FOLDER, type=Path)

    def add_logs(self) -> None:
        self.add("--logs", "The folder that gets the logs.", CACHE / "logs", type=Path)

    def add_arms(self, default: str) -> None:
        """What is compared; `default` is what --arms means where no arm is named."""
        self.set_defaults(default_arms=listed(default))
        sentence = f"Compares these arms (default: {default})."
        self.add("--arms", sentence, [], metavar="A,B")
        sentence = (
            "Adds an arm: NAME=FLAGS, or NAME@WHERE=FLAGS in another environment."
        )
        self.add("--arm", sentence, [], action="append", metavar="ARM")

    def add_port(self) -> None:
        self.add("--port", "The port of the server.", 30000, type=int)

    def add_servers(self, flags: bool = True) -> None:
        """How servers are started, and where they log."""
        self.add_port()
        self.add_logs()
        sentence = "How many seconds a server may take to start."
        self.add("--start-timeout", sentence, START_SECONDS, type=float, metavar="S")
        if flags:
            self.add("--flags", "Adds flags to every server of SGLang.", "")

    def add_shape(self) -> None:
        self.add("--shape", "The model's shape, with random weights.", "26b-a4b")

    def add_model(self) -> None:
        self.add_shape()
        self.add("--model", "Serves this checkpoint instead of a shape.", type=Path)
        self.add("--draft", "The checkpoint of the model's MTP draft.", type=Path)

    def add_plot(self) -> None:
        sentence = "Draws the result into this folder, as SVG."
        self.add("--plot", sentence, type=Path, metavar="FOLDER")

    def add_picture_size(self) -> None:
        self.add("--height", "The height of the pictures, in pixels.", 480)
        self.add("--width", "The width of the pictures, in pixels.", 640)


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
