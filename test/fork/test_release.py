"""A release: its files, its publication, and that its wheel serves, installed alone."""

import hashlib
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT, run
from github_fake import FakeGitHub

from fork.base import installed

VERSION = "1.0+test.2"
MESSAGE = """Have three layers

Two were too few: `pytest test/srt/a.py`.

- A list, of
  two lines
"""


def build_wheel(repository) -> Path:
    """As `make wheel` does, but for an environment without a network."""
    command = ["pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--wheel-dir", "dist/wheels", "./python"]
    run(sys.executable, "-m", *command, cwd=repository.root, env=repository.env)
    (wheel,) = (repository.root / "dist/wheels").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def with_wheel(checked_out, tmp_path_factory):
    """A fork of one patch with its wheel; not to be changed."""
    repository = checked_out.copy(tmp_path_factory.mktemp("release") / "a fork é")
    repository.describe(three_layers="test/srt/a.py")
    model = (repository.tree / "srt/model.py").read_text()
    model = model.replace("layers = 2", "layers = 3")
    repository.commit("srt/model.py", model, MESSAGE)
    repository.fork("export")
    build_wheel(repository)
    return repository


@pytest.fixture
def repository(with_wheel, tmp_path):
    return with_wheel.copy(tmp_path / "a fork é")


def test_what_a_release_holds(repository, tmp_path):
    folder, wheels = (repository.root / "dist" / n for n in ("release", "wheels"))
    (wheels / "sglang-1.0+test.1-py3-none-any.whl").write_text("of an older version")
    (wheels / "junk").write_text("junk")
    (folder / "junk").mkdir(parents=True)
    (folder / "sglang-1.0+test.2.tar.gz").write_text("of a run that was cut off")
    output = tmp_path / "output"
    names = repository.fork(
        "release", "--tag", "test.2", GITHUB_OUTPUT=str(output)
    ).splitlines()
    assert [name.removeprefix("dist/release/") for name in names] == [
        "NOTES.md",
        "SHA256SUMS",
        f"sglang-{VERSION}-py3-none-any.whl",
        f"sglang-{VERSION}.tar.gz",
        "sglang-v1.0-test.2-patches.tar",
    ]
    assert {f"dist/release/{path.name}" for path in folder.iterdir()} == set(names)
    check = run("sha256sum", "--check", "SHA256SUMS", cwd=folder, env=repository.env)
    assert check.stdout.count(": OK\n") == 4
    assert output.read_text() == f"digest={digest(repository)}\n"

    with tarfile.open(folder / "sglang-v1.0-test.2-patches.tar") as archive:
        archive.extractall(tmp_path)
    (patches,) = tmp_path.glob("sglang-v1.0-*")
    upstream = repository.root / "dist/upstream"
    assert repository.contents(patches) == repository.contents(upstream)
    assert [path.name for path in upstream.iterdir()] == ["0001-three-layers.patch"]

    notes = (folder / "NOTES.md").read_text()
    assert "`sglang==1.0` with 1 patches" in notes
    text = MESSAGE.split("\n\n", 1)[1].strip()
    assert f"### Have three layers\n\n{text}\n" in notes
    assert "diff --git" not in notes

    before = repository.contents(folder)
    repository.fork("release")
    assert repository.contents(folder) == before


def digest(repository) -> str:
    """What the job that wrote a release says of it."""
    sums = repository.root / "dist/release/SHA256SUMS"
    return hashlib.sha256(sums.read_bytes()).hexdigest()


def test_a_release_is_of_one_series(repository):
    """Not of the one that pyproject.toml names, in any of its files."""
    other = repository.root / "patches/v0.9"
    shutil.copytree(repository.patches, other)
    settings = other / "series.toml"
    settings.write_text(settings.read_text().replace("1.0+test.2", "0.9+test.1"))
    pyproject = repository.python / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('"v1.0"', '"v0.9"'))
    names = repository.fork("--series", "v1.0", "release", "--tag", "test.2")
    assert f"sglang-{VERSION}.tar.gz\n" in names and "0.9" not in names


def test_a_release_that_fails_leaves_no_half(repository):
    """Nor what was there, cut down; and it can be made again."""
    repository.fork("release")
    dist = repository.root / "dist"
    before = repository.contents(dist)
    code = (
        "import fork.release as r\nfrom fork.project import Project\n"
        "def fail(_): raise SystemExit(7)\nr.release_notes = fail\n"
        "r.write_release(Project.load())"
    )
    env = repository.env
    done = run(sys.executable, "-c", code, cwd=repository.python, env=env, check=False)
    assert done.returncode == 7 and repository.contents(dist) == before
    repository.fork("release")
    assert repository.contents(dist) == before


