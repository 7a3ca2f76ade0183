"""Draw what host and GPU do in steps with MTP, before and after; not to scale.

    python -m gemma4 report steps --out docs/img/mtp-steps.svg

Before, the host waits for each phase and the GPU for the host. After, the host launches
a step while the GPU still runs the last one, and then reads what the one before left.
"""

from pathlib import Path
from typing import List, NamedTuple

from gemma4.errors import UserError
from gemma4.report.plot import COLOURS, LIMIT, RC, plt, save_above_legend

HOST, GPU = "host", "GPU"
# Of no machine, but longer is longer.
LASTS = {"verify": 6.0, "draft": 1.0, "prepare": 0.8, "seed": 1.0, "process": 0.5}
FILLS = dict(zip(LASTS, [COLOURS[0], COLOURS[5], COLOURS[4], COLOURS[3], LIMIT]))
LABELS = {
    "verify": "verify (GPU)",
    "draft": "draft (GPU)",
    "seed": "first draft, launched kernel by kernel",
    "prepare": "prepare and launch (host)",
    "process": "read the result (host)",
}


class Task(NamedTuple):
    lane: str
    kind: str
    start: float
    end: float


class Timeline:
    """Tasks of two lanes, each of which does one thing at a time."""

    def __init__(self):
        self.tasks: List[Task] = []
        self.free = {HOST: 0.0, GPU: 0.0}

    def add(self, lane: str, kind: str, after: float = 0.0) -> float:
        """Starts it when its lane is free, and not before `after`; returns its end."""
        start = max(self.free[lane], after)
        end = self.free[lane] = start + LASTS[kind]
        self.tasks.append(Task(lane, kind, start, end))
        return end


def before(steps: int) -> List[Task]:
    line = Timeline()
    accepted = 0.0
    for _ in range(steps):
        drafted = line.add(GPU, "draft", line.add(HOST, "prepare", accepted))
        # The tree is built of what was drafted.
        verified = line.add(GPU, "verify", line.add(HOST, "prepare", drafted))
        launched = line.add(HOST, "process", verified)
        line.add(HOST, "seed", launched)
        accepted = line.add(GPU, "seed", launched)
    return line.tasks


def after(steps: int) -> List[Task]:
    line = Timeline()
    ends = []
    for step in range(steps):
        line.add(GPU, "verify", line.add(HOST, "prepare"))
        ends.append(line.add(GPU, "draft"))
        if step:
            line.add(HOST, "process", ends[step - 1])
    return line.tasks


def draw(path: Path, steps: int) -> None:
    with plt.rc_context({**RC, "axes.grid": False}):
        figure, axes = plt.subplots(2, 1, figsize=(8, 3.6), sharex=True)
        lines = {"0.5.12.post1": before(steps), "fork": after(steps)}
        for axis, (title, tasks) in zip(axes, lines.items()):
            for task in tasks:
                axis.barh(
                    task.lane,
                    task.end - task.start,
                    left=task.start,
                    color=FILLS[task.kind],
                    edgecolor="white",
                    height=0.7,
                )
            axis.set_title(title, loc="left")
            axis.set_xticks([])
            axis.invert_yaxis()
        axes[1].set_xlabel("time")
        colours = {label: FILLS[kind] for kind, label in LABELS.items()}
        save_above_legend(figure, path, colours, room=0.13)


def arguments(parser) -> None:
    parser.add("--out", "The picture's file.", Path("mtp-steps.svg"), type=Path)
    parser.add("--steps", "How many steps it has.", 3, type=int)


def run(args) -> None:
    if args.steps < 1:
        raise UserError(f"--steps {args.steps} draws nothing: give one or more.", 2)
    draw(args.out, args.steps)
    print(f"wrote {args.out}")
