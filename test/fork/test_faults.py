"""What goes wrong around the fork: one clear sentence, and nothing lost."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from test_series import log, tracked


def without_network(fresh):
    """Pip as it is by default, with an index that nobody answers for."""
    nobody = "http://127.0.0.1:9/simple"
    return {"PIP_NO_INDEX": "", "PIP_FIND_LINKS": "", "PIP_INDEX_URL": nobody}


def test_no_network(fresh):
    refusal = fresh.refusal("checkout", **without_network(fresh))
    assert "the package index does not answer" in refusal and "sglang==1.0" in refusal
    assert not fresh.tree.exists()
    fresh.fork("checkout")
    # What was fetched once needs no network again.
    shutil.rmtree(fresh.tree)
    fresh.fork("checkout", **without_network(fresh))


def test_an_index_without_the_release(fresh):
    refusal = fresh.refusal("base", PIP_FIND_LINKS="")
    assert "has no wheel of sglang==1.0" in refusal


def test_a_wheel_that_is_not_the_pinned_one(fresh):
    base = fresh.patches / "base.txt"
    base.write_text(re.sub("sha256:....", "sha256:0000", base.read_text()))
    refusal = fresh.refusal("checkout")
    assert "is not the one that patches/v1.0/base.txt pins by its sha256" in refusal
    assert not fresh.tree.exists()


def test_a_cached_wheel_that_was_damaged_is_fetched_again(fresh):
    fetched = fresh.fork("base").splitlines()[0]
    good = open(fetched, "rb").read()
    open(fetched, "wb").write(good[: len(good) // 2])
    fresh.fork("checkout")
    assert open(fetched, "rb").read() == good


def test_a_python_without_a_wheel(fresh):
    base = fresh.patches / "base.txt"
    base.write_text(base.read_text().replace("py3-none-any", "cp39-cp39-linux_x86_64"))
    refusal = fresh.refusal("checkout")
    assert sys.executable in refusal and refusal.endswith("cp39 on linux_x86_64.")


def test_no_git(fresh, tmp_path):
    assert "git is not installed" in fresh.refusal("checkout", PATH=str(tmp_path))
    assert not fresh.tree.exists()


def test_a_git_that_does_not_know_its_user(repository, tmp_path):
    """Checkout, export, verify and upstream need no name; commits are the user's."""
    repository.commit("srt/model.py", "layers = 3\n", "Add a layer")
    repository.describe(add_a_layer="test/a.py")
    repository.env = {**repository.env, "HOME": str(tmp_path), "EMAIL": ""}
    repository.env["XDG_CONFIG_HOME"] = str(tmp_path)
    repository.fork("export")
    shutil.rmtree(repository.tree)
    repository.fork("checkout")
    repository.fork("upstream")
    assert "Someone" in log(repository)


def test_a_hook_or_a_variable_of_the_users_changes_nothing(repository):
    """`git commit` in the outer repository runs `make patches` in a hook, say."""
    repository.commit("srt/model.py", "layers = 3\n", "Add a layer")
    outer = {"GIT_DIR": str(repository.root / ".git"), "GIT_EXTERNAL_DIFF": "false"}
    repository.fork("export", GIT_INDEX_FILE="/nonexistent", **outer)
    (patch,) = repository.patches.glob("*.patch")
    assert "--- a/python/sglang/srt/model.py\n" in patch.read_text()


