"""What checkout and export do to python/sglang and patches/, and what they refuse."""

import re
import shlex
import shutil

import pytest
from test_series import log, tracked

DIRTY = "uncommitted file (srt/model.py)"


def patch_names(repository) -> list:
    return [patch.name for patch in sorted(repository.patches.glob("*.patch"))]


def test_the_checkout_is_the_base(checked_out):
    assert checked_out.git("log", "--format=%s") == "sglang==1.0\n"
    assert checked_out.git("status", "--porcelain") == ""
    assert checked_out.git("rev-parse", "HEAD", "refs/fork/base", "refs/fork/series")
    files = checked_out.git("ls-files").splitlines()
    assert "srt/.hidden/kept.tmp" in files and "srt/model.py" in files
    # What differs between Pythons is there, and in no commit.
    assert (checked_out.tree / "srt/_core.cpython-3-linux.so").is_file()
    assert not any(name.endswith((".so", "_version.py")) for name in files)
    assert "1.0+test.2" in (checked_out.tree / "_version.py").read_text()
    assert (checked_out.tree / "srt/script.sh").stat().st_mode & 0o100


def test_nothing_is_written_when_nothing_changed(repository):
    repository.write("srt/model.py", "uncommitted\n")

    def times():
        files = (p for p in repository.root.rglob("*") if "__pycache__" not in p.parts)
        return {
            p: p.stat().st_mtime_ns for p in files if p.name not in ("lock", ".git")
        }

    before = times()
    # No pip and no index is needed either.
    assert repository.fork("checkout", PIP_FIND_LINKS="", PIP_NO_INDEX="1") == ""
    assert times() == before


def test_a_new_series_replaces_a_clean_tree_and_keeps_its_branches(repository):
    repository.commit("srt/model.py", "layers = 3\n", "Add a layer")
    repository.fork("export")
    repository.git("branch", "mine")
    (repository.patches / "0001-Add-a-layer.patch").unlink()
    repository.fork("checkout")
    assert log(repository) == ""
    assert repository.git("log", "-1", "--format=%s", "mine") == "Add a layer\n"


def test_export_removes_and_renumbers(repository):
    for number in (1, 2, 3):
        repository.commit(f"srt/new{number}.py", f"{number}\n", f"Add new{number}")
    assert "0003-Add-new3.patch" in repository.fork("export")
    repository.git("rebase", "--quiet", "--onto", "HEAD~2", "HEAD~1")
    said = repository.fork("export")
    assert "Removed patches/v1.0/0003-Add-new3.patch" in said
    assert patch_names(repository) == ["0001-Add-new1.patch", "0002-Add-new3.patch"]


def test_checkout_refuses_to_overwrite_what_was_not_committed(repository):
    other = repository.copy(repository.root.parent / "other")
    other.commit("srt/new.py", "1\n", "Add new")
    other.fork("export")
    shutil.copytree(other.patches, repository.patches, dirs_exist_ok=True)
    repository.write("srt/model.py", "mine\n")
    refusal = repository.refusal("checkout")
    assert DIRTY in refusal and "stash" in refusal
    assert (repository.tree / "srt/model.py").read_text() == "mine\n"
    follow(repository, refusal, until="To throw it away", then={"again": "checkout"})
    assert (repository.tree / "srt/model.py").read_text() == "mine\n"
    assert (repository.tree / "srt/new.py").read_text() == "1\n"


def test_an_untracked_file_is_work(repository):
    (repository.patches / "base.txt").write_text(
        "# Another digest.\n" + (repository.patches / "base.txt").read_text()
    )
    repository.write("srt/untracked.json", "{}")
    assert "(srt/untracked.json)" in repository.refusal("checkout")


def test_both_the_tree_and_the_series_have_changed(repository):
    """The message says how to have both; it is followed to the letter."""
    other = repository.copy(repository.root.parent / "other")
    other.commit("srt/theirs.py", "theirs\n", "Add theirs")
    other.fork("export")
    repository.commit("srt/mine.py", "mine\n", "Add mine")
    shutil.copytree(other.patches, repository.patches, dirs_exist_ok=True)
    for command in ("checkout", "export"):
        refusal = repository.refusal(command)
        assert "commits" in refusal and "has changed too" in refusal
    follow(repository, refusal, until="To throw it away")
    assert patch_names(repository) == ["0001-Add-theirs.patch", "0002-Add-mine.patch"]
    assert (repository.tree / "srt/mine.py").exists()
    assert (repository.tree / "srt/theirs.py").exists()


