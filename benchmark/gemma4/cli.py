"""The door: finds the command that is meant, and runs it."""

import argparse
import errno
import importlib
import sys
from typing import List, Optional

from gemma4.arguments import Parser
from gemma4.engines.process import interruptible
from gemma4.errors import UserError

# Name: its module, and what it does. A module has `arguments` and `run`, and its
# docstring is the command's description.
COMMANDS = {
    "launch": ("engines.launch", "Serves one model, for `make serve`."),
    "demo": ("engines.demo", "Serves, asks one question and stops, for `make demo`."),
    "serve": ("serve.command", "Sends servers of several arms the same loads."),
    "profile": ("profile.command", "Shows where the GPU time of a step goes."),
    "kernel routing": ("kernels.routing", "Times the router."),
    "kernel decode": ("kernels.decode", "Times the kernels of a decode step."),
    "kernel verify": ("kernels.verify", "Times the attention of a verify step."),
    "kernel extend": ("kernels.extend", "Times the attention of a prefill."),
    "kernel experts": ("kernels.experts", "Tunes and times the tiles of the experts."),
    "kernel expert-layer": ("kernels.expert_layer", "Times a layer's experts."),
    "kernel vision": ("kernels.vision", "Times the vision tower."),
    "start": ("serve.start", "Times starts, and the first requests after them."),
    "picture-prompt": ("serve.picture_prompt", "Times prompts with a picture."),
    "tokenizers": ("text.tokenizers", "Times what makes token ids of a prompt."),
    "parsers": ("text.parsers", "Times the parsers of thoughts and tool calls."),
    "quality": ("quality.command", "Compares answers with those of transformers."),
    "pictures": ("quality.pictures", "Compares answers about pictures."),
    "train": ("quality.training", "Trains the model that `quality` asks."),
    "pools plan": ("pools.planner", "Says how many requests fit in the KV pools."),
    "pools usage": ("pools.usage", "Reads from a log how full the pools were."),
    "checkpoint": ("engines.checkpoint", "Writes a checkpoint with random weights."),
    "report tables": ("report.documents", "Fills in the tables of documents."),
    "report plot": ("report.plot", "Draws the pictures of a result."),
    "report steps": ("report.steps", "Draws host and GPU in steps with MTP."),
    "report tiles": ("report.tiles", "Draws the tiles of the extend kernel."),
    "report environment": ("report.machine", "Lists what is installed here."),
}


def usage(group: str = "") -> str:
    """The commands, or those of a group such as `kernel`."""
    shown = {n: does for n, (_, does) in COMMANDS.items() if n.startswith(group)}
    lines = [f"    {name:20}{does}" for name, does in shown.items()]
    head = f"usage: python -m gemma4 {group or 'COMMAND'} …"
    return "\n".join([head, "", *lines, "", "Each command has --help."])


def main(argv: Optional[List[str]] = None) -> int:
    """Runs a command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    for words in (1, 2):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return run(name, argv[words:])
    group = argv[0] if argv else ""
    if not any(name.startswith(f"{group} ") for name in COMMANDS):
        group = ""
    if argv[-1:] in (["--help"], ["-h"]):
        print(usage(group))
        return 0
    print(usage(group), file=sys.stderr)
    return 2


def run(name: str, argv: List[str]) -> int:
    """Runs the command of this name, and ends with one sentence where it cannot: on bad
    input, a full disk, a signal."""
    program = f"gemma4 {name}"
    try:
        with interruptible():
            module = importlib.import_module(f"gemma4.{COMMANDS[name][0]}")
            if not hasattr(module, "run"):
                from gemma4.kernels.runner import Operation

                module = Operation(module)
            parser = Parser(
                prog=f"python -m {program}",
                description=module.__doc__,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            module.arguments(parser)
            return module.run(parser.parse_args(argv)) or 0
    except UserError as e:
        print(f"{program}: {e}", file=sys.stderr)
        return e.status
    except OSError as e:
        where = f": {e.filename}" if e.filename else ""
        said = f"{e.strerror or e}{where}"
        if e.errno == errno.ENOSPC:
            said = f"the disk is full{where}; make room, and run the same command again"
        print(f"{program}: {said}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"{program}: interrupted; no server is left, and the same command goes on "
            "from what was saved.",
            file=sys.stderr,
        )
        return 130
