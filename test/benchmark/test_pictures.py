"""What is asked about pictures, when an arm is wrong, and what is kept of a run."""

import contextlib
from pathlib import Path

import pytest
import torch
from gemma4.cli import main
from gemma4.engines.arms import Arm
from gemma4.engines.servers import Setup
from gemma4.errors import UserError
from gemma4.quality import picture_kept, pictures
from gemma4.quality.picture_answers import Answer, Difference, judge
from gemma4.quality.picture_cases import MARK, Ask, cases, picture
from gemma4.report.results import load


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

    monkeypatch.setattr(picture_kept, "ArmServer", Server)
    monkeypatch.setattr(picture_kept, "ask", ask)
    few = {"a": [Ask([("1", [])])], "b": [Ask([("2", [])]), Ask([("3", [])])]}
    monkeypatch.setattr(picture_kept, "cases", lambda: dict(few))
    return asked


def collect(arm, tmp_path):
    setup = Setup(tmp_path)
    return picture_kept.kept(arm, setup, tmp_path / "x.server.log", 1, Bar())


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


def test_all_kinds():
    kinds = [Difference(0.5, 0.0, 1, 16), Difference(0.25, 1.0, 2, 32)]
    assert Difference.of_all(kinds) == Difference(0.5, 1.0, 3, 48)


def keep(monkeypatch, tmp_path, name="tiny-fork", dtype="bfloat16") -> Path:
    """The file of an arm's answers."""
    fake(monkeypatch)
    setup = Setup(tmp_path / "tiny", flags=["--dtype", dtype])
    log = tmp_path / f"{name}.server.log"
    picture_kept.kept(Arm("fork", code="1"), setup, log, 1, Bar())
    return log.with_suffix(".json")


def test_what_was_kept_is_read(monkeypatch, tmp_path):
    was = picture_kept.load_kept(keep(monkeypatch, tmp_path))
    assert list(was.answers) == ["a", "b"] and was.answers["a"][0].tokens == [5]
    assert was.dtype == "bfloat16"
    assert was.describe()["hardware"] == was.where and was.where["cores"]
    assert str(tmp_path) not in str(was.describe())


def test_what_was_not_kept_is_refused(monkeypatch, tmp_path):
    file = keep(monkeypatch, tmp_path)
    monkeypatch.setattr(picture_kept, "cases", lambda: {"a": [Ask([("9", [])])]})
    with pytest.raises(UserError, match="other prompts"):
        picture_kept.load_kept(file)
    for text in ("[1, 2]", '[["1", ["--dtype"], {}], {}, {}]', "no JSON"):
        file.write_text(text)
        with pytest.raises(UserError, match="no kept answers"):
            picture_kept.load_kept(file)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("tiny-fork.server.json", "tiny"),
        ("tiny-31b-fork-fa3.server.json", "tiny-31b"),
        ("tiny-fork.server.log", None),
        ("other-fork.server.json", None),
    ],
)
def test_the_shape_is_in_the_name(name, shape):
    if shape:
        assert picture_kept.shape_of(Path(name)) == shape
    else:
        with pytest.raises(UserError, match="SHAPE-ARM"):
            picture_kept.shape_of(Path(name))


def test_arms_that_are_not_compared(monkeypatch, tmp_path):
    one = str(keep(monkeypatch, tmp_path))
    other = str(keep(monkeypatch, tmp_path, "tiny-other", "float32"))
    for answers, words in (
        ([["fork"]], "name the files"),
        ([["fork", one], ["fork", one]], "already"),
        ([["fork", one], ["other", other]], "bfloat16 and float32"),
    ):
        with pytest.raises(UserError, match=words):
            picture_kept.load_all(answers)


@pytest.mark.parametrize("arm, wrong", [("fa3", 1), ("base", 0)])
def test_kept_answers_are_judged(monkeypatch, tmp_path, capsys, arm, wrong):
    file = keep(monkeypatch, tmp_path)
    asked = {}

    def read(model, given, rounded, bar):
        asked.update(given=list(given), rounded=rounded)
        near, far = Difference(1e-3, tokens=1), Difference(1.0, tokens=1)
        return {arm: {"a": near, "b": far}, pictures.NOISE: {"a": near, "b": near}}

    monkeypatch.setattr(pictures, "read", read)
    monkeypatch.setattr(pictures, "write_checkpoint", lambda *a, **k: None)
    folders = ["--logs", str(tmp_path), "--out", str(tmp_path), "--name", "x"]
    assert main(["pictures", "--answers", arm, str(file), *folders]) == wrong
    assert asked == {"given": [arm], "rounded": True}
    assert capsys.readouterr().err.count("1.00e+00 off") == wrong
    results = load(tmp_path / "x.json")
    found = results.get({"shape": "tiny", "prompts": "all"}, arm, pictures.APART)
    assert found.samples == [1.0]
    assert list(results.settings["arms"]) == [f"tiny, {arm}"]


class Sure:
    """A model that finds the token 5 likely."""

    def __init__(self, folder, dtype="float32"):
        pass

    def logprobs(self, answer):
        return torch.log_softmax(torch.eye(6)[[5]], dim=-1)


def test_each_kind_has_its_noise(monkeypatch):
    """Though the last arm did not answer it."""
    monkeypatch.setattr(pictures, "Reference", Sure)
    one, other = Answer(("1", []), [5], [-1.0]), Answer(("2", []), [4], [-1.0])
    given = {"fork": {"a": [one], "b": [other]}, "base": {"a": [one]}}
    found = pictures.read(Path(), given, True, Bar())
    assert list(found[pictures.NOISE]) == ["a", "b"]
    assert found[pictures.NOISE]["b"].tokens == 1
