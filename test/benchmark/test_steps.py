"""The picture of host and GPU in steps with MTP."""

from pathlib import Path

import pytest
from programs import run

PICTURE = Path(__file__).parents[2] / "docs" / "img" / "mtp-steps.svg"

from gemma4.report.steps import GPU, after, before


def draw(*arguments):
    return run("report", "steps", *arguments)


def test_the_picture_is_the_one_in_the_docs(tmp_path):
    done = draw("--out", tmp_path / "steps.svg")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "steps.svg").read_bytes() == PICTURE.read_bytes()


@pytest.mark.parametrize("schedule, idle", [(before, True), (after, False)])
def test_who_waits(schedule, idle):
    tasks = [task for task in schedule(4) if task.lane == GPU]
    gaps = [b.start - a.end for a, b in zip(tasks, tasks[1:])]
    assert all(gap >= 0 for gap in gaps)
    assert any(gap > 0 for gap in gaps) == idle


def test_no_steps(tmp_path):
    done = draw("--out", tmp_path / "steps.svg", "--steps", 0)
    assert done.returncode == 2
    assert "--steps 0 draws nothing" in done.stderr
    assert not (tmp_path / "steps.svg").exists()
