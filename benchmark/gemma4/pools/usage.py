"""Reads from a server's log how full its KV pools were, minute by minute.

    python -m gemma4 pools usage before.log after.log --plot pictures
    python -m gemma4 pools usage some.log --seconds 10

One table a log: the fullest each pool was, the most requests that ran and waited,
the prompt tokens prefilled and the requests retracted. A server logs a line every
--decode-log-interval steps, so a smaller interval sees more. `serve` flushes the cache
before each load: of a log with several, the load that prefilled the most is read.
"""

import argparse
import dataclasses
import re
from datetime import datetime
from pathlib import Path
from typing import Dict, List

from gemma4.errors import UserError
from gemma4.pools.output import add_files, keep, show_table
from gemma4.report.results import Results

TIME = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)")
NUMBERS = {
    "full": re.compile(r"full token usage: ([\d.]+)"),
    "swa": re.compile(r"swa token usage: ([\d.]+)"),
    "running": re.compile(r"#running-req: (\d+)"),
    "waiting": re.compile(r"#queue-req: (\d+)"),
    "prefilled": re.compile(r"Prefill batch.*#new-token: (\d+)"),
    "retracted": re.compile(r"#retracted_reqs: (\d+)"),
}
SUMMED = ("prefilled", "retracted")
FLUSHED, ENDED = "Cache flushed successfully", '"GET /server_info'


@dataclasses.dataclass
class Span:
    """From `second` after the first batch: usage is the highest, a share of the pool."""

    second: int
    full: float = 0
    swa: float = 0
    running: int = 0
    waiting: int = 0
    prefilled: int = 0
    retracted: int = 0


def read_log(path: str, seconds: int = 60) -> List[Span]:
    """Returns the spans of so many seconds in which a batch was logged.

    Raises:
        ValueError: the log names no SWA pool.
    """
    text = Path(path).read_text(errors="replace")
    _, *parts = text.split(FLUSHED)
    # bench_serving asks about the server when a load is over.
    parts = [part.partition(ENDED)[0] for part in parts] or [text]
    loads = [_read(part, seconds) for part in parts]
    if not NUMBERS["swa"].search(text):
        raise ValueError(f"{path} has no line with a SWA token usage.")
    return max(loads, key=lambda load: sum(row.prefilled for row in load))


def _read(text: str, seconds: int) -> List[Span]:
    spans: Dict[int, Span] = {}
    start = None
    for line in text.splitlines():
        time = TIME.search(line)
        found = {name: p.search(line) for name, p in NUMBERS.items()}
        if not time or not any(found.values()):
            continue
        now = datetime.fromisoformat(time[1])
        start = start or now
        second = int((now - start).total_seconds()) // seconds * seconds
        row = spans.setdefault(second, Span(second))
        for name, match in found.items():
            if match:
                value = float(match[1])
                if name not in ("full", "swa"):
                    value = int(value)
                old = getattr(row, name)
                setattr(row, name, old + value if name in SUMMED else max(old, value))
    return sorted(spans.values(), key=lambda row: row.second)


def show(path: str, rows: List[Span]) -> None:
    total = {name: sum(getattr(row, name) for row in rows) for name in SUMMED}
    title = (
        f"{path}: {total['prefilled']:,} prompt tokens prefilled, "
        f"{total['retracted']} requests retracted"
    )
    cells = []
    for row in rows:
        values = dataclasses.asdict(row)
        values["full"], values["swa"] = f"{row.full:.0%}", f"{row.swa:.0%}"
        cells.append([str(value) for value in values.values()])
    show_table(title, [field.name for field in dataclasses.fields(Span)], cells)


def to_results(logs: Dict[str, List[Span]], name: str) -> Results:
    """The spans of all logs as a result file."""
    results = Results.start("pools", name, "KV pool usage")
    for log, rows in logs.items():
        for row in rows:
            case = {"log": log, "second": row.second}
            results.add(case, "full", "usage", "% of the pool", [100 * row.full])
            results.add(case, "SWA", "usage", "% of the pool", [100 * row.swa])
            for arm in ("running", "waiting", "retracted"):
                count = getattr(row, arm)
                results.add(case, arm, "requests", "requests", [count])
            results.add(case, "prompts", "prefilled", "tokens", [row.prefilled])
    return results


def arguments(parser) -> None:
    parser.add("logs", "The servers' logs.", nargs="+", metavar="LOG")
    parser.add("--seconds", "How long a line of the table is.", 60)
    add_files(parser)


def run(args: argparse.Namespace) -> None:
    try:
        logs = {Path(path).stem: read_log(path, args.seconds) for path in args.logs}
    except (OSError, ValueError) as e:
        raise UserError(str(e), 2) from None
    for name, rows in logs.items():
        show(name, rows)
    keep(args, "pool-usage", lambda name: to_results(logs, name))
