"""`make port` and `make watch`, on a newer release of the small upstream."""

import json
import os
import sys

import pytest
from conftest import FILES, run
from github_fake import FakeGitHub
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from fork.ci.github import GitHub
from fork.ci.watch import Hunk, Report, Verdict, markdown
from fork.ci.watch import watch as update

NUMBERS = [b"line_%d = %d\n" % (i, i) for i in range(30)]


def model(**changes) -> bytes:
    """model.py of the small upstream with other lines."""
    lines = [*NUMBERS, b"layers = 2\n"]
    for number, line in changes.items():
        lines[int(number[1:])] = line.encode()
    return b"".join(lines)


@pytest.fixture(scope="module")
def index(wheels, tmp_path_factory):
    """Returns a pip that finds the release 1.0, and 1.1 with these files of its own."""
    made = []

    def with_newer(**files) -> dict:
        folder = tmp_path_factory.mktemp(f"newer{len(made)}")
        made.append(folder)
        content = {
            name.replace("sglang-1.0.", "sglang-1.1."): data
            for name, data in FILES.items()
        }
        info = "sglang-1.1.dist-info/METADATA"
        content[info] = content[info].replace(b"Version: 1.0", b"Version: 1.1")
        content.update({f"sglang/srt/{n}": data for n, data in files.items()})
        for name, data in content.items():
            if data is not None:
                path = folder / "content" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        pack = ["wheel", "pack", "--dest-dir", folder, folder / "content"]
        run(sys.executable, "-m", *pack, cwd=folder, env=os.environ)
        return {"PIP_FIND_LINKS": f"{wheels} {folder}"}

    return with_newer


@pytest.fixture(scope="module")
def forked(checked_out, tmp_path_factory):
    """A series of four patches, the last of which needs the third; not to be
    changed."""
    repository = checked_out.copy(tmp_path_factory.mktemp("forked") / "a fork é")
    change = {"_3": "line_3 = 33\n"}
    repository.commit("srt/model.py", model(**change).decode(), "Change line 3")
    change["_12"] = "line_12 = 'ours'\n"
    repository.commit("srt/model.py", model(**change).decode(), "Change line 12")
    change |= {"_20": "line_20 = 'ours'\n", "_29": "line_29 = 'ours'\n"}
    repository.commit("srt/model.py", model(**change).decode(), "Change two lines")
    change["_20"] = "line_20 = 'ours, once more'\n"
    repository.write("srt/new.py", "new = 1\n")
    repository.commit("srt/model.py", model(**change).decode(), "Change one again")
    names = ("three", "twelve", "two", "again")
    repository.describe(**dict.fromkeys(names, "test/a.py"))
    repository.fork("export")
    return repository


def told(forked, env, *args) -> str:
    return forked.fork("port", *args, **env)


def test_the_same_release(forked, tmp_path):
    assert "4 patches: 4 apply.\n" in told(forked, {}, "--to", "1.0")
    other = forked.copy(tmp_path / "unnamed")
    other.describe()
    assert "| `0001`: `Change line 3` | applies |" in told(other, {}, "--to", "1.0")


def test_what_upstream_did_meanwhile(forked, index):
    """It took the first patch, changed what is near the second, and what the third
    changes; the fourth fails for the third's sake, but for its new file."""
    theirs = {"_3": "line_3 = 33\n", "_13": "line_13 = 'theirs'\n"}
    theirs["_20"] = "line_20 = 'theirs'\n"
    before = forked.contents(forked.root)
    report = told(forked, index(**{"model.py": model(**theirs)}))
    assert "# The series of sglang==1.0 on 1.1\n" in report
    assert "4 patches: 1 is upstream already, 3 conflict.\n" in report
    assert "| `three`: `Change line 3` | is upstream already |" in report
    second, third, fourth = report.split("\n## ")[1:]
    assert second.startswith("`twelve`: `Change line 12`\n")
    place = "python/sglang/srt/model.py:10"
    assert place in second and "has no `line_13 = 13` any more" in second
    assert "Of 2 hunks 1 fit." in third
    assert "srt/model.py:18` in `line" in third and "no `line_20 = 20` any" in third
    assert "Of 2 hunks 1 fit." in fourth and "no `line_20 = 'ours'` any" in fourth
    after = forked.contents(forked.root)
    new = {name for name in after if name not in before and ".cache" not in name}
    assert new <= {"dist/port.json"}


