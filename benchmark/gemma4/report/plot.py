"""Draw the pictures of a result file as SVG.

    python -m gemma4 report plot benchmark/gemma4/results/routing-h200.json --out docs/img

A case that varies in one number gives a curve over it, one line an arm; a case of
words gives bars, a panel for each of its values, with a scale of its own. One picture for
each metric and each value of the rest of the case. With `stacked` among the settings, the
records that have that part of the case are one picture: a bar for each arm in each other
case, cut into the part's values. The bytes of a picture depend on the result file alone.
"""

import re
import textwrap
from pathlib import Path
from typing import Dict, List

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from gemma4.errors import UserError  # noqa: E402
from gemma4.report.results import Record, Results, load  # noqa: E402
from gemma4.report.tables import axis as axis_of  # noqa: E402
from gemma4.report.tables import is_number  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: E402

# Legible to readers who see colours differently (Okabe and Ito); limits are grey.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LIMIT = "#999999"
# Enough for the groups of a step, light beside dark.
STACK = [
    *("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#F0E442"),
    *("#CC79A7", "#882255", "#444444", "#999999", "#DDDDDD"),
]
RC = {
    "svg.hashsalt": "gemma4",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def figures(results: Results) -> Dict[str, List[Record]]:
    """The records of each picture, by its file name without the suffix."""
    groups: Dict[str, List[Record]] = {}
    axis = axis_of(results.records)
    for record in results.records:
        rest = [str(v) for k, v in record.case.items() if k != axis]
        name = "-".join([results.name, record.metric, *rest])
        name = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
        groups.setdefault(name, []).append(record)
    return groups


def draw(results: Results, folder: Path) -> List[Path]:
    """Writes every picture of a result and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    if results.settings.get("stacked"):
        return [_draw_stacked(results, results.settings["stacked"], folder)]
    axis = axis_of(results.records)
    paths = []
    for name, records in figures(results).items():
        path = folder / f"{name}.svg"
        numeric = all(is_number(r.case.get(axis)) for r in records)
        where = results.hardware.get("gpu", results.hardware.get("cpu", ""))
        rest = [_said(k, v) for k, v in records[0].case.items() if k != axis]
        title = ", ".join([results.title, *rest, f"{where}"])
        with plt.rc_context(RC):
            drawn = _draw_curves if numeric else _draw_bars
            figure = drawn(records, axis, results, title)
            figure.savefig(path, metadata={"Date": None, "Creator": None})
            plt.close(figure)
        paths.append(path)
    return paths


def _said(part: str, value) -> str:
    """A part of a case, as a title says it."""
    if part == "mtp":
        return "without MTP" if value == "off" else f"with MTP, {value}"
    return f"{value}"


def save_above_legend(figure, path: Path, colours: Dict[str, str], room: float) -> None:
    """Writes a drawing of one's own, with its colours by label in `room` of its height."""
    figure.legend(
        handles=[Patch(color=colour, label=label) for label, colour in colours.items()],
        loc="lower center",
        ncol=3,
    )
    figure.tight_layout(rect=(0, room, 1, 1))
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _styles(records: List[Record], results: Results) -> Dict[str, dict]:
    """A colour for each arm, the same in every picture of the result."""
    limits = results.settings.get("limits", [])
    measured = [arm for arm in results.arms() if arm not in limits]
    here = {record.arm for record in records}
    styles = {
        arm: {"color": COLOURS[i % len(COLOURS)]} for i, arm in enumerate(measured)
    }
    for i, arm in enumerate(limits):
        styles[arm] = {"color": LIMIT, "linestyle": ["--", ":"][i % 2]}
    return {arm: style for arm, style in styles.items() if arm in here}


def _draw_curves(records: List[Record], axis: str, results: Results, title: str):
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for arm, style in _styles(records, results).items():
        points = sorted(
            (r.case[axis], r.median, min(r.samples), max(r.samples))
            for r in records
            if r.arm == arm
        )
        x, median, low, high = zip(*points)
        marker = None if "linestyle" in style else "o"
        axes.plot(x, median, label=arm, marker=marker, markersize=3.5, **style)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    if min(x) > 0 and max(x) > 50 * max(min(x), 1):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        # A limit far below everything measured need not be seen whole.
        limits = results.settings.get("limits", [])
        lowest = min(min(r.samples) for r in records if r.arm not in limits)
        axes.set_ylim(bottom=lowest / 3)
        plain = FuncFormatter(lambda value, _: f"{value:,.10g}")
        axes.xaxis.set_major_formatter(plain)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(axis)
    axes.set_title(title, fontsize=11)
    axes.set_ylabel(f"{records[0].metric}, {records[0].unit}")
    axes.legend()
    return figure


def _draw_bars(records: List[Record], axis: str, results: Results, title: str):
    """A panel for each value of the axis, one below the other, as wide as a phone."""
    styles = _styles(records, results)
    panels: Dict[str, List[Record]] = {}
    for record in records:
        panels.setdefault(str(record.case.get(axis, "")), []).append(record)
    bars = [len(found) for found in panels.values()]
    figure, all_axes = plt.subplots(
        *(len(panels), 1),
        **dict(figsize=(5, 0.9 + sum(0.55 + 0.26 * n for n in bars))),
        **dict(
            layout="constrained", squeeze=False, height_ratios=[n + 1 for n in bars]
        ),
    )
    for axes, (panel, found) in zip(all_axes[:, 0], panels.items()):
        found.sort(key=lambda record: list(styles).index(record.arm))
        medians = [record.median for record in found]
        least, most = zip(*((min(r.samples), max(r.samples)) for r in found))
        axes.barh(
            *(range(len(found)), medians, 0.8),
            xerr=[np.subtract(medians, least), np.subtract(most, medians)],
            color=[styles[record.arm]["color"] for record in found],
            capsize=2,
        )
        for y, record in enumerate(found):
            axes.annotate(
                *(f"{record.median:,.4g}", (max(record.samples), y)),
                **dict(xytext=(5, 0), textcoords="offset points", va="center"),
            )
        axes.set_yticks(range(len(found)), [record.arm for record in found])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max(most) or 1)
        axes.set_title(panel, loc="left", fontsize=10)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.grid(visible=False)
    unit = records[0].unit
    better = {"s": "less is better", "ms": "less is better", "tok/s": "more is better"}
    parts = [f"{records[0].metric}, {unit}", *filter(None, [better.get(unit)])]
    lines = [*textwrap.wrap(title, 56), " – ".join(parts)]
    figure.suptitle("\n".join(lines), fontsize=11)
    return figure


