"""`kernel vision` on the CPU: arms in turn, and an arm that does not start."""

import re

from gemma4.cli import main
from gemma4.report import results

SMALL = ["--shape", "tiny", "--height", "96", "--width", "64"]


def test_arms_take_turns(tmp_path, capsys, refused):
    folders = ["--out", str(tmp_path), "--logs", str(tmp_path / "logs")]
    arms = ["--arms", "fork", "--arm", "sdpa=--mm-attention-backend sdpa"]
    counts = ["--pictures", "1", "3", "--repeats", "2"]
    assert main(["kernel", "vision", *SMALL, *folders, *arms, *counts]) == 0

    found = results.load(tmp_path / "vision.json")
    cases = {record.case["pictures"]: record.case for record in found.records}
    assert sorted(cases) == [1, 3]
    assert cases[3]["soft tokens"] == 3 * cases[1]["soft tokens"] > 0
    for case in cases.values():
        for arm in ("fork", "sdpa"):
            samples = found.get(case, arm, "vision tower").samples
            assert len(samples) == 2 and min(samples) > 0
    assert "vision tower" in capsys.readouterr().out

    assert "vision.json exists" in refused("kernel vision", *SMALL, *folders)


def test_an_arm_that_ends_is_named(tmp_path, refused):
    folders = ["--out", str(tmp_path), "--logs", str(tmp_path / "logs")]
    said = refused("kernel vision", *SMALL, *folders, "--arm", "odd=--no-such-flag")
    assert re.search("odd ended: .*no-such-flag.*odd.log", said)
    assert not (tmp_path / "vision.json").exists()


def test_unknown_shape(tmp_path, refused):
    said = refused("kernel vision", "--shape", "no-such", "--out", str(tmp_path))
    assert "--shape no-such: choose of" in said
