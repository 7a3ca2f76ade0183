"""The one format of this project's results: a JSON file for each run.

    {
      "schema": 1,
      "kind": "kernels",              serving, kernels, pools or quality
      "name": "routing-h200",         the file's own name
      "title": "The fused router",    one line for pictures and tables
      "started": "2026-01-31T12:00:00+00:00",
      "command": "python benchmark/gemma4/bench_routing.py --name routing-h200",
      "commit": "0123abc", "dirty": false,
      "hardware": {"gpu": "NVIDIA H200", "gpus": 1, "driver": "580.1", "cpu": "..."},
      "versions": {"python": "3.12.3", "torch": "2.11.0", ...},
      "environment": "5f0c...",       of every distribution of the measuring Python
      "settings": {...},              what applies to every record
      "notes": ["..."],               what a reader must know beside a figure
      "records": [
        {"case": {"tokens": 80, "dtype": "bfloat16"},   what was measured
         "arm": "fork",                                 which code was
         "metric": "time", "unit": "us",
         "samples": [1.38, 1.40, 1.38]}                 raw, in the order taken
      ]
    }

A record is known by its (case, arm, metric); a run that is resumed finds what it has
with `Results.get` and adds the rest. Median and spread are computed from the samples,
never stored beside them, so that they cannot disagree.

`environment` is the sha256 of the lines that `results.py --environment` prints, one
NAME==VERSION for each distribution; results from before it was recorded have none. It is
of the Python that measures: an arm in an environment of its own has another.

Tables in the documentation are generated too, between two comments:

    <!-- table routing-h200 metric=time dtype=bfloat16 -->
    <!-- end of table -->

where `against=ARM` adds a column of ratios to that arm for each other one.

    python benchmark/gemma4/results.py docs/*.md            fill them in
    python benchmark/gemma4/results.py --check docs/*.md    fail when one differs
    python benchmark/gemma4/results.py --environment        list this environment
"""

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Union

SCHEMA = 1
KINDS = ("serving", "kernels", "pools", "quality")
FOLDER = Path(__file__).parent / "results"
MARKED_TABLE = re.compile(
    r"(<!-- table (\S+) (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL
)
PACKAGES = ("sglang", "torch", "triton", "transformers", "vllm", "flashinfer-python")

Case = Dict[str, Union[str, int, float, bool]]


@dataclass
class Record:
    """Samples of one metric of one arm in one case."""

    case: Case
    arm: str
    metric: str
    unit: str
    samples: List[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.samples) < 2 or not self.median:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2 / abs(self.median)


@dataclass
class Results:
    """What one run measured, where, with what."""

    kind: str
    name: str
    title: str
    settings: Dict[str, object] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)
    records: List[Record] = field(default_factory=list)
    started: str = ""
    command: str = ""
    commit: str = ""
    dirty: bool = False
    hardware: Dict[str, object] = field(default_factory=dict)
    versions: Dict[str, str] = field(default_factory=dict)
    environment: str = ""

    @classmethod
    def start(cls, kind: str, name: str, title: str, **settings) -> "Results":
        """A new, empty result that describes this machine, checkout and command."""
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        commit, dirty = _commit()
        return cls(
            kind=kind,
            name=name,
            title=title,
            settings=settings,
            started=datetime.datetime.now(datetime.timezone.utc).isoformat(
                "T", "seconds"
            ),
            command=shlex.join([Path(sys.executable).name, *map(_shown, sys.argv)]),
            commit=commit,
            dirty=dirty,
            hardware=hardware(),
            versions=_versions(),
            environment=hashlib.sha256(environment().encode()).hexdigest(),
        )

    def add(
        self, case: Case, arm: str, metric: str, unit: str, samples: List[float]
    ) -> Record:
        """Appends a record; a (case, arm, metric) that is there already is an error."""
        if not samples:
            raise ValueError(f"no samples for {metric} of {arm} in {case}")
        if self.get(case, arm, metric) is not None:
            raise ValueError(f"{metric} of {arm} in {case} is recorded already")
        record = Record(dict(case), arm, metric, unit, [float(s) for s in samples])
        self.records.append(record)
        return record

    def append(
        self, case: Case, arm: str, metric: str, unit: str, sample: float
    ) -> Record:
        """Adds one sample to a record, which is made if it is not there."""
        record = self.get(case, arm, metric)
        if record is None:
            return self.add(case, arm, metric, unit, [sample])
        record.samples.append(float(sample))
        return record

    def get(self, case: Case, arm: str, metric: str) -> Optional[Record]:
        """The record of exactly this case, arm and metric, or None."""
        for record in self.records:
            if (record.case, record.arm, record.metric) == (case, arm, metric):
                return record
        return None

    def select(
        self, arm: Optional[str] = None, metric: Optional[str] = None, **case
    ) -> Iterator[Record]:
        """The records of this arm and metric whose case has these values."""
        for record in self.records:
            if arm in (None, record.arm) and metric in (None, record.metric):
                if case.items() <= record.case.items():
                    yield record

    def arms(self) -> List[str]:
        """Every arm, in the order of the records."""
        return list(dict.fromkeys(record.arm for record in self.records))

    def save(self, path: Optional[Path] = None) -> Path:
        """Writes the file whole or not at all; by default results/NAME.json."""
        path = Path(path or FOLDER / f"{self.name}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {
            name: getattr(self, name)
            for name in (
                *("kind", "name", "title", "started", "command", "commit", "dirty"),
                *("hardware", "versions", "environment", "settings", "notes"),
            )
            if name != "environment" or self.environment
        }
        head = json.dumps({"schema": SCHEMA, **fields}, indent=2, ensure_ascii=False)
        # A record a line: a changed figure is a changed line.
        lines = ",\n".join(
            "    " + json.dumps(vars(record), ensure_ascii=False)
            for record in self.records
        )
        text = f'{head[:-2]},\n  "records": [\n{lines}\n  ]\n}}\n'
        with contextlib.ExitStack() as stack:
            handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            stack.callback(Path(partial).unlink, missing_ok=True)
            try:
                with open(handle, "w") as file:
                    file.write(text)
                os.chmod(partial, 0o644)
                os.replace(partial, path)
            except OSError as e:
                e.filename = str(path)  # a full disk does not say which
                raise
        return path