def test_a_three_way_merge(forked, index):
    """Lines above were added, and one in the patch's context was changed."""
    newer = b"added = 1\n" * 5 + model(_9="line_9 = 'theirs'\n", _25="x = 1\n")
    report = told(forked, index(**{"model.py": newer}))
    assert "| `twelve`: `Change line 12` | applies by a three-way merge |" in report
    assert "0 conflict" not in report


def test_a_file_that_moved(forked, index):
    files = {"model.py": None, "../__init__.py": b"layers = 1\n"}
    report = told(forked, index(**files, **{"moved/model.py": model()}))
    assert "4 patches: 4 apply by a three-way merge.\n" in report


def test_upstream_did_the_same_in_another_place(forked, index):
    newer = model(_12="x = 1\ny = 2\nline_12 = 'ours'\nz = 3\n", _11="", _13="")
    report = told(forked, index(**{"model.py": newer}))
    assert "| `twelve`: `Change line 12` | is upstream already |" in report


def test_a_new_file_that_upstream_has_too(forked, index):
    files = {"model.py": model(_20="line_20 = 'theirs'\n"), "new.py": b"other = 1\n"}
    report = told(forked, index(**files))
    said = "srt/new.py (added)`: the file is there already, or is another\n"
    assert said in report.split("\n## ")[-1]


@pytest.mark.parametrize("moved", [False, True])
def test_a_file_that_is_gone(forked, index, moved):
    files = {"model.py": None, "../__init__.py": b"layers = 1\n"}
    if moved:
        files["moved/model.py"] = b"another = 1\n"
    report = told(forked, index(**files))
    assert "4 patches: 4 conflict.\n" in report
    said = "the file is gone"
    if moved:
        said += ", `python/sglang/srt/moved/model.py` has its name"
    assert report.count(f"{said}\n") == 5


def test_what_cannot_be_fetched(forked):
    assert "--to newest is no version" in forked.refusal("port", "--to", "newest")
    refusal = forked.refusal("port", "--to", "9.9")
    assert "sglang==9.9 could not be fetched" in refusal


def watched(forked, env: dict, github: dict) -> str:
    """What `make watch` says after `make port`, which has no token."""
    told(forked, env)
    return watch(forked, github).stdout


def watch(forked, github: dict):
    command = [sys.executable, "-m", "fork.ci.watch"]
    return run(*command, cwd=forked.python, env=forked.env | github, check=False)


def test_one_issue_is_kept_up_to_date(forked, index, wheels):
    """Through every state that it can be in, week by week."""
    fake = FakeGitHub()
    fake.issues.append(
        {"number": 1, "title": "Somebody's", "state": "open", "labels": []}
    )
    same = {"PIP_FIND_LINKS": str(wheels)}
    newer = index(**{"model.py": model(_3="line_3 = 33\n")})
    other = index(**{"model.py": model(_12="theirs = 1\n")})
    with fake.served() as env:
        assert "at the newest release, 1.0" in watched(forked, same, env)
        assert len(fake.issues) == 1
        assert "Opened #2 for 1.1." in watched(forked, newer, env)
        assert "says so already" in watched(forked, newer, env)
        issue = fake.issues[1]
        assert issue["title"] == "SGLang 1.1 is out, and the series is at 1.0"
        assert "| `three`: `Change line 3` | is upstream already |" in issue["body"]
        assert "Updated #2 for 1.1." in watched(forked, other, env)
        assert "| `twelve`: `Change line 12` | conflicts |" in issue["body"]
        issue["state"] = "closed"
        assert "was closed for 1.1" in watched(forked, newer, env)
        assert issue["state"] == "closed"
        issue["title"] = issue["title"].replace("1.1", "1.0.9")
        assert "Updated #2 for 1.1." in watched(forked, newer, env)
        assert issue["state"] == "open"
        assert "Closed #2" in watched(forked, same, env)
    assert len(fake.issues) == 2 and issue["state"] == "closed"
    assert fake.issues[0]["title"] == "Somebody's" and fake.issues[0]["state"] == "open"