def test_what_is_no_release(repository):
    refusal = repository.refusal("release", "--tag", "test.3")
    assert "tag test.3 is not that of version 1.0+test.2, which is test.2" in refusal
    shutil.rmtree(repository.root / "dist")
    for command in (["release"], ["smoke"]):
        assert "run `make wheel`" in repository.refusal(*command)


def publish(repository, *args, **env) -> str:
    """As a workflow does it; returns what it said, or its error alone."""
    command = [sys.executable, "-m", "fork.ci.publish", *args]
    env = {**repository.env, "TAG": "test.2", **env}
    done = run(*command, cwd=repository.python, env=env, check=False)
    if not done.returncode:
        return done.stdout
    *_, said = done.stderr.splitlines()
    assert "Traceback" not in done.stderr and said.startswith("error: ")
    return said


def test_publishing(repository):
    repository.fork("release", "--tag", "test.2")
    folder = repository.root / "dist/release"
    fake = FakeGitHub()
    with fake.served() as github:
        env = {"DIGEST": digest(repository), **github}
        assert "git/ref/tags/test.2 was refused: 404" in publish(repository, **env)
        fake.tags.add("test.2")
        assert "https://github.example/releases/1\n" in publish(repository, **env)
        (release,) = fake.releases
        assert release["tag_name"] == "test.2" and release["draft"] is False
        assert release["name"] == VERSION
        assert release["body"] == (folder / "NOTES.md").read_text()
        assert fake.assets == {p.name: p.read_bytes() for p in folder.iterdir()}
        assert "There is a release test.2 already" in publish(repository, **env)
    assert len(fake.releases) == 1


def test_what_is_not_published(repository):
    """What is not what the job that wrote it says: no token is asked for to see it."""
    assert "run `make release` first" in publish(repository, "check")
    repository.fork("release", "--tag", "test.2")
    folder = repository.root / "dist/release"
    sums, written = folder / "SHA256SUMS", digest(repository)

    def check(**env):
        return publish(repository, "check", **{"DIGEST": written, **env})

    assert check() == ""
    said = publish(repository, DIGEST=written, GITHUB_TOKEN="")
    assert "GITHUB_TOKEN" in said and "must be set, as in a workflow" in said
    assert "not the one whose sha256 is missing" in check(DIGEST="")
    for tag in ("test.1", "2", ""):
        assert "is of 1.0+test.2, not of the tag" in check(TAG=tag)
    (folder / "another.whl").touch()
    assert "has NOTES.md, another.whl" in check()
    (folder / "another.whl").unlink()
    (sdist,) = folder.glob("*.tar.gz")
    content = sdist.read_bytes()
    sdist.write_bytes(b"another")
    assert f"{sdist.name} is not the file of SHA256SUMS" in check()
    sdist.unlink()
    assert "run `make release`" in check()
    # Even when its checksum is made to agree.
    sdist.write_bytes(b"another")
    changed = hashlib.sha256(b"another").hexdigest()
    text = sums.read_text().replace(hashlib.sha256(content).hexdigest(), changed)
    sums.write_text(text)
    assert "something changed the release after it was written" in check()
    # Nor a file from elsewhere, which a name could be the path of.
    sums.write_text(f"{text}{changed}  ../wheels/x\n")
    assert "and SHA256SUMS names" in check(DIGEST=digest(repository))


def test_a_release_that_was_interrupted_stays_a_draft(repository):
    """Until the next run makes it anew; somebody's own draft stays."""
    repository.fork("release")
    fake = FakeGitHub()
    fake.tags.add("test.2")
    answer = fake.handle
    fake.handle = lambda method, path, *args: (
        (502, {"message": "Bad gateway"})
        if "upload" in path and len(fake.assets) == 2
        else answer(method, path, *args)
    )
    with fake.served() as github:
        env = {"DIGEST": digest(repository), **github}
        assert "was refused: 502" in publish(repository, **env)
        (draft,) = fake.releases
        assert draft["draft"] is True
        fake.handle = answer
        draft["author"] = {"login": "somebody"}
        assert "somebody's draft" in publish(repository, **env)
        assert fake.releases == [draft]
        draft["author"] = {"login": "github-actions[bot]"}
        assert "https://github.example/releases/2\n" in publish(repository, **env)
    (release,) = fake.releases
    assert release["id"] == 2 and release["draft"] is False
    assert len(fake.assets) == 5


