"""Tables of a result, in Markdown."""

from typing import Dict, List, Optional

from gemma4.report.results import Record, Results


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
