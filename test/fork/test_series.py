"""Checkout and export are each other's inverse, on any series."""

import datetime
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fork.errors import ForkError
from fork.project import Project
from fork.tree import Tree

words = st.text(
    st.characters(categories=("L", "N", "S", "P"), exclude_characters="\x00"),
    min_size=1,
    max_size=9,
)
letters = st.text(st.characters(categories=("L",)), min_size=1, max_size=8)
sentence = st.builds(
    lambda first, rest: " ".join(["Fix" + first, *rest]),
    letters,
    st.lists(words, max_size=25),
)
messages = st.builds(
    lambda subject, body: "\n\n".join([subject, *body]) + "\n",
    sentence,
    st.lists(sentence, max_size=3),
)
authors = st.tuples(
    st.lists(letters, min_size=1, max_size=3).map(" ".join),
    st.integers(10**8, 2 * 10**9),
    st.integers(-12 * 4, 14 * 4),  # quarters of an hour
)
# Folders and files differ in their first letter, so no file is where a folder is.
names = st.text("aé ='\"[]{}*?\\,-.#!~$&;", max_size=6).map(lambda name: f"f{name}f")
paths = st.builds(
    lambda folders, name: "/".join([*folders, name]),
    st.lists(st.sampled_from(["srt", "d d", "dé"]), max_size=2),
    names,
)
lines = st.lists(
    st.sampled_from(
        [b"", b"a", b"  b ", b"\tc", b"-- ", b"From x", b"\xe9\xff", "é".encode()]
    ),
    max_size=12,
)
contents = st.one_of(
    st.builds(lambda lines, end: end.join(lines), lines, st.just(b"\n")),
    st.builds(
        lambda lines, ends: b"".join(a + b for a, b in zip(lines, ends)),
        lines,
        st.lists(st.sampled_from([b"\n", b"\r\n", b"\r"]), min_size=12, max_size=12),
    ),
    st.binary(max_size=200),
)
edits = st.one_of(
    st.tuples(st.just("write"), paths, contents),
    st.tuples(st.just("append"), st.integers(0, 99), contents),
    st.tuples(st.just("delete"), st.integers(0, 99), st.none()),
    st.tuples(st.just("rename"), st.integers(0, 99), paths),
    st.tuples(st.just("chmod"), st.integers(0, 99), st.none()),
)
commits = st.tuples(messages, authors, st.lists(edits, min_size=1, max_size=4))


def edit(tree: Path, kind: str, which, what) -> None:
    """Makes one edit; ``which`` names a file, or counts those that are there."""
    if kind == "write":
        path = tree / which
    else:
        tracked = (p for p in tree.rglob("*") if p.is_file() or p.is_symlink())
        ours = [p for p in tracked if ".git" not in p.parts and p.suffix != ".so"]
        ours = [p for p in ours if p.name != "_version.py"]
        path = sorted(ours)[which % len(ours)]
    if kind == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(what)
    elif kind == "append":
        path.write_bytes(path.read_bytes() + what)
    elif kind == "delete":
        path.unlink()
    elif kind == "rename":
        (tree / what).parent.mkdir(parents=True, exist_ok=True)
        path.rename(tree / what)
    elif kind == "chmod":
        path.chmod(path.stat().st_mode ^ 0o111)


GENERATED = (":(exclude)*.so", ":(exclude)_version.py")


def commit_all(repository, message: str, author=("Someone", 10**9, 0)) -> None:
    """Commits what there is, if there is anything, as a user's git does."""
    name, seconds, quarters = author
    zone = datetime.timezone(datetime.timedelta(minutes=15 * quarters))
    date = datetime.datetime.fromtimestamp(seconds, zone).isoformat()
    repository.git("add", "--all", "--force", "--", ".", *GENERATED)
    if repository.git("status", "--porcelain", "--untracked-files=no"):
        who = [f"--author={name} <name@example.com>", f"--date={date}"]
        repository.git("commit", "--quiet", *who, "--file=-", input=message)


def log(repository) -> str:
    form = "--format=%T %an %ae %ad %B"
    return repository.git("log", "--date=raw", form, "refs/fork/base..HEAD")


def tracked(repository) -> dict:
    found = repository.contents(repository.tree)
    return {k: v for k, v in found.items() if not k.endswith((".rej", "_version.py"))}