def load(path: Union[str, Path]) -> Results:
    """Reads a result file.

    Raises:
        ValueError: The file is no result of this schema; the message says what is wrong.
    """
    try:
        data = json.loads(Path(path).read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not JSON: {e}") from e
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path} must have schema {SCHEMA}, got {found!r}")
    data.pop("schema")
    try:
        records = [Record(**record) for record in data.pop("records")]
        results = Results(**data, records=records)
    except (KeyError, TypeError) as e:
        raise ValueError(f"{path} is not a result of schema {SCHEMA}: {e}") from e
    if results.kind not in KINDS:
        raise ValueError(
            f"{path}: kind must be one of {', '.join(KINDS)}, got {results.kind!r}"
        )
    return results


def axis(records: List[Record]) -> str:
    """The part of the case with the most values, numbers before words."""
    values: Dict[str, set] = {}
    for record in records:
        for key, value in record.case.items():
            values.setdefault(key, set()).add(value)

    def order(key: str) -> tuple:
        found = values[key]
        return all(map(is_number, found)) and len(found) > 1, len(found)

    return max(values, key=order, default="")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def table(results: Results, metric: str, against: Optional[str] = None, **case) -> str:
    """A Markdown table of medians: a row a case, a column an arm.

    The widest spread of its cells stands in the head beside the unit. With `against`,
    the name of an arm, each other arm has a column of its ratio to that one.

    Raises:
        ValueError: No record has this metric and these values of the case.
    """
    records = list(results.select(metric=metric, **case))
    if not records:
        raise ValueError(f"{results.name} has no {metric} for {case}")
    keys = [key for key in records[0].case if key not in case]
    arms = list(dict.fromkeys(record.arm for record in records))
    rows: Dict[tuple, Dict[str, Record]] = {}
    for record in records:
        row = tuple(record.case[key] for key in keys)
        rows.setdefault(row, {})[record.arm] = record
    spread = max(record.spread for record in records)
    unit = f"{records[0].unit}, ± {spread:.1%}" if spread else records[0].unit
    others = [arm for arm in arms if arm != against] if against else []
    head = [f"{', '.join(keys)} ({metric}, {unit})", *arms]
    head += [f"{arm} / {against}" for arm in others]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row, cells in rows.items():
        medians = {arm: cells[arm].median for arm in arms if arm in cells}
        shown = [_figure(medians[arm]) if arm in medians else "" for arm in arms]
        for arm in others:
            both = arm in medians and medians.get(against)
            shown.append(f"{medians[arm] / medians[against]:.2f} ×" if both else "")
        lines.append([", ".join(map(str, row)), *shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def tables(results: Results) -> List[str]:
    """Every table of a result: one for each metric and each value off the axis."""
    row = axis(results.records)
    rest = {
        (r.metric, *((k, v) for k, v in r.case.items() if k != row)): None
        for r in results.records
    }
    return [
        f"{', '.join(str(v) for _, v in case)}\n\n{table(results, metric, **dict(case))}"
        for metric, *case in rest
    ]


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


def _shown(argument: str) -> str:
    """An argument as others can type it: relative to the repository, or to nothing."""
    option, equals, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return argument
    root = Path(__file__).resolve().parents[2]
    inside = path.is_relative_to(root)
    return f"{option}{equals}{path.relative_to(root) if inside else path.name}"


def _commit() -> tuple:
    """The checkout's commit and whether tracked files differ; ("", False) without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = _output([*git, "rev-parse", "--short=12", "HEAD"])
        return head, bool(_output([*git, "status", "--porcelain", "-uno"]))
    except (OSError, subprocess.CalledProcessError):
        return "", False


def _output(command: List[str]) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout.strip()


def hardware() -> Dict[str, object]:
    found: Dict[str, object] = {"cpu": platform.machine(), "cores": os.cpu_count()}
    try:
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version",
            "--format=csv,noheader",
        ]
        gpus = [line.split(", ") for line in _output(query).splitlines()]
    except (OSError, subprocess.CalledProcessError):
        gpus = []
    if gpus:
        found.update(gpu=gpus[0][0], gpus=len(gpus), driver=gpus[0][1])
    return found


def _versions() -> Dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return versions


def environment() -> str:
    """A line for each installed distribution, such as ``torch==2.11.0``, sorted."""
    found = set()
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # what a broken removal leaves has none
            name = re.sub(r"[-_.]+", "-", name).lower()
            found.add(f"{name}=={distribution.version}\n")
    return "".join(sorted(found))


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill in the tables of documents.")
    parser.add_argument("documents", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument(
        "--environment", action="store_true", help="list what is installed instead"
    )
    args = parser.parse_args()
    if args.environment:
        print(environment(), end="")
        return
    if not args.documents:
        parser.error("name the documents whose tables are to be filled in")
    stale = []
    for document in args.documents:
        try:
            text = document.read_text()
            filled = fill_in(text)
        except (OSError, ValueError, KeyError) as e:
            parser.exit(1, f"{document}: {e}\n")
        if filled != text:
            stale.append(str(document))
            if not args.check:
                document.write_text(filled)
    if args.check and stale:
        parser.exit(1, f"tables differ from results/: {', '.join(stale)}\n")


if __name__ == "__main__":
    main()
