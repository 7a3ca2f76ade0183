"""`make prove`: a patch is proved by tests that pass with it and fail without it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fork import prove
from fork.errors import ForkError
from fork.project import Project

LAYERS = "test/srt/test_layers.py"
NEW = "test/srt/test_new.py"
CHANGED = "test/srt/test_changed.py"
TESTS = {
    LAYERS: "from sglang.srt.model import layers\n\n\n"
    "def test_layers():\n    assert layers == 3\n\n\n"
    "def test_nothing():\n    pass\n",
    NEW: "import helper\n\n\ndef test_new():\n"
    "    from sglang.srt import new\n\n    assert new.x >= helper.ONE\n",
    "test/srt/helper.py": "ONE = 1\n",
    CHANGED: "def test_two():\n    from sglang.srt.new import x\n\n    assert x == 2\n",
}


@pytest.fixture(scope="module")
def proved(checked_out, tmp_path_factory):
    """A series of three, of which the third needs the second; not to be changed."""
    repository = checked_out.copy(tmp_path_factory.mktemp("proved") / "a fork é")
    text = (repository.tree / "srt/model.py").read_text()
    text = text.replace("layers = 2", "layers = 3")
    repository.commit("srt/model.py", text, "Have three layers")
    repository.commit("srt/new.py", "x = 1\n", "Add new")
    repository.commit("srt/new.py", "x = 2\n", "Make it two")
    helped = f'{NEW}", "test/srt/helper.py'
    repository.describe(layers=LAYERS, new=helped, make_it_two=CHANGED)
    repository.fork("export")
    for name, content in TESTS.items():
        (repository.root / name).write_text(content)
    return repository


@pytest.fixture
def repository(proved, tmp_path):
    return proved.copy(tmp_path / "a fork é")


def rows(said: str) -> list:
    """The rows of the table."""
    return [line for line in said.splitlines() if line.startswith("| ")][2:]


def test_each_patch_is_proved(repository):
    """And python/sglang, with what is edited there, is left alone."""
    repository.write("srt/model.py", "edited\n")
    before = repository.contents(repository.tree)
    assert rows(repository.fork("prove")) == [
        "| layers | 2 | yes |  |",
        "| new | 1 | yes | without it and those after it, which need it |",
        "| make-it-two | 1 | yes |  |",
    ]
    assert repository.contents(repository.tree) == before
    log = (repository.root / "dist/prove/layers.log").read_text()
    assert "=== layers: its tests with it\n" in log and "2 passed" in log
    assert "=== layers: its tests without it\n" in log and "assert 2 == 3" in log
    assert "1 failed in" in log  # and the test behind it was not run


@pytest.mark.parametrize("part", ["its tests", "the patch"])
def test_what_was_proved_is_not_proved_again(repository, part):
    """Until it, or one of its tests, is another."""
    first = repository.fork("prove", "layers")
    log = repository.root / "dist/prove/layers.log"
    log.write_text("kept")
    assert rows(repository.fork("prove", "layers")) == rows(first)
    assert log.read_text() == "kept"
    if part == "its tests":
        (repository.root / LAYERS).write_text(f"{TESTS[LAYERS]}\n")
    else:
        (patch,) = repository.root.glob("patches/*/0001-*.patch")
        patch.write_text(patch.read_text().replace("Have three", "Have 3"))
    assert rows(repository.fork("prove", "layers")) == rows(first)
    assert "2 passed" in log.read_text()


def test_one_patch_alone(repository):
    said = repository.fork("prove", "make-it-two")
    assert rows(said) == ["| make-it-two | 1 | yes |  |"]
    kept = {path.name for path in (repository.root / "dist/prove").iterdir()}
    assert kept == {"make-it-two.log", "make-it-two.json"}
    refusal = repository.refusal("prove", "0003")
    assert "names no patch 0003, but layers, new, make-it-two." in refusal


def test_the_patches_that_a_pull_request_changes(repository):
    root = repository.root
    repository.git("init", "--quiet", cwd=root)
    repository.git("add", "--all", cwd=root)
    repository.git("commit", "--quiet", "--message=Start", cwd=root)
    assert rows(repository.fork("prove", "--since", "HEAD")) == []
    (root / LAYERS).write_text(TESTS[LAYERS] + "\n")
    (root / "test/srt/helper.py").write_text("ONE = 1  # one\n")
    said = repository.fork("prove", "--since", "HEAD")
    assert [row.split()[1] for row in rows(said)] == ["layers", "new"]
    repository.git("commit", "--quiet", "--all", "--message=Tests", cwd=root)
    repository.write("srt/new.py", "x = 2  # two\n")
    repository.git("commit", "--quiet", "--all", "--amend", "--no-edit")
    repository.fork("export")
    said = repository.fork("prove", "--since", "HEAD")
    assert rows(said) == ["| make-it-two | 1 | yes |  |"]


@pytest.mark.parametrize(
    "test, row",
    [
        ("def test(): pass\n", "| 1 | no | its tests pass without it |"),
        (
            "def test(): assert False\n",
            "| 0 |  | its tests fail with the series; 1 fail with it |",
        ),
        ("import missing\n", "| 0 |  | its tests fail with the series; 1 fail with"),
    ],
)
def test_what_is_no_proof(repository, test, row):
    (repository.root / LAYERS).write_text(test)
    said = repository.fork("prove", "layers", check=False)
    assert f"| layers {row}" in said
    assert said.endswith("error: layers is not proved: see dist/prove/.\n")


def test_tests_that_cannot_run_here_prove_nothing_and_fail_nothing(repository):
    text = "import pytest\n\n\n@pytest.mark.skip\ndef test(): pass\n"
    for content, more in ((text, "; 1 skipped"), ("", "")):
        (repository.root / LAYERS).write_text(content)
        said = repository.fork("prove", "layers")
        assert rows(said) == [
            f"| layers | 0 |  | none of its tests can run here{more} |"
        ]


def of_the_index(repository, monkeypatch) -> None:
    """Has what runs in this process find the small upstream."""
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.setenv(name, repository.env[name])


@pytest.mark.parametrize(
    "without", ["import os; os.abort()", "import time; time.sleep(600)"]
)
def test_a_run_without_the_patch_that_does_not_end_well(
    repository, monkeypatch, without
):
    """It dies, or hangs: either is a failure."""
    test = "from sglang.srt.model import layers\n\n\ndef test():\n"
    test += f"    if layers == 2:\n        {without}\n"
    (repository.root / LAYERS).write_text(test)
    monkeypatch.setattr(prove, "SECONDS", 20)
    of_the_index(repository, monkeypatch)
    (proof,) = prove.prove(Project.load(python=repository.python), ["layers"])
    assert proof.with_it.passed == 1 and proof.without.failed == 1
    assert not proof.reason


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_tests_too(repository, signum):
    started = repository.root / "started"
    test = "import pathlib, os, time\n\n\ndef test():\n"
    test += f"    pathlib.Path({str(started)!r}).write_text(str(os.getpid()))\n"
    (repository.root / LAYERS).write_text(f"{test}    time.sleep(600)\n")
    command = [sys.executable, "-m", "fork", "prove", "layers"]
    pipe = subprocess.PIPE
    running = subprocess.Popen(
        command, cwd=repository.python, env=repository.env, stdout=pipe, stderr=pipe
    )
    deadline = time.monotonic() + 120
    while not (started.exists() and started.read_text()):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.1)
    running.send_signal(signum)
    running.communicate(timeout=60)
    assert running.returncode == 1
    assert not Path("/proc", started.read_text()).exists()


def test_a_python_that_imports_another_sglang_proves_nothing(
    repository, monkeypatch, tmp_path
):
    """One with an editable install whose finder comes before the path, say."""
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang/__init__.py").touch()
    other = {**repository.env, "PYTHONPATH": str(tmp_path)}
    monkeypatch.setattr(prove, "_environment", lambda git: other)
    of_the_index(repository, monkeypatch)
    with pytest.raises(ForkError, match="would prove nothing"):
        prove.prove(Project.load(python=repository.python))
