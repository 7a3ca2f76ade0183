"""The series as pull requests: `git am` in upstream's repository, tests and all."""

import shutil

from test_series import tracked

TEST = "test/srt/a test é.py"


def test_upstream_takes_the_series_with_its_tests(repository, tmp_path):
    (repository.root / "test/srt").mkdir(parents=True)
    (repository.root / TEST).write_bytes(b"def test(): pass\r\n")
    script = repository.root / "benchmark.sh"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    factory = repository.root / "factory"
    (factory / "parts").mkdir(parents=True)
    for name in ("one.py", "parts/two.py", "parts/notes.txt"):
        (factory / name).write_text("")
    repository.commit("srt/new.py", "1\n", "[Gemma4] Add new\n\nWhy.")
    repository.git("mv", "srt/crlf.py", "srt/moved.py")
    signed = "Signed-off-by: Someone <s@e.com>"
    repository.commit("srt/new.py", "2\n", f"Change new\n\nWhy.\n\n{signed}")
    repository.describe(
        add_new='benchmark.sh", "factory', change_new=f'{TEST}", "benchmark.sh'
    )
    repository.fork("export")

    names = repository.fork("upstream").splitlines()
    assert names == [
        "dist/upstream/0001-add-new.patch",
        "dist/upstream/0002-change-new.patch",
    ]
    written = repository.contents(repository.root / "dist")
    repository.fork("upstream")
    assert repository.contents(repository.root / "dist") == written

    plain = tmp_path / "upstream"
    shutil.copytree(repository.tree, plain / "python/sglang")
    shutil.rmtree(plain / "python/sglang/.git")
    # The tree is at the end of the series; upstream's is at the base.
    repository.git("checkout", "--quiet", "refs/fork/base")
    for name in ("srt/new.py", "srt/moved.py"):
        (plain / "python/sglang" / name).unlink()
    shutil.copy(repository.tree / "srt/crlf.py", plain / "python/sglang/srt/crlf.py")
    repository.git("checkout", "--quiet", "fork")
    repository.git("init", "--quiet", cwd=plain)
    repository.git("config", "core.autocrlf", "false", cwd=plain)
    repository.git("add", "--all", cwd=plain)
    repository.git("commit", "--quiet", "--message=Upstream", cwd=plain)

    first, second = (repository.root / name for name in names)
    repository.git("am", "--quiet", first, cwd=plain)
    # What two patches name comes with the first.
    assert (plain / "benchmark.sh").stat().st_mode & 0o100
    assert not (plain / TEST).exists()
    # A folder stands for the Python files in it.
    assert repository.contents(plain / "factory").keys() == {"one.py", "parts/two.py"}
    repository.git("am", "--quiet", second, cwd=plain)
    assert (plain / TEST).read_bytes() == b"def test(): pass\r\n"
    upstream = repository.contents(plain / "python/sglang")
    upstream.pop("_version.py")
    assert upstream == tracked(repository)
    message = repository.git("log", "-1", "--format=%B", cwd=plain)
    assert message.strip() == f"Change new\n\nWhy.\n\n{signed}"


def test_what_is_no_longer_in_the_series_is_removed(repository):
    repository.commit("srt/new.py", "1\n", "Add new")
    repository.describe(add_new="test/a.py")
    repository.fork("export")
    repository.fork("upstream")
    note = repository.root / "dist/upstream/note.txt"
    note.write_text("mine\n")
    repository.git("reset", "--quiet", "--hard", "HEAD~1")
    repository.describe()
    repository.fork("export")
    assert repository.fork("upstream") == ""
    assert [path.name for path in note.parent.iterdir()] == ["note.txt"]


def test_a_patch_adds_what_one_person_can_review(repository):
    """With the tests that come with it, and without those that came before."""
    repository.commit("srt/new.py", "1\n" * 300, "Add new")
    repository.commit("srt/more.py", "1\n" * 400, "Add more")
    repository.describe(add_new="test/a.py", add_more="test/a.py")
    test = repository.root / "test/a.py"
    test.write_text("1\n" * 399)
    repository.fork("export")
    repository.fork("upstream")
    test.write_text("1\n" * 400)
    refusal = repository.refusal("upstream")
    assert "add-new adds 700 lines" in refusal and "may add 699" in refusal


def test_one_patch_alone(repository, tmp_path):
    """On the release itself, with a test that another patch has as well."""
    text = (repository.tree / "srt/model.py").read_text()
    new = text.replace("line_3 = 3", "line_3 = 33")
    repository.commit("srt/model.py", new, "Change line 3")
    repository.commit(
        "srt/model.py", new.replace("layers = 2", "layers = 3"), "Have three layers"
    )
    repository.commit("srt/model.py", text.replace("line_3 = 3", "line_3 = 4"), "Again")
    tests = {"line": TEST, "layers": TEST, "again": TEST}
    repository.describe(**tests)
    repository.fork("export")
    repository.fork("upstream")
    assert repository.fork("upstream", "layers") == "dist/alone/layers.patch\n"
    assert len([*(repository.root / "dist/upstream").iterdir()]) == 3

    repository.git("checkout", "--quiet", "refs/fork/base")
    plain = tmp_path / "upstream"
    shutil.copytree(repository.tree, plain / "python/sglang")
    shutil.rmtree(plain / "python/sglang/.git")
    repository.git("init", "--quiet", cwd=plain)
    repository.git("config", "core.autocrlf", "false", cwd=plain)
    repository.git("add", "--all", cwd=plain)
    repository.git("commit", "--quiet", "--message=Upstream", cwd=plain)
    patch = repository.root / "dist/alone/layers.patch"
    repository.git("am", "--quiet", patch, cwd=plain)
    assert "line_3 = 3\n" in (plain / "python/sglang/srt/model.py").read_text()
    assert "layers = 3\n" in (plain / "python/sglang/srt/model.py").read_text()
    assert (plain / TEST).read_text() == (repository.root / TEST).read_text()

    refusal = repository.refusal("upstream", "again")
    assert "again needs patches before it" in refusal
    assert "srt/model.py as well: line" in refusal
    assert "names no patch '0001', but line" in repository.refusal("upstream", "0001")