def follow(repository, advice: str, until: str, then={}) -> None:
    """Runs the commands that a message names."""
    make = {"make fork": "checkout", "make patches": "export", **then}
    for command in re.findall(r"`(.+?)`|run (again)", advice.split(until)[0]):
        command = command[0] or command[1]
        if command in make:
            repository.fork(make[command])
        else:
            git, *args = shlex.split(command)
            assert git == "git"
            repository.git(*args, cwd=repository.root)


@pytest.mark.parametrize("command", ["commit --fixup=HEAD", "commit --squash=HEAD"])
def test_export_refuses_fixups(repository, command):
    repository.commit("srt/new.py", "1\n", "Add new")
    repository.write("srt/new.py", "2\n")
    repository.git(*command.split(), "--all", "--no-edit")
    refusal = repository.refusal("export")
    assert "1 fixup commit" in refusal and "--autosquash" in refusal
    editor = ["-c", "sequence.editor=:", "-c", "core.editor=:"]
    repository.git(*editor, "rebase", "-i", "--autosquash", "refs/fork/base")
    repository.fork("export")
    assert patch_names(repository) == ["0001-Add-new.patch"]


def test_export_refuses_what_no_patch_can_hold(repository):
    repository.write("srt/model.py", "mine\n")
    assert DIRTY in repository.refusal("export")
    repository.git("stash")
    repository.git("checkout", "--quiet", "-b", "side")
    repository.commit("srt/side.py", "1\n", "Add side")
    repository.git("checkout", "--quiet", "fork")
    repository.commit("srt/main.py", "1\n", "Add main")
    repository.git("merge", "--quiet", "--no-edit", "side")
    assert "merge commit" in repository.refusal("export")
    repository.git("checkout", "--quiet", "--orphan", "unrelated")
    repository.git("commit", "--quiet", "--message=Start")
    assert "is not based on" in repository.refusal("export")
    repository.git("checkout", "--quiet", "fork")
    repository.git("reset", "--quiet", "--hard", "refs/fork/base")
    repository.git("commit", "--quiet", "--allow-empty", "--message=Nothing")
    assert "empty commit" in repository.refusal("export")
    assert patch_names(repository) == []


def test_export_does_not_undo_a_change_of_the_series(repository):
    repository.commit("srt/new.py", "1\n", "Add new")
    repository.fork("export")
    (patch,) = repository.patches.glob("*.patch")
    patch.write_text(patch.read_text().replace("\n+1\n", "\n+2\n"))
    refusal = repository.refusal("export")
    assert "has changed since" in refusal and "`make fork` first" in refusal
    repository.fork("checkout")
    repository.fork("export")
    assert "\n+2\n" in patch.read_text()


MODEL = "srt/model.py"


@pytest.fixture
def conflict(repository):
    """A series whose first patch was changed by hand, so the second does not apply."""
    text = (repository.tree / MODEL).read_text()
    for old, new in (("line_3 ", "LINE_3 "), ("line_5 ", "LINE_5 ")):
        text = text.replace(old, new)
        repository.commit(MODEL, text, f"Make it {new.strip()}")
    repository.commit("srt/last.py", "last\n", "Add last")
    repository.fork("export")
    first = repository.patches / "0001-Make-it-LINE_3.patch"
    first.write_text(first.read_text().replace("+LINE_3 = 3", "+third = 3"))
    return repository


def refused_at_second(conflict) -> str:
    refusal = conflict.refusal("checkout")
    assert "0002-Make-it-LINE_5.patch does not apply: " in refusal
    assert "python/sglang/srt/model.py, the hunk at line 3" in refusal
    return refusal


def assert_mended(conflict) -> None:
    conflict.fork("export")
    lines = (conflict.tree / MODEL).read_text().splitlines()
    assert "third = 3" in lines and "LINE_5 = 5" in lines
    assert len(patch_names(conflict)) == 3
    exported, files = conflict.contents(conflict.patches), tracked(conflict)
    shutil.rmtree(conflict.tree)
    conflict.fork("checkout")
    conflict.fork("export")
    assert conflict.contents(conflict.patches) == exported
    assert tracked(conflict) == files


