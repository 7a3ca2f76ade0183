"""The picture of host and GPU in steps with MTP."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmark" / "gemma4"
PICTURE = Path(__file__).parents[2] / "docs" / "img" / "mtp-steps.svg"

sys.path.insert(0, str(FOLDER))
from draw_steps import GPU, after, before  # noqa: E402


def draw(*arguments):
    return subprocess.run(
        [sys.executable, str(FOLDER / "draw_steps.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
    )


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
