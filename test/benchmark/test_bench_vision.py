"""bench_vision.py on the CPU: arms in turn, and an arm that does not start."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmark" / "gemma4"))
import bench_vision  # noqa: E402
import results  # noqa: E402

SMALL = ["--shape", "tiny", "--height", "96", "--width", "64"]


def test_arms_take_turns(tmp_path, capsys):
    folders = ["--out", str(tmp_path), "--logs", str(tmp_path / "logs")]
    arms = ["--arms", "fork", "--arm", "sdpa=--mm-attention-backend sdpa"]
    bench_vision.main(
        [*SMALL, *folders, *arms, "--pictures", "1", "3", "--repeats", "2"]
    )

    found = results.load(tmp_path / "vision.json")
    cases = {record.case["pictures"]: record.case for record in found.records}
    assert sorted(cases) == [1, 3]
    assert cases[3]["soft tokens"] == 3 * cases[1]["soft tokens"] > 0
    for case in cases.values():
        for arm in ("fork", "sdpa"):
            samples = found.get(case, arm, "vision tower").samples
            assert len(samples) == 2 and min(samples) > 0
    assert "vision tower" in capsys.readouterr().out

    with pytest.raises(SystemExit, match="vision.json exists"):
        bench_vision.main([*SMALL, *folders])


def test_an_arm_that_ends_is_named(tmp_path):
    folders = ["--out", str(tmp_path), "--logs", str(tmp_path / "logs")]
    with pytest.raises(SystemExit, match="odd ended: .*no-such-flag.*odd.log"):
        bench_vision.main([*SMALL, *folders, "--arm", "odd=--no-such-flag"])
    assert not (tmp_path / "vision.json").exists()


def test_unknown_shape(tmp_path):
    with pytest.raises(SystemExit, match="--shape house: choose of"):
        bench_vision.main(["--shape", "house", "--out", str(tmp_path)])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
