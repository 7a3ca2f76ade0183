"""Fills in the tables of documents from the results that they name.

    python -m gemma4 report tables README.md docs/*.md docs/results/*.md
    python -m gemma4 report tables --check docs/*.md

A table stands between two comments that say of which result, metric and part of the case
it is; `against=ARM` adds a column of ratios to that arm for each other one:

    <!-- table routing-h200 metric=time dtype=bfloat16 -->
    <!-- end of table -->
"""

import re
import shlex
from pathlib import Path

from gemma4.errors import UserError
from gemma4.report.results import FOLDER, load
from gemma4.report.tables import table

MARKED_TABLE = re.compile(
    r"(<!-- table (\S+) (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL
)


def fill_in(text: str, folder: Path = FOLDER) -> str:
    """The text with every marked table replaced by what its result file says."""

    def replaced(match: re.Match) -> str:
        begin, name, choice, end = match.groups()
        results = load(folder / f"{name}.json")
        chosen = dict(part.split("=", 1) for part in shlex.split(choice))
        metric, against = chosen.pop("metric"), chosen.pop("against", None)
        values = {str(v): v for r in results.records for v in r.case.values()}
        case = {key: values.get(value, value) for key, value in chosen.items()}
        return f"{begin}\n{table(results, metric, against, **case)}\n\n{end}"

    return MARKED_TABLE.sub(replaced, text)


def arguments(parser) -> None:
    parser.add("documents", "Those that have tables.", type=Path, nargs="+")
    sentence = "Fails where a table differs, and changes none."
    parser.add("--check", sentence, action="store_true")


def run(args) -> None:
    stale = []
    for document in args.documents:
        try:
            text = document.read_text()
            filled = fill_in(text)
        except (OSError, ValueError, KeyError) as e:
            raise UserError(f"{document}: {e}") from None
        if filled != text:
            stale.append(str(document))
            if not args.check:
                document.write_text(filled)
    if args.check and stale:
        raise UserError(f"Tables differ from results/: {', '.join(stale)}.")
