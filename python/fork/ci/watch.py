"""The report on a newer release of SGLang, and the one issue that says it.

What the report quotes is of files that an index sent: it is data until `markdown`
writes it, as code that nothing in it can end.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fork.ci.github import GitHub
from fork.errors import ForkError

FILE = "dist/port.json"
LABEL = "base-watch"
VERDICTS = {  # what is said of one, and of several
    "applies": ("applies", "apply"),
    "merges": ("applies by a three-way merge", "apply by a three-way merge"),
    "upstream": ("is upstream already", "are upstream already"),
    "conflicts": ("conflicts", "conflict"),
}
STATES = {  # of a hunk, and where what it quotes stands
    "fits": "",
    "upstream": "",
    "gone": "the file is gone",
    "moved": "the file is gone, {} has its name",
    "there": "the file is there already, or is another",
    "changed": "upstream has no {} any more",
    "apart": "its lines are there, but not together",
}
VERSION = re.compile(r"[0-9][0-9a-z.+!]{0,30}")
QUOTED = 120  # characters of a path or a line
LONGEST = 60_000  # characters of an issue's text; GitHub takes 65536


@dataclass
class Hunk:
    """One hunk of a patch, or all of a file that is added, removed or binary.

    Attributes:
        place: The file, and the line in the older release or what becomes of it.
        inside: What encloses the hunk.
        state: A key of STATES.
        quoted: What stands in its text.
    """

    place: str
    inside: str = ""
    state: str = ""
    quoted: list[str] = field(default_factory=list)


@dataclass
class Verdict:
    """What became of a patch: a key of VERDICTS, and its hunks if it conflicts."""

    name: str
    subject: str
    verdict: str
    hunks: list[Hunk] = field(default_factory=list)


@dataclass
class Report:
    """What a release of SGLang does to the series.

    Attributes:
        base: The release that the series is on.
        release: The one that it was applied to.
        newer: Whether that is the newer one.
    """

    base: str
    release: str
    newer: bool
    verdicts: list[Verdict]

    def write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> Report:
        """Reads what `write` wrote.

        Raises:
            ForkError: There is no such file, or `write` cannot have written it.
        """
        try:
            told = json.loads(file.read_text("utf-8"))
            report = cls(**told)
            report.verdicts = [Verdict(**one) for one in report.verdicts]
            texts = []
            for one in report.verdicts:
                one.hunks = [Hunk(**hunk) for hunk in one.hunks]
                texts += [one.name, one.subject, VERDICTS[one.verdict][0]]
                for hunk in one.hunks:
                    texts += [hunk.place, hunk.inside, STATES[hunk.state]]
                    texts += hunk.quoted
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("a text is none")
            for version in (report.base, report.release):
                if not VERSION.fullmatch(version):
                    raise ValueError("a version is none")
        except FileNotFoundError:
            raise ForkError(f"There is no {file}: run `make port` first.") from None
        except (LookupError, TypeError, ValueError) as error:
            raise ForkError(
                f"{file} is no report of `make port` ({error}): run that again."
            ) from None
        return report


def code(text: str) -> str:
    """A text as one line of Markdown code, which nothing in it ends: so it makes no
    link, no mention and no tag."""
    text = "".join(char if char.isprintable() else " " for char in text)
    text = " ".join(text.split())
    if len(text) > QUOTED:
        text = f"{text[:QUOTED]}…"
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if not text or "`" in (text[0], text[-1]) else ""
    return f"{fence}{space}{text}{space}{fence}"


def markdown(report: Report) -> str:
    """The report as GitHub and a terminal show it."""
    counts = [
        f"{count} {VERDICTS[key][count > 1]}"
        for key in VERDICTS
        if (count := sum(told.verdict == key for told in report.verdicts))
    ]
    lines = [
        f"# The series of sglang=={report.base} on {report.release}",
        "",
        f"{len(report.verdicts)} patches: {', '.join(counts) or 'none'}.",
        "",
        "| patch | |",
        "| --- | --- |",
    ]
    for told in report.verdicts:
        title = _title(told).replace("|", r"\|")  # else it ends the cell, code or not
        lines.append(f"| {title} | {VERDICTS[told.verdict][0]} |")
    for told in report.verdicts:
        if told.verdict != "conflicts":
            continue
        states = [hunk.state for hunk in told.hunks]
        kept = f"Of {len(states)} hunks {states.count('fits')} fit"
        if "upstream" in states:
            kept += f" and {states.count('upstream')} are upstream already"
        lines += ["", f"## {_title(told)}", "", f"{kept}.", ""]
        for hunk in told.hunks:
            if STATES[hunk.state]:
                inside = f" in {code(hunk.inside)}" if hunk.inside else ""
                quoted = " and ".join(map(code, hunk.quoted))
                state = STATES[hunk.state].format(quoted)
                lines.append(f"- {code(hunk.place)}{inside}: {state}")
    return "\n".join(lines) + "\n"


def _title(told: Verdict) -> str:
    return f"{code(told.name)}: {code(told.subject)}"


def watch(report: Report, github: GitHub) -> str:
    """Keeps one issue that says what the newest release does to the series.

    It is opened by the first newer release, rewritten as its report changes, opened
    again by a release after the one that it was closed at, and closed when the series
    is at the newest. Returns what was done.
    """
    mine = [
        issue
        for issue in github.pages("issues", state="all", labels=LABEL)
        if "pull_request" not in issue
    ]
    issue = mine[0] if mine else None
    if not report.newer:
        if issue and issue["state"] == "open":
            github("PATCH", f"issues/{issue['number']}", {"state": "closed"})
            return f"Closed #{issue['number']}: the series is at the newest release."
        return f"The series is at the newest release, {report.release}."
    told = {
        "title": f"SGLang {report.release} is out, and the series is at {report.base}",
        "body": _body(report),
    }
    if not issue:
        issue = github("POST", "issues", {**told, "labels": [LABEL]})
        return f"Opened #{issue['number']} for {report.release}."
    if issue["title"] == told["title"] and issue["state"] == "closed":
        return f"#{issue['number']} was closed for {report.release}: left as it is."
    if all(issue[key] == told[key] for key in told):
        return f"#{issue['number']} says so already."
    github("PATCH", f"issues/{issue['number']}", {**told, "state": "open"})
    return f"Updated #{issue['number']} for {report.release}."


def _body(report: Report) -> str:
    text = markdown(report)
    if len(text) > LONGEST:
        text = text[: text.rindex("\n", 0, LONGEST) + 1] + "\nThe rest is too long.\n"
    return (
        f"{text}\n`make port` says this on any machine; docs/releasing.md says how the "
        "series is carried forward.\n"
    )


def main() -> str | int:
    """``python -m fork.ci.watch`` makes the issue say what `make port` found."""
    try:
        report = Report.read(Path(__file__).parents[3] / FILE)
        print(watch(report, GitHub.of_workflow()))
    except ForkError as error:
        return f"error: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
