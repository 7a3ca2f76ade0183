"""`python -m fork port` and `watch`, on a newer release of the small upstream."""

import os
import sys

import pytest
from conftest import FILES, run
from github_fake import FakeGitHub

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
    assert "| 0001 Change line 3 | applies |" in told(other, {}, "--to", "1.0")


def test_what_upstream_did_meanwhile(forked, index):
    """It took the first patch, changed what is near the second, and what the third
    changes; the fourth fails for the third's sake, but for its new file."""
    theirs = {"_3": "line_3 = 33\n", "_13": "line_13 = 'theirs'\n"}
    theirs["_20"] = "line_20 = 'theirs'\n"
    before = forked.contents(forked.root)
    report = told(forked, index(**{"model.py": model(**theirs)}))
    assert "# The series of sglang==1.0 on 1.1\n" in report
    assert "4 patches: 1 is upstream already, 3 conflict.\n" in report
    assert "| `three`: Change line 3 | is upstream already |" in report
    second, third, fourth = report.split("\n## ")[1:]
    assert second.startswith("`twelve`: Change line 12\n")
    place = "python/sglang/srt/model.py:10"
    assert place in second and "has no `line_13 = 13` any more" in second
    assert "Of 2 hunks 1 fit." in third
    assert "srt/model.py:18 in `line" in third and "no `line_20 = 20` any" in third
    assert "Of 2 hunks 1 fit." in fourth and "no `line_20 = 'ours'` any" in fourth
    after = forked.contents(forked.root)
    assert {n for n in after if n not in before and ".cache" not in n} == set()


def test_a_three_way_merge(forked, index):
    """Lines above were added, and one in the patch's context was changed."""
    newer = b"added = 1\n" * 5 + model(_9="line_9 = 'theirs'\n", _25="x = 1\n")
    report = told(forked, index(**{"model.py": newer}))
    assert "| `twelve`: Change line 12 | applies by a three-way merge |" in report
    assert "0 conflict" not in report


def test_a_file_that_moved(forked, index):
    files = {"model.py": None, "../__init__.py": b"layers = 1\n"}
    report = told(forked, index(**files, **{"moved/model.py": model()}))
    assert "4 patches: 4 apply by a three-way merge.\n" in report


def test_upstream_did_the_same_in_another_place(forked, index):
    newer = model(_12="x = 1\ny = 2\nline_12 = 'ours'\nz = 3\n", _11="", _13="")
    report = told(forked, index(**{"model.py": newer}))
    assert "| `twelve`: Change line 12 | is upstream already |" in report


def test_a_new_file_that_upstream_has_too(forked, index):
    files = {"model.py": model(_20="line_20 = 'theirs'\n"), "new.py": b"other = 1\n"}
    report = told(forked, index(**files))
    said = "srt/new.py (added): the file is there already, or is another\n"
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
        said += ", python/sglang/srt/moved/model.py has its name"
    assert report.count(f"{said}\n") == 5


def test_what_cannot_be_fetched(forked):
    assert "--to newest is no version" in forked.refusal("port", "--to", "newest")
    refusal = forked.refusal("port", "--to", "9.9")
    assert "sglang==9.9 could not be fetched" in refusal


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
        assert "at the newest release, 1.0" in forked.fork("watch", **same, **env)
        assert len(fake.issues) == 1
        assert "Opened #2 for 1.1." in forked.fork("watch", **newer, **env)
        assert "says so already" in forked.fork("watch", **newer, **env)
        issue = fake.issues[1]
        assert issue["title"] == "SGLang 1.1 is out, and the series is at 1.0"
        assert "| `three`: Change line 3 | is upstream already |" in issue["body"]
        assert "Updated #2 for 1.1." in forked.fork("watch", **other, **env)
        assert "| `twelve`: Change line 12 | conflicts |" in issue["body"]
        issue["state"] = "closed"
        assert "was closed for 1.1" in forked.fork("watch", **newer, **env)
        assert issue["state"] == "closed"
        issue["title"] = issue["title"].replace("1.1", "1.0.9")
        assert "Updated #2 for 1.1." in forked.fork("watch", **newer, **env)
        assert issue["state"] == "open"
        assert "Closed #2" in forked.fork("watch", **same, **env)
    assert len(fake.issues) == 2 and issue["state"] == "closed"
    assert fake.issues[0]["title"] == "Somebody's" and fake.issues[0]["state"] == "open"