REPORT = {
    "base": "1.0",
    "release": "1.1",
    "newer": True,
    "verdicts": [
        {
            "name": "one",
            "subject": "One",
            "verdict": "conflicts",
            "hunks": [
                {"place": "a.py:1", "inside": "", "state": "changed", "quoted": ["x"]}
            ],
        }
    ],
}


@pytest.mark.parametrize(
    "old, new",
    [
        ('"1.1"', '"1.1 @everyone"'),
        ('"1.1"', '"1.1\\n"'),
        ('"1.1"', "1.1"),
        ('"conflicts"', '"another"'),
        ('"changed"', '"another"'),
        ('"One"', "1"),
        ('["x"]', "[1]"),
        ('["x"]', "1"),
        ('"newer"', '"another"'),
        ('"place"', '"another"'),
        ("[{", "[["),
        ("{", "["),
    ],
)
def test_what_is_no_report_reaches_no_issue(forked, tmp_path, old, new):
    """It is a file of another job, which unpacked what an index sent."""
    repository = forked.copy(tmp_path / "a fork é")
    file = repository.root / "dist/port.json"
    file.parent.mkdir(exist_ok=True)
    fake = FakeGitHub()
    with fake.served() as env:
        file.write_text(json.dumps(REPORT).replace(old, new))
        done = watch(repository, env)
        assert done.returncode == 1 and not fake.issues
        (said,) = done.stderr.splitlines()
        assert said.startswith("error: ") and "is no report of `make port`" in said
        file.unlink()
        assert "run `make port` first" in watch(repository, env).stderr
        file.write_text(json.dumps(REPORT))
        assert "Opened #1" in watch(repository, env).stdout


# What would be a mention, a link, a picture, a tag, a heading, a cell, or end the code.
FOREIGN = """@someone #1 https://x.example ![x](//x.example) <img src=x> a|b **b** `c` ``d``
# e
```
\u202e\x00"""


@given(st.text(st.sampled_from("`|\\ \n@ab<>\u202e#")) | st.just(FOREIGN))
def test_what_an_index_sends_is_shown_as_code(text):
    """A Markdown parser finds in each place one piece of code that has it, and no other
    than those, whatever it holds."""
    hunk = Hunk(place=text, inside=text, state="moved", quoted=[text])
    shown = markdown(
        Report("1.0", "1.1", True, [Verdict(text, text, "conflicts", [hunk])])
    )
    wanted = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    wanted = wanted if len(wanted) <= 120 else f"{wanted[:120]}…"
    tokens = MarkdownIt("commonmark").enable("table").parse(shown)
    pieces = [child for token in tokens for child in token.children or ()]
    code = [piece.content.strip() for piece in pieces if piece.type == "code_inline"]
    inside = 1 if text else 0
    assert code == [wanted] * (2 + 2 + 2 + inside)
    assert {piece.type for piece in pieces} <= {"code_inline", "text"}
    ours = "".join(piece.content for piece in pieces if piece.type == "text")
    assert not {*"@<>`|\\"} & {*ours}
    kinds = [token.type for token in tokens if token.type.endswith("_open")]
    assert kinds.count("tr_open") == 2 and kinds.count("td_open") == 2
    assert kinds.count("heading_open") == 2 and kinds.count("list_item_open") == 1
    assert not {token.type for token in tokens} & {"fence", "code_block", "html_block"}


def test_an_issue_is_not_longer_than_github_takes():
    hunk = Hunk(place="x" * 200, state="changed", quoted=["y" * 200])
    report = Report("1.0", "1.1", True, [Verdict("a", "A", "conflicts", [hunk] * 1000)])
    fake = FakeGitHub()
    with fake.served() as env:
        watching = GitHub(env["GITHUB_REPOSITORY"], "a-token", env["GITHUB_API_URL"])
        update(report, watching)
    body = fake.issues[0]["body"]
    assert 55_000 < len(body) < 65_536
    assert "any more\n\nThe rest is too long.\n\n`make port` says" in body
