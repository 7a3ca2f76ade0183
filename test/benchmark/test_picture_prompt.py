"""`picture-prompt` on the CPU: prompts of as many tokens with and without."""

import pytest
from gemma4.cli import main
from gemma4.errors import UserError
from gemma4.quality.picture_cases import MARK
from gemma4.report import results
from gemma4.serve import picture_prompt


def folders(place):
    return ["--out", str(place), "--logs", str(place / "logs"), "--port", "31360"]


def test_prompts_take_turns(tmp_path, capsys, refused):
    small = ["--shape", "tiny", "--tokens", "300", "--pictures", "2", "--repeats", "2"]
    assert main(["picture-prompt", *small, *folders(tmp_path)]) == 0
    found = results.load(tmp_path / "picture-prompt.json")
    kinds = {record.case["prompt"]: record for record in found.records}
    assert sorted(kinds) == ["2 of its pictures", "text"]
    for record in kinds.values():
        assert record.case["tokens"] == 300
        assert len(record.samples) == 2 and min(record.samples) > 0
    assert "2 of its pictures" in capsys.readouterr().out

    said = refused("picture-prompt", *small, *folders(tmp_path))
    assert "picture-prompt.json exists" in said


class Counts:
    """A server whose pictures have 64 tokens, and each word one."""

    def answer(self, path, data):
        tokens = len(data["text"].rpartition(MARK)[2].split())
        tokens += 64 * len(data["image_data"])
        return {"meta_info": {"prompt_tokens": tokens}}


def test_pictures_alone_have_more():
    prompts = picture_prompt.Prompts(96, 64)
    assert picture_prompt.words_for(Counts(), prompts, 300, 2) == 300 - 2 * 64
    with pytest.raises(UserError, match="--tokens 128: 2 pictures have more"):
        picture_prompt.words_for(Counts(), prompts, 128, 2)


def test_unknown_shape(tmp_path, refused):
    said = refused("picture-prompt", "--shape", "no-such", *folders(tmp_path))
    assert "--shape no-such: choose of" in said