def upstreams(repository, folder: Path, edit=None) -> Path:
    """Upstream's repository at the tag of the base."""
    shutil.copytree(repository.tree, folder / "python/sglang")
    shutil.rmtree(folder / "python/sglang/.git")
    run(
        *["git", "archive", "--output", folder / "base.tar", "refs/fork/base"],
        cwd=repository.tree,
        env=repository.env,
    )
    with tarfile.open(folder / "base.tar") as archive:
        archive.extractall(folder / "python/sglang")
    (folder / "base.tar").unlink()
    if edit:
        edit(folder / "python/sglang/srt/model.py")
    repository.git("init", "--quiet", cwd=folder)
    repository.git("config", "core.autocrlf", "false", cwd=folder)
    repository.git("add", "--all", cwd=folder)
    repository.git("commit", "--quiet", "--message=Upstream", cwd=folder)
    repository.git("tag", "v1.0", cwd=folder)
    (folder / "later").touch()
    repository.git("add", "--all", cwd=folder)
    repository.git("commit", "--quiet", "--message=Later", cwd=folder)
    return folder


def test_the_series_on_upstreams_tag(repository, tmp_path):
    def call(source):
        return ["rehearse", "--repository", str(source)]

    source = upstreams(repository, tmp_path / "an upstream")
    said = repository.fork(*call(source))
    assert "1 patches of dist/upstream apply to v1.0 of" in said
    assert "the 1 files that they change are the fork's" in said
    shutil.rmtree(source)

    def change(line):
        return lambda file: file.write_text(file.read_text().replace(line, "x = 1"))

    other = upstreams(repository, tmp_path / "near", change("layers = 2"))
    refusal = repository.refusal(*call(other))
    assert "0001-three-layers.patch does not apply: python/sglang" in refusal
    other = upstreams(repository, tmp_path / "far", change("line_0 = 0"))
    assert "srt/model.py is another in" in repository.refusal(*call(other))
    assert "could not be cloned at v1.0" in repository.refusal(*call(tmp_path / "no"))


def free_port() -> str:
    with socket.socket() as probe:
        for port in range(24300, 24400):
            if probe.connect_ex(("127.0.0.1", port)):
                return str(port)


def test_the_real_wheel_serves_installed_alone(tmp_path):
    """The repository's own series, with the dependencies that the tests have."""
    series = installed().series
    built = {"series": series}
    for name in ("python/fork", "patches", "benchmark/gemma4"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "python/pyproject.toml", tmp_path / "python")
    (tmp_path / ".cache").symlink_to(ROOT / ".cache")
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist/wheels").symlink_to(tmp_path)
    for command in (
        # The hook that `make wheel` has pip call.
        ["-c", f"import fork.build as b; b.build_wheel({str(tmp_path)!r}, {built})"],
        ["-m", "fork", "--series", series, "smoke", "--port", free_port()]
        + ["--dependencies", sysconfig.get_path("purelib")],
    ):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path / "python",
            capture_output=True,
            text=True,
        )
        assert not done.returncode, done.stdout + done.stderr
    assert "> Why is the sky blue?" in done.stdout
    assert "tokens came back" in done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert f"{wheel.name} serves, installed alone." in done.stderr
    assert not (tmp_path / ".cache/smoke").exists()


def test_an_environment_that_has_another_sglang(repository, tmp_path):
    """Its files come first on the path: the wheel would not be what serves."""
    (tmp_path / "other/sglang").mkdir(parents=True)
    (tmp_path / "other/sglang/__init__.py").touch()
    dependencies = tmp_path / "dependencies"
    dependencies.mkdir()
    for name in ("packaging", "wheel"):
        found = Path(__import__(name).__file__).parent
        (dependencies / name).symlink_to(found)
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'other')!r})\n"
    (dependencies / "sitecustomize.py").write_text(code)
    refusal = repository.refusal("smoke", "--dependencies", str(dependencies))
    assert f"imports sglang from {tmp_path / 'other'}" in refusal
    assert not (repository.root / ".cache/smoke").exists()
