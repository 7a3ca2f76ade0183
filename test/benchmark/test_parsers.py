"""Which texts the parsers are timed on, and what is kept of it."""

import pytest
from gemma4.cli import main
from gemma4.engines.host import offline
from gemma4.report.results import Results, load
from gemma4.text import parsers
from gemma4.text.parsers import FOUR, KINDS, RANDOM, TIME, WHOLE


@pytest.fixture(autouse=True)
def on_any_machine(monkeypatch):
    for name, value in offline().items():
        monkeypatch.setenv(name, value)


def test_generated_texts():
    texts = parsers.generated(50)
    assert len(texts) == 50 and len(set(text for text, _ in texts)) > 10
    assert all("".join(parts) == text for text, parts in texts)
    assert parsers.generated(50) == texts


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts(kind):
    text, parts = parsers.long(kind, 2)
    assert "".join(parts) == text and 2048 <= len(text) < 3000
    assert all(len(part) <= 20 for part in parts)
    assert ("<|tool_call>" in text) == (kind != "prose")


@pytest.mark.parametrize("size, spent", [(1024, 2.0), (512, 4.0)])
def test_time_of_a_kilobyte(monkeypatch, size, spent):
    ticks = iter([1.0, 1.002])
    monkeypatch.setattr(parsers.time, "process_time", lambda: next(ticks))
    assert parsers.took(str, ["a", "b"], size) == pytest.approx(spent)


def test_each_turn_reads_its_own_part(monkeypatch):
    read = []
    monkeypatch.setattr(
        parsers, "took", lambda f, answers, size: read.append(answers) or 1.0
    )
    texts = [(f"text {i}", [f"text {i}"]) for i in range(5)]
    results = Results("kernels", "x", "")

    class Bar:
        def update(self):
            pass

    parsers.measure(texts, "five", 2, results, Bar())
    assert [len(answers) for answers in read] == [3, 3, 3, 2, 2, 2]
    assert len(results.get({"texts": "five"}, RANDOM, TIME).samples) == 2


def test_what_is_kept(tmp_path, refused):
    small = ["--texts", "20", "--kilobytes", "1", "--repeats", "2"]
    small += ["--out", str(tmp_path)]
    assert main(["parsers", *small]) == 0
    results = load(tmp_path / "parsers.json")
    assert results.arms() == [WHOLE, RANDOM, FOUR]
    assert len({record.case["texts"] for record in results.records}) == 1 + len(KINDS)
    assert all(min(record.samples) >= 0 for record in results.records)
    assert "parsers.json exists" in refused("parsers", *small)