# An example runs git a hundred times: too slow to be made smaller.
@settings(
    max_examples=settings.default.max_examples // 8,
    phases=set(Phase) - {Phase.shrink},
)
@given(st.lists(commits, min_size=1, max_size=3))
def test_checkout_is_the_inverse_of_export(checked_out, made):
    with tempfile.TemporaryDirectory() as folder:
        one = checked_out.copy(Path(folder) / "one é")
        for message, author, changes in made:
            for change in changes:
                edit(one.tree, *change)
            commit_all(one, message, author)
        project = Project.load(python=one.python)
        Tree(project).export()
        exported = one.contents(one.patches)
        assert Tree(project).export() == []
        assert one.contents(one.patches) == exported

        # Another clone gets the same commits, the same files, and the same patches.
        two = checked_out.copy(Path(folder) / "two")
        shutil.copytree(one.patches, two.patches, dirs_exist_ok=True)
        project = Project.load(python=two.python)
        Tree(project).checkout()
        assert log(two) == log(one)
        assert tracked(two) == tracked(one)
        assert Tree(project).export() == []
        assert two.contents(two.patches) == exported
        assert not two.git("status", "--porcelain")

        # So does one who knows of git alone, in upstream's layout.
        plain = Path(folder) / "plain"
        shutil.copytree(checked_out.tree, plain / "python/sglang")
        shutil.rmtree(plain / "python/sglang/.git")
        one.git("init", "--quiet", cwd=plain)
        one.git("config", "core.autocrlf", "false", cwd=plain)
        one.git("config", "apply.whitespace", "nowarn", cwd=plain)
        one.git("add", "--all", "--force", cwd=plain)
        one.git("commit", "--quiet", "--message=Upstream", cwd=plain)
        patches = sorted(one.patches.glob("*.patch"))
        if patches:
            one.git("am", "--quiet", *patches, cwd=plain)
        upstream = one.contents(plain / "python/sglang")
        upstream.pop("_version.py")
        assert upstream == tracked(one)


@pytest.mark.parametrize(
    "message",
    [
        "Fix\n\n---\nafter the dashes\n",
        "Fix\n\ndiff --git a/x b/x\n",
        "Fix\n\nIndex: x\n",
        "Fix\n\nFrom: Somebody Else <else@example.com>\n\nbody\n",
        "Fix\n\nFrom 0123456789012345678901234567890123456789 Mon Sep 17 00:00:00 2001\n",
        "Fix a subject\nof two lines\n",
        "Re: fix\n",
        "[PATCH 1/2] Fix\n",
    ],
    ids=lambda message: message.strip().splitlines()[-1][:20],
)
def test_a_message_that_mail_changes_is_refused_before_anything_is_written(
    repository, message
):
    (repository.tree / "srt/model.py").write_text("layers = 3\n")
    commit_all(repository, message)
    with pytest.raises(ForkError, match="cannot be (a patch|patches)"):
        Tree(Project.load(python=repository.python)).export()
    assert not list(repository.patches.glob("*.patch"))


def test_the_commits_are_the_same_for_every_user(checked_out, tmp_path):
    ids = set()
    for user in ("one", "two"):
        repository = checked_out.copy(tmp_path / user)
        if user == "one":
            repository.commit("srt/model.py", "layers = 3\n", "[Gemma4] Add a layer")
            repository.fork("export")
        else:
            shutil.copytree(
                tmp_path / "one/patches",
                repository.root / "patches",
                dirs_exist_ok=True,
            )
        shutil.rmtree(repository.tree)
        repository.fork("checkout")
        ids.add(repository.git("rev-parse", "HEAD"))
        assert repository.git("log", "-1", "--format=%s") == "[Gemma4] Add a layer\n"
    assert len(ids) == 1


GOLDEN = Path(__file__).with_name("golden.patch")


def test_a_patch_is_this_with_any_settings_and_any_git(checked_out, tmp_path):
    message = """[Gemma4] Zähle größer, in a subject that is longer than a line of mail

Why — it is.
"""
    plain = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    for who in ("AUTHOR", "COMMITTER"):
        plain |= {f"GIT_{who}_NAME": "Nobody", f"GIT_{who}_EMAIL": "n@example.com"}
    for env in ({}, plain):
        repository = checked_out.copy(tmp_path / f"{len(env)} settings")
        repository.env = {**repository.env, **env}
        model = repository.tree / "srt/model.py"
        model.write_text(model.read_text().replace("line_9 = 9", "line_9 = 10"))
        model.chmod(0o755)
        repository.git("mv", "srt/script.sh", "srt/moved.sh")
        (repository.tree / "srt/crlf.py").write_bytes(b"a = 1\r\nb = 3\r\n")
        commit_all(repository, message, ("Zoë Łuć", 10**9, 22))
        repository.fork("export")
        (patch,) = repository.patches.glob("*.patch")
        assert patch.name.startswith("0001-Gemma4-Z-hle-gr-er-in-a-subject-that-is-")
        assert patch.read_bytes() == GOLDEN.read_bytes()
