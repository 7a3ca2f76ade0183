"""A patch is known by its name: series.toml gives it, files and `make edit` have it."""

import re
import shlex

import pytest
from test_tree import patch_names

TEST = "test/srt/test_it.py"


@pytest.fixture(scope="module")
def named(checked_out, tmp_path_factory):
    """A series of three with names; not to be changed."""
    repository = checked_out.copy(tmp_path_factory.mktemp("named") / "a fork é")
    for subject in ("Add one", "[Gemma4] Add two", "Add three"):
        name = f"srt/{subject.split()[-1]}.py"
        repository.commit(name, "x = 1\n", f"{subject}\n\nWhy.\n")
    repository.describe(one=TEST, number_two=TEST, three=TEST)
    repository.fork("export")
    return repository


@pytest.fixture
def repository(named, tmp_path):
    return named.copy(tmp_path / "a fork é")


def test_files_have_the_names(repository):
    names = ["0001-one.patch", "0002-number-two.patch", "0003-three.patch"]
    assert patch_names(repository) == names
    assert repository.fork("checkout") == repository.fork("export") == ""
    repository.describe(one=TEST, two=TEST, three=TEST)
    said = repository.fork("export").splitlines()
    assert said == [
        "Removed patches/v1.0/0002-number-two.patch",
        "Wrote patches/v1.0/0002-two.patch",
    ]
    assert patch_names(repository) == [names[0], "0002-two.patch", names[2]]


def test_a_commit_that_has_no_name_yet(repository):
    repository.commit("srt/four.py", "x = 1\n", "Add four")
    refusal = repository.refusal("export")
    assert "series.toml names 3 patches and python/sglang has 4 commits" in refusal
    assert 'new here: "Add four"; of no commit here: none.' in refusal
    repository.describe(one=TEST, number_two=TEST, three=TEST, four=TEST)
    assert "0004-four.patch" in repository.fork("export")


def test_a_name_that_has_no_commit_any_more(repository):
    repository.git("reset", "--quiet", "--hard", "HEAD~1")
    refusal = repository.refusal("export")
    assert "new here: none; of no commit here: three." in refusal
    repository.describe(one=TEST, number_two=TEST)
    assert "Removed patches/v1.0/0003-three.patch" in repository.fork("export")


def test_an_order_that_is_not_that_of_the_commits(repository):
    before = repository.contents(repository.patches)
    # The third commit first; then the others.
    repository.git("reset", "--quiet", "--hard", "refs/fork/base")
    repository.git("cherry-pick", "refs/fork/series")
    repository.git("cherry-pick", "refs/fork/base..refs/fork/series~1")
    refusal = repository.refusal("export")
    assert 'commit "Add three" of python/sglang is three' in refusal
    assert "series.toml has one in its place" in refusal
    assert repository.contents(repository.patches) == before
    repository.describe(three=TEST, one=TEST, number_two=TEST)
    repository.fork("export")
    assert patch_names(repository)[0] == "0001-three.patch"


def test_a_commit_may_be_called_otherwise(repository):
    repository.git("commit", "--quiet", "--amend", "--message=Add the third")
    repository.fork("export")
    assert patch_names(repository)[2] == "0003-three.patch"


def test_to_edit_is_to_do_what_it_says(repository):
    repository.git("checkout", "--quiet", "--detach", "refs/fork/base")
    repository.git("checkout", "--quiet", "fork")
    said = repository.fork("edit", "number-two")
    assert said.startswith("number-two is the commit ")
    assert "    python/sglang/srt/two.py\n" in said
    repository.write("srt/two.py", "x = 22\n")
    for line in re.findall(r"^    (?:\S+=: )?(git .*)$", said, re.MULTILINE):
        _, *args = shlex.split(line)
        config = ["-c", "sequence.editor=:"]
        repository.git(*config, *args, cwd=repository.root)
    assert said.endswith("    make patches\n")
    assert repository.fork("export").splitlines() == [
        "Wrote patches/v1.0/0002-number-two.patch"
    ]
    patch = repository.patches / "0002-number-two.patch"
    assert "\n+x = 22\n" in patch.read_text()


def test_to_edit_checks_out_what_is_missing(repository):
    repository.git("reset", "--quiet", "--hard", "refs/fork/base")
    repository.git("update-ref", "refs/fork/series", "refs/fork/base")
    state = repository.tree / ".git/fork.json"
    state.write_text(re.sub('"series": ".*"', '"series": null', state.read_text()))
    assert "one is the commit" in repository.fork("edit", "one")
    assert (repository.tree / "srt/three.py").exists()


def test_what_cannot_be_edited(repository):
    refusal = repository.refusal("edit", "0002")
    assert "no patch of the name '0002', but one, number-two, three." in refusal
    assert "no patch of the name ''" in repository.refusal("edit", "")
    repository.git("commit", "--quiet", "--amend", "--message=Add the third")
    assert 'has no commit "Add three" any more' in repository.refusal("edit", "three")
