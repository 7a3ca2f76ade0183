"""Which texts are encoded, that all ways give the same ids, and what is kept."""

import pytest
from gemma4.cli import main
from gemma4.errors import UserError
from gemma4.report.results import load
from gemma4.text import prompts, tokenizers
from gemma4.text.prompts import CODE, PROSE, RANDOM
from gemma4.text.tokenizers import BOTH, CALL, TIME, WITHOUT

PROSES = "In the beginning there was a word, and it was short. " * 200
CODES = "def f(x):\n    return x + 1\n" * 200


@pytest.fixture
def small(monkeypatch):
    halves = {PROSE: (PROSES, PROSES), CODE: (CODES, CODES)}
    monkeypatch.setattr(tokenizers, "corpus", lambda: halves)


def test_halves_differ():
    for kind, (one, other) in prompts.corpus().items():
        assert one[:1000] != other[:1000] and min(len(one), len(other)) > 100_000, kind


def test_what_is_kept(small, tmp_path):
    argv = ["--tokens", "40", "--repeats", "3", "--vocabulary", "600"]
    assert main(["tokenizers", *argv, "--out", str(tmp_path)]) == 0
    results = load(tmp_path / "tokenizers.json")
    for kind in (PROSE, CODE, RANDOM):
        for arm in (CALL, WITHOUT):
            record = results.get({"text": kind, "tokens": 40}, arm, TIME)
            assert len(record.samples) == 3 and min(record.samples) > 0
    for arm in (CALL, WITHOUT):
        assert results.get({"text": BOTH, "tokens": 40}, arm, TIME) is not None


def test_other_ids_are_an_error(monkeypatch, small, tmp_path, capsys):
    load_ = tokenizers.load

    def other(folder):
        tokenizer, arms, loaded = load_(folder)
        return tokenizer, {**arms, "other": lambda text: [1, 2]}, loaded

    monkeypatch.setattr(tokenizers, "load", other)
    argv = ["--tokens", "40", "--repeats", "1", "--vocabulary", "600"]
    assert main(["tokenizers", *argv, "--out", str(tmp_path)]) == 1
    assert f"other gives other ids than {CALL}" in capsys.readouterr().err


def test_a_folder_without_a_tokenizer(tmp_path, refused):
    said = refused("tokenizers", "--tokenizer", str(tmp_path), "--out", str(tmp_path))
    assert "holds no tokenizer.json" in said


class Tokenizer:
    """A token a character."""

    all_special_ids = [0]

    def __len__(self):
        return 50

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids):
        return "".join(chr(i) for i in ids)


def test_prompts():
    text = "".join(chr(33 + i % 80) for i in range(200))
    found = prompts.prompts(Tokenizer(), PROSE, text, 20, 5)
    assert len(set(found)) == 5 and all(len(p) == 20 and p in text for p in found)
    found = prompts.prompts(Tokenizer(), RANDOM, "", 20, 5)
    assert len(set(found)) == 5 and not any("\0" in p for p in found)
    with pytest.raises(UserError, match="ships 200 tokens of code"):
        prompts.prompts(Tokenizer(), CODE, text, 198, 5)
