"""What is asked about pictures, when an arm is wrong, and what is kept of a run."""

import contextlib

import pytest
import torch
from gemma4.engines.arms import Arm
from gemma4.engines.servers import Setup
from gemma4.errors import UserError
from gemma4.quality import pictures
from gemma4.quality.picture_answers import Answer, Difference, judge
from gemma4.quality.picture_cases import MARK, Ask, cases, picture


def test_a_mark_a_picture():
    for kind, asks in cases().items():
        for asked in asks:
            for text, found in asked.prompts:
                assert text.count(MARK) == len(found), kind


def test_pictures_differ_by_seed_alone():
    one, same, other = (picture("tall", seed) for seed in (0, 0, 1))
    assert one.size == (60, 400)
    assert one.tobytes() == same.tobytes() != other.tobytes()


def test_difference():
    exact = torch.log_softmax(torch.tensor([[1.0, 3.0], [4.0, 2.0]]), dim=-1)
    given = [exact[0, 1].item(), exact[1, 1].item() + 0.25]
    found = Difference()
    found.see(Answer(("", []), [1, 1], given), exact)
    assert found.others == 1
    assert found.apart == pytest.approx(0.25)
    assert found.behind == pytest.approx(2.0)


@pytest.mark.parametrize(
    "apart, behind, said", [(1e-6, 0.0, 0), (1e-4, 0.0, 1), (1e-6, 1e-6, 1)]
)
def test_float32_is_exact(apart, behind, said):
    found = {"one": Difference(apart, behind)}
    assert len(list(judge(found, None))) == said


@pytest.mark.parametrize(
    "apart, behind, said",
    [(0.02, 0.03, 0), (0.04, 0.0, 1), (0.02, 0.07, 1), (float("nan"), 0.0, 1)],
)
def test_bfloat16_is_as_far_as_rounding(apart, behind, said):
    found, noise = {"one": Difference(apart, behind)}, {"one": Difference(0.01)}
    assert len(list(judge(found, noise))) == said


class Bar:
    def update(self, n=1):
        pass


STARTS = []


class Server:
    """Answers, unless its arm is one that does not start or ends amid a kind."""

    def __init__(self, arm, setup, log):
        self.arm = arm

    @contextlib.contextmanager
    def running(self, timeout):
        starts = self.arm.name != "does not start" and STARTS.pop()
        if not starts:
            raise UserError("it died")
        yield self

    def ask(self, path, data):
        assert path == "/flush_cache"


def fake(monkeypatch, ends_at="", starts=9) -> list:
    """Stands for servers, of which so many start; returns the list of what they are
    asked."""
    asked = []
    STARTS[:] = [False] + [True] * starts

    def ask(server, what):
        asked.append(what)
        if what.prompts[0][0] == ends_at:
            raise UserError("it died")
        return [Answer(prompt, [5], [-0.5]) for prompt in what.prompts]

    monkeypatch.setattr(pictures, "ArmServer", Server)
    monkeypatch.setattr(pictures, "ask", ask)
    few = {"a": [Ask([("1", [])])], "b": [Ask([("2", [])]), Ask([("3", [])])]}
    monkeypatch.setattr(pictures, "cases", lambda: dict(few))
    return asked


def collect(arm, tmp_path):
    setup = Setup(tmp_path)
    return pictures.kept(arm, setup, tmp_path / "x.server.log", 1, Bar())


def test_what_is_asked_once_is_kept(monkeypatch, tmp_path):
    asked = fake(monkeypatch)
    first = collect(Arm("fork", code="1"), tmp_path)
    assert len(asked) == 3
    answers, silent = collect(Arm("fork", code="1"), tmp_path)
    assert len(asked) == 3 and not silent
    assert [a.tokens for a in answers["b"]] == [a.tokens for a in first[0]["b"]]
    collect(Arm("fork", code="2"), tmp_path)
    assert len(asked) == 6


def test_a_server_that_ends_is_started_anew(monkeypatch, tmp_path):
    fake(monkeypatch, ends_at="1")
    answers, silent = collect(Arm("fork"), tmp_path)
    assert list(answers) == ["b"] and list(silent) == ["a"]


def test_an_arm_that_does_not_start(monkeypatch, tmp_path):
    fake(monkeypatch)
    answers, silent = collect(Arm("does not start", path=["/elsewhere"]), tmp_path)
    assert not answers and list(silent) == ["a", "b"]
    with pytest.raises(UserError):
        collect(Arm("does not start"), tmp_path / "other")


def test_an_arm_that_does_not_start_again(monkeypatch, tmp_path):
    fake(monkeypatch, ends_at="1", starts=1)
    arm = Arm("base", path=["/elsewhere"])
    answers, silent = collect(arm, tmp_path)
    assert not answers and list(silent) == ["a", "b"]