def test_a_patch_that_git_can_merge(conflict):
    assert "Git could merge it" in refused_at_second(conflict)
    assert "holds work" not in conflict.fork("export")
    assert_mended(conflict)


def test_a_patch_that_git_cannot_merge_for_want_of_an_ancestor(conflict):
    """A new clone does not have the file that the patch was made from."""
    shutil.rmtree(conflict.tree)
    assert "*.rej" in refused_at_second(conflict)
    for command in ("checkout", "export", "verify"):
        assert "A git am is under way" in conflict.refusal(command)
    assert "LINE_5" in (conflict.tree / "srt/model.py.rej").read_text()
    text = (conflict.tree / MODEL).read_text()
    conflict.write(MODEL, text.replace("line_5 ", "LINE_5 "))
    conflict.git("add", MODEL)
    conflict.git("am", "--continue")
    assert_mended(conflict)


def test_a_patch_that_conflicts(conflict):
    """Both change one line: git marks it, and the user goes on with git alone."""
    first = conflict.patches / "0001-Make-it-LINE_3.patch"
    changed = first.read_text().replace(" line_5 = 5", "-line_5 = 5\n+fifth = 5")
    first.write_text(changed.replace("@@ -2,7 +2,7 @@", "@@ -1,7 +1,7 @@"))
    refused_at_second(conflict)
    text = (conflict.tree / MODEL).read_text()
    assert "<<<<<<<" in text and "fifth = 5\n" in text
    ours_then_theirs = re.compile(r"<<<<<<<.*?=======\n(.*?)>>>>>>>[^\n]*\n", re.DOTALL)
    mended = ours_then_theirs.sub(r"\1", text).replace("LINE_3 =", "third =")
    conflict.write(MODEL, mended)
    conflict.git("add", MODEL)
    conflict.git("am", "--continue")
    assert_mended(conflict)


def test_a_patch_that_does_not_apply_can_be_dropped(conflict):
    before = tracked(conflict)
    shutil.rmtree(conflict.tree)
    refused_at_second(conflict)
    conflict.git("am", "--abort")
    first = conflict.patches / "0001-Make-it-LINE_3.patch"
    first.write_text(first.read_text().replace("+third = 3", "+LINE_3 = 3"))
    conflict.fork("checkout")
    assert tracked(conflict) == before


def test_a_file_that_is_no_patch(repository):
    (repository.patches / "0001-note.patch").write_text("Remember the milk\n")
    assert "Patch format detection failed" in repository.refusal("checkout")
    (repository.patches / "0001-note.patch").unlink()
    repository.fork("checkout")


def test_a_folder_of_the_users_is_left_alone(fresh):
    fresh.tree.mkdir()
    (fresh.tree / "mine.py").write_text("mine\n")
    for command in ("checkout", "export"):
        assert "was not written by `make fork`" in fresh.refusal(command)
    assert (fresh.tree / "mine.py").read_text() == "mine\n"


def test_another_release_takes_the_same_tree(repository):
    """base.txt says another thing of the same wheel: the base is written anew."""
    repository.commit("srt/new.py", "1\n", "Add new")
    repository.fork("export")
    shutil.copytree(repository.patches, repository.root / "patches/v2.0")
    base = repository.root / "patches/v2.0/base.txt"
    base.write_text("# Another.\n" + base.read_text())
    repository.fork("--series", "v2.0", "checkout")
    assert (repository.tree / "srt/new.py").exists()
    assert (repository.tree / "srt/_core.cpython-3-linux.so").is_file()
    assert repository.fork("--series", "v2.0", "checkout") == ""
    refusal = repository.refusal("--series", "v3.0", "checkout")
    assert "patches/v3.0/base.txt is missing" in refusal


def test_the_compiled_modules_of_another_python_are_added(repository):
    """As if the checkout had been made with another Python's wheel."""
    state = repository.tree / ".git/fork.json"
    state.write_text(
        re.sub(r'"cpython-[^"]+"', '"cpython-310-other"', state.read_text())
    )
    (repository.tree / "srt/_core.cpython-3-linux.so").unlink()
    repository.write("srt/model.py", "uncommitted\n")
    repository.fork("checkout")
    assert (repository.tree / "srt/_core.cpython-3-linux.so").is_file()
    assert (repository.tree / "srt/model.py").read_text() == "uncommitted\n"
