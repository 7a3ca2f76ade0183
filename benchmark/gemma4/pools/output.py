"""What the commands of pools give: a table here, a result file and its pictures."""

import argparse
import sys
from pathlib import Path
from typing import Callable, List

from gemma4.report.results import Results


def add_files(parser) -> None:
    parser.add_plot()
    parser.add("--json", "Writes a result file.", metavar="FILE")


def show_table(title: str, names: List[str], rows: List[List[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title)
    for name in names:
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 100).print(shown)


def keep(
    args: argparse.Namespace, name: str, results_of: Callable[[str], Results]
) -> None:
    """Writes and draws the result where that is asked for; `name` is its name where no
    file says another."""
    if not (args.json or args.plot):
        return
    results = results_of(Path(args.json).stem if args.json else name)
    if args.json:
        results.save(args.json)
    if args.plot:
        from gemma4.report.plot import draw

        draw(results, args.plot)