def test_a_python_without_what_the_commands_need(fresh):
    done = subprocess.run(
        [sys.executable, "-S", "-m", "fork", "checkout"],
        cwd=fresh.python,
        env={**fresh.env, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: .*python\S* has no packaging: run `.* -m pip install .*`\.\n",
        done.stderr,
    )


@pytest.fixture
def killing_git(tmp_path):
    """A git whose n-th run dies and takes its caller with it, as a power cut does.

    A reset leaves what one that is cut off leaves: its lock and half a file.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    script = f"""#!/bin/sh
    count=$(($(cat {folder}/count) - 1)); echo $count > {folder}/count
    if [ $count -eq 0 ]; then
        case " $* " in *" reset "*) touch .git/index.lock; echo half > srt/model.py;; esac
        kill -9 $PPID
        exit 1
    fi
    exec {shutil.which("git")} "$@"
    """
    (folder / "git").write_text(script)
    (folder / "git").chmod(0o755)
    return folder


def kill_at(repository, number, killing_git, command) -> bool:
    """Runs a command until its n-th git; returns whether it got that far."""
    (killing_git / "count").write_text(str(number))
    path = f"{killing_git}{os.pathsep}{repository.env['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "fork", command],
        cwd=repository.python,
        env={**repository.env, "PATH": path},
        capture_output=True,
    )
    return done.returncode == -9


def test_a_checkout_that_is_cut_off_anywhere_is_done_again(
    repository, killing_git, tmp_path
):
    """To a series with other files, from one; the same result each time."""
    repository.commit("srt/old.py", "old\n", "Add old")
    repository.fork("export")
    other = repository.copy(tmp_path / "other")
    other.git("reset", "--quiet", "--hard", "refs/fork/base")
    other.commit("srt/new.py", "new\n", "Add new")
    other.commit("srt/model.py", "layers = 9\n", "Have nine layers")
    other.fork("export")
    shutil.rmtree(repository.patches)
    shutil.copytree(other.patches, repository.patches)
    number, died = 0, True
    while died:
        number += 1
        one = repository.copy(tmp_path / f"run {number}")
        died = kill_at(one, number, killing_git, "checkout")
        one.fork("checkout")
        assert tracked(one) == tracked(other)
        assert one.git("status", "--porcelain") == ""
        shutil.rmtree(one.root)
    assert number > 10


@pytest.mark.parametrize("number", [1, 2, 4, 6, 8])
def test_a_first_checkout_that_is_cut_off_is_done_again(
    bare, checked_out, fresh, killing_git, number
):
    assert kill_at(fresh, number, killing_git, "checkout")
    fresh.fork("checkout")
    assert tracked(fresh) == tracked(checked_out)
    assert not (fresh.python / ".sglang.partial").exists()


def test_an_export_that_is_cut_off_anywhere_is_done_again(
    repository, killing_git, tmp_path
):
    repository.commit("srt/old.py", "old\n", "Add old")
    repository.fork("export")
    repository.git("reset", "--quiet", "--hard", "refs/fork/base")
    repository.commit("srt/new.py", "new\n", "Add new")
    other = repository.copy(tmp_path / "other")
    other.fork("export")
    number, died = 0, True
    while died:
        number += 3
        one = repository.copy(tmp_path / f"run {number}")
        died = kill_at(one, number, killing_git, "export")
        one.fork("export")
        assert one.contents(one.patches) == other.contents(other.patches)
        shutil.rmtree(one.root)


def test_an_export_that_is_cut_off_between_two_files_is_done_again(
    repository, monkeypatch
):
    from fork import tree
    from fork.project import Project

    repository.commit("srt/one.py", "1\n", "Add one")
    repository.fork("export")
    repository.git("reset", "--quiet", "--hard", "refs/fork/base")
    repository.commit("srt/two.py", "2\n", "Add two")

    def cut(made, folder):
        (folder / "0001-Add-one.patch").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(tree, "replace_patches", cut)
    with pytest.raises(KeyboardInterrupt):
        tree.Tree(Project.load(python=repository.python)).export()
    assert "To keep it: `make patches`." in repository.refusal("checkout")
    repository.fork("export")
    assert [p.name for p in repository.patches.glob("*.patch")] == [
        "0001-Add-two.patch"
    ]


def mounts() -> list:
    """How this machine lets a small disk be made, as root or in a namespace."""
    for unshare in (["unshare", "-m"], ["unshare", "-rm"]):
        command = [*unshare, "mount", "-t", "tmpfs", "none", "/mnt"]
        if (
            shutil.which("unshare")
            and not subprocess.run(command, capture_output=True).returncode
        ):
            return unshare
    return []


@pytest.mark.skipif(not mounts(), reason="needs a namespace to mount a tmpfs in")
@pytest.mark.parametrize("kilobytes", [30, 200, 400, 700])
def test_a_full_disk(fresh, kilobytes):
    """A disk that ends a checkout early or late, and then grows."""
    script = f"""
    size=$(($(du -sk --apparent-size "a fork é" | cut -f1) + {kilobytes}))
    size=$((size + 4 * $(find "a fork é" | wc -l)))
    mount -t tmpfs -o size="$size"k none disk && cp -r "a fork é/." disk/ &&
    cd disk/python && mkdir ../tmp && export TMPDIR="$PWD/../tmp" || exit 9
    "{sys.executable}" -B -m fork checkout
    echo "first: $?"
    mount -o remount,size=100m ../../disk && "{sys.executable}" -B -m fork checkout
    echo "second: $?"
    git -C sglang status --porcelain
    """
    folder = fresh.root.parent
    (folder / "disk").mkdir()
    done = subprocess.run(
        [*mounts(), "bash", "-c", script],
        cwd=folder,
        env=fresh.env,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-2:] == ["first: 1", "second: 0"], done
    (error,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert re.fullmatch(r"error: The disk of .* is full: make room.*\.", error)
    assert "Traceback" not in done.stderr
