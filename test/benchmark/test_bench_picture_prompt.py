"""bench_picture_prompt.py on the CPU: prompts of as many tokens with and without."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmark" / "gemma4"))
import bench_picture_prompt as bench  # noqa: E402
import results  # noqa: E402


def folders(place):
    return ["--out", str(place), "--logs", str(place / "logs"), "--port", "31360"]


def test_prompts_take_turns(tmp_path, capsys):
    small = ["--shape", "tiny", "--tokens", "300", "--pictures", "2", "--repeats", "2"]
    bench.main([*small, *folders(tmp_path)])
    found = results.load(tmp_path / "picture-prompt.json")
    kinds = {record.case["prompt"]: record for record in found.records}
    assert sorted(kinds) == ["2 of its pictures", "text"]
    for record in kinds.values():
        assert record.case["tokens"] == 300
        assert len(record.samples) == 2 and min(record.samples) > 0
    assert "2 of its pictures" in capsys.readouterr().out

    with pytest.raises(SystemExit, match="picture-prompt.json exists"):
        bench.main([*small, *folders(tmp_path)])


class Counts:
    """A server whose pictures have 64 tokens, and each word one."""

    def generate(self, data):
        tokens = len(data["text"].rpartition(bench.MARK)[2].split())
        tokens += 64 * len(data["image_data"])
        return {"meta_info": {"prompt_tokens": tokens}}


def test_pictures_alone_have_more():
    prompts = bench.Prompts(96, 64)
    assert bench.words_for(Counts(), prompts, 300, 2) == 300 - 2 * 64
    with pytest.raises(bench.HouseError, match="--tokens 128: 2 pictures have more"):
        bench.words_for(Counts(), prompts, 128, 2)


def test_unknown_shape(tmp_path):
    with pytest.raises(SystemExit, match="--shape house: choose of"):
        bench.main(["--shape", "house", *folders(tmp_path)])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