def _draw_stacked(results: Results, part: str, folder: Path) -> Path:
    """A row of panels, one for each case, as each has a scale of its own."""
    records = [record for record in results.records if part in record.case]
    values = list(dict.fromkeys(record.case[part] for record in records))
    panels: Dict[str, Dict[str, List[Record]]] = {}
    for record in records:
        title = ", ".join(str(v) for k, v in record.case.items() if k != part)
        panels.setdefault(title, {}).setdefault(record.arm, []).append(record)
    with plt.rc_context(RC):
        width = sum(1.2 + 0.6 * len(arms) for arms in panels.values())
        figure, all_axes = plt.subplots(
            *(1, len(panels)),
            **dict(figsize=(width + 1.8, 4.5), layout="constrained", squeeze=False),
        )
        for axes, (title, arms) in zip(all_axes[0], panels.items()):
            for x, found in enumerate(arms.values()):
                bottom = 0.0
                for record in sorted(found, key=lambda r: values.index(r.case[part])):
                    colour = STACK[values.index(record.case[part]) % len(STACK)]
                    axes.bar(x, record.median, 0.7, bottom, color=colour)
                    bottom += record.median
            axes.set_xticks(range(len(arms)), arms)
            axes.set_xlim(-0.6, len(arms) - 0.4)
            axes.set_title(title, fontsize=10)
            axes.grid(axis="x", visible=False)
        first = records[0]
        all_axes[0][0].set_ylabel(f"{first.metric}, {first.unit}")
        patches = [Patch(color=STACK[i % len(STACK)]) for i in range(len(values))]
        figure.legend(patches[::-1], values[::-1], loc="outside right upper")
        where = results.hardware.get("gpu", results.hardware.get("cpu", ""))
        figure.suptitle(f"{results.title}, {where}", fontsize=11)
        path = folder / f"{results.name}-{first.metric.replace(' ', '-')}.svg"
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return path


def arguments(parser) -> None:
    parser.add("results", "The result files.", type=Path, nargs="+")
    parser.add("--out", "The folder that gets the pictures.", Path("."), type=Path)


def run(args) -> None:
    for path in args.results:
        try:
            results = load(path)
        except (OSError, ValueError) as e:
            raise UserError(str(e)) from None
        draw_and_name(results, args.out)


def draw_and_name(results: Results, folder: Path) -> None:
    for picture in draw(results, folder):
        print(picture)
