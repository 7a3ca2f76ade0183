"""The one format of this project's results: a JSON file for each run.

    {
      "schema": 1,
      "kind": "kernels",              serving, kernels, pools or quality
      "name": "routing-h200",         the file's own name
      "title": "The fused router",    one line for pictures and tables
      "started": "2026-01-31T12:00:00+00:00",
      "command": "python -m gemma4 kernel routing --name routing-h200",
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

`environment` is the sha256 of what `report environment` prints; results from before it
was recorded have none. It is of the Python that measures: an arm in an environment of
its own has another. Commands were other ones before the programs became a package.
"""

import contextlib
import datetime
import hashlib
import json
import os
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Union

from gemma4.errors import UserError
from gemma4.report import machine

SCHEMA = 1
KINDS = ("serving", "kernels", "pools", "quality")
FOLDER = Path(__file__).parents[1] / "results"

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
        commit, dirty = machine.commit()
        return cls(
            kind=kind,
            name=name,
            title=title,
            settings=settings,
            started=datetime.datetime.now(datetime.timezone.utc).isoformat(
                "T", "seconds"
            ),
            command=machine.command(),
            commit=commit,
            dirty=dirty,
            hardware=machine.hardware(),
            versions=machine.versions(),
            environment=hashlib.sha256(machine.environment().encode()).hexdigest(),
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


def resume(path: Path, settings: dict, arms: Dict[str, dict]) -> Results:
    """The result file to add to, of the same measurement as far as it knows the arms.

    Raises:
        UserError: It is none, or of another.
    """
    try:
        results = load(path)
    except (OSError, ValueError) as e:
        raise UserError(f"{e}; give another --name.") from None
    known = results.settings.setdefault("arms", {})
    differing = [k for k, v in settings.items() if results.settings.get(k) != v]
    if results.hardware.get("gpu") != machine.hardware().get("gpu"):
        differing.append("GPU")
    for name, arm in arms.items():
        if name in known:
            old, new = dict(known[name]), dict(arm)
            old.pop("version"), new.pop("version")
            if old != new:
                differing.append(name)
    if differing:
        raise UserError(
            f"{path} was measured otherwise ({', '.join(differing)} differ): give "
            "another --name, or remove it."
        )
    return results
