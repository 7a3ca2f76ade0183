"""Two series in one repository, each on its own release: one is worked on, and one is
kept as it was, its tests in its patches."""

import os
import shutil
import sys
import zipfile

import pytest
from conftest import FILES, SERIES, Repository, run
from test_faults import kill_at, killing_git  # noqa: F401, the fixture
from test_series import log, tracked

from fork.complete import home
from fork.project import Project

# The newer release has another compiled module, and lacks a package of the older one.
NEWER = {
    name.replace("sglang-1.0.", "sglang-2.0."): data.replace(
        b"\nVersion: 1.0", b"\nVersion: 2.0\nRequires-Python: >=3.11"
    )
    for name, data in FILES.items()
    if ".so" not in name and ".hidden" not in name
}
NEWER["sglang/fast/_fast.cpython-3-linux.so"] = b"\x7fELF newer"
NEWER["sglang/_version.py"] = b"__version__ = '2.0'\n"
KEPT_TEST = (
    "from tool import LAYERS\n\n\ndef test():\n    from sglang.srt.model import layers"
)
KEPT_TEST += "\n\n    assert layers == LAYERS\n"
CONFTEST = "import sys\n\nsys.path.insert(0, 'benchmark')\n"


@pytest.fixture(scope="module")
def newer(env, tmp_path_factory):
    """A folder with the newer release's wheel."""
    folder = tmp_path_factory.mktemp("newer")
    for name, data in NEWER.items():
        path = folder / "content" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    pack = ["wheel", "pack", "--dest-dir", folder, folder / "content"]
    run(sys.executable, "-m", *pack, cwd=folder, env=os.environ)
    return folder


@pytest.fixture(scope="module")
def both(checked_out, newer, tmp_path_factory):
    """v1.0, kept complete, and v2.0, checked out; not to be changed."""
    import hashlib

    repository = checked_out.copy(tmp_path_factory.mktemp("both") / "a fork é")
    links = f"{repository.env['PIP_FIND_LINKS']} {newer}"
    repository.env = {**repository.env, "PIP_FIND_LINKS": links}
    text = (repository.tree / "srt/model.py").read_text()
    repository.commit(
        "srt/model.py", text.replace("layers = 2", "layers = 9"), "Have nine layers"
    )
    repository.commit("srt/new.py", "x = 1\n", "Add new")
    test = 'test/srt/test_kept.py", "test/conftest.py", "benchmark/tool.py'
    repository.describe(nine=test, new="test/srt/test_kept.py")
    (repository.root / "test/srt/test_kept.py").write_text(KEPT_TEST)
    (repository.root / "test/conftest.py").write_text(CONFTEST)
    (repository.root / "benchmark/tool.py").write_text("LAYERS = 9\n")
    repository.fork("export")
    # What `make upstream` writes is a series that is complete by itself.
    repository.fork("upstream")
    shutil.rmtree(repository.patches)
    shutil.copytree(repository.root / "dist/upstream", repository.patches)
    shutil.rmtree(repository.root / "dist")
    shutil.rmtree(repository.root / "test")
    shutil.rmtree(repository.root / "benchmark")
    base = (checked_out.patches / "base.txt").read_text()
    (repository.patches / "base.txt").write_text(base)
    (repository.patches / "series.toml").write_text(SERIES)

    (wheel,) = newer.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    living = repository.patches.with_name("v2.0")
    living.mkdir()
    base = f"#   {wheel.name}\nsglang==2.0 --hash=sha256:{digest}\n"
    (living / "base.txt").write_text(base)
    (living / "series.toml").write_text('version = "2.0+test.3"\n')
    repository.fork("--series", "v2.0", "checkout")
    return repository


@pytest.fixture
def repository(both, tmp_path) -> Repository:
    return both.copy(tmp_path / "a fork é")


def version(repository) -> str:
    return (repository.tree / "_version.py").read_text().split("'")[1]


def compiled(repository) -> list:
    return sorted(
        str(p.relative_to(repository.tree)) for p in repository.tree.rglob("*.so")
    )


def test_one_tree_takes_one_series_after_the_other(repository):
    """With all that differs: files, compiled modules, the version, no folder left."""
    assert (version(repository), log(repository)) == ("2.0+test.3", "")
    assert compiled(repository) == ["fast/_fast.cpython-3-linux.so"]
    newer = tracked(repository)
    (repository.tree / "fast/__pycache__").mkdir()
    (repository.tree / "fast/__pycache__/left.cpython-311.pyc").touch()
    repository.fork("--series", "v1.0", "checkout")
    assert version(repository) == "1.0+test.2"
    assert compiled(repository) == ["srt/_core.cpython-3-linux.so"]
    assert not (repository.tree / "fast").exists()
    assert "layers = 9" in (repository.tree / "srt/model.py").read_text()
    assert (repository.tree / "srt/.hidden/kept.tmp").exists()
    # Of a complete series it has what is upstream's python/sglang, and no more.
    assert not [
        name for name in tracked(repository) if "test" in name or "tool" in name
    ]
    assert "Have nine layers" in log(repository)
    repository.fork("--series", "v2.0", "checkout")
    assert tracked(repository) == newer and version(repository) == "2.0+test.3"
    assert not repository.git("status", "--porcelain")


def test_no_work_is_lost_to_another_series(repository):
    repository.write("srt/model.py", "layers = 5\n")
    refusal = repository.refusal("--series", "v1.0", "checkout")
    assert "holds work on v2.0 that was not exported: 1 uncommitted file" in refusal
    assert "commit` and `make patches SERIES=v2.0`" in refusal
    assert version(repository) == "2.0+test.3"
    repository.git("commit", "--quiet", "--all", "--message=Have five layers")
    refusal = repository.refusal("--series", "v1.0", "checkout")
    assert "work on v2.0 that was not exported: commits. To keep it: " in refusal
    assert "has changed too" not in refusal
    assert "`make patches SERIES=v2.0`" in refusal
    repository.fork("--series", "v2.0", "export")
    repository.fork("--series", "v1.0", "checkout")
    assert "layers = 9" in (repository.tree / "srt/model.py").read_text()
    repository.fork("--series", "v2.0", "checkout")
    assert (repository.tree / "srt/model.py").read_text() == "layers = 5\n"


def test_an_export_is_of_the_series_that_is_checked_out(repository):
    before = repository.contents(repository.patches.parent)
    refusal = repository.refusal("--series", "v1.0", "export")
    assert "which an export would drop" in refusal
    # One that is not complete: its patches are away.
    for patch in repository.patches.glob("*.patch"):
        patch.rename(repository.root / patch.name)
    refusal = repository.refusal("--series", "v1.0", "export")
    assert "python/sglang has v2.0, not v1.0: run `make fork SERIES=v1.0`" in refusal
    for patch in repository.root.glob("*.patch"):
        patch.rename(repository.patches / patch.name)
    assert repository.contents(repository.patches.parent) == before


def test_a_change_that_is_cut_off_anywhere_is_done_again(
    repository, killing_git, tmp_path  # noqa: F811
):
    """Whichever series is asked for then."""
    wanted = {}
    for name in ("v1.0", "v2.0"):
        repository.fork("--series", name, "checkout")
        wanted[name] = (tracked(repository), compiled(repository), version(repository))
    number, died = 1, True
    while died:
        number += 2
        one = repository.copy(tmp_path / f"run {number}")
        died = kill_at(one, number, killing_git, "checkout")
        name = ("v1.0", "v2.0")[number // 2 % 2]
        one.fork("--series", name, "checkout")
        assert (tracked(one), compiled(one), version(one)) == wanted[name]
        shutil.rmtree(one.root)
    assert number > 10


def test_verify_proves_every_series(repository):
    """And says of which one python/sglang is; that of a complete one, too."""
    said = repository.fork("verify")
    for name, count in (("1.0", 2), ("2.0", 0)):
        assert f"The series of {count} applies to sglang=={name} with git am" in said
    assert said.count("python/sglang holds nothing that was not exported.") == 1
    repository.fork("--series", "v1.0", "checkout")
    assert repository.fork("verify").count("holds nothing that was not exported") == 1
    repository.git("commit", "--quiet", "--amend", "--message=Another")
    assert "holds work on v1.0 that was not" in repository.refusal(
        "--series", "v2.0", "verify"
    )
    repository.git("reset", "--quiet", "--hard", "refs/fork/series")
    (patch,) = repository.patches.glob("0001-*")
    text = patch.read_text()
    patch.write_text(text.replace("LAYERS = 9", "LAYERS = 8"))
    refusal = repository.refusal("verify")
    assert f"patches/v1.0/{patch.name} is not what an export writes" in refusal
    patch.write_text(text)
    settings = repository.root / "patches/v2.0/series.toml"
    settings.write_text('version = "2.0+test.2"\n')
    assert "a tag is the name of one release" in repository.refusal("verify")


def test_the_tests_of_a_complete_series_are_its_own(repository):
    """They run in a checkout of all that its patches make, with its sglang first."""
    (repository.root / "test").mkdir()
    (repository.root / "test/test_of_two.py").write_text(
        "def test():\n    import sglang._version as v\n\n"
        "    assert v.__version__ == '2.0+test.3'\n"
    )
    said = repository.fork("--series", "v2.0", "test")
    assert "test_of_two.py" in said and "1 passed" in said
    before = repository.contents(repository.tree)
    said = repository.fork("--series", "v1.0", "test")
    assert "test/srt/test_kept.py" in said and "1 passed" in said
    assert repository.contents(repository.tree) == before
    said = repository.fork("--series", "v1.0", "test", "test/srt/test_kept.py")
    assert "1 passed" in said and "Writing" not in said
    (patch,) = repository.patches.glob("0001-*")
    patch.write_text(patch.read_text().replace("LAYERS = 9", "LAYERS = 8"))
    said = repository.fork("--series", "v1.0", "test", check=False)
    assert "Writing .cache/complete/v1.0" in said and "1 failed" in said


def test_files_of_the_engine_are_run_alone(repository):
    """What one does to its process is not another's; a failure of one is the whole's."""
    folder = repository.root / "test/srt"
    folder.mkdir(parents=True)
    content = "import sys\n\nassert not hasattr(sys, 'mine')\nsys.mine = 1\n\n\n"
    for name in ("one", "two"):
        text = f"{content}def test_{name}():\n    pass\n"
        (folder / f"test_{name}.py").write_text(text)
    (folder.parent / "test_of_all.py").write_text("def test_of_all():\n    pass\n")
    said = repository.fork("--series", "v2.0", "test")
    assert said.count("1 passed") == 3
    (folder / "test_two.py").write_text("def test_two():\n    assert False\n")
    assert "test/srt/test_two.py" in repository.refusal("--series", "v2.0", "test")


def test_what_a_series_has_in_its_own_folder(repository):
    """Its programs too: what serves it takes the checkpoint's from there."""
    for name, folder in (("v2.0", "."), ("v1.0", ".cache/complete/v1.0")):
        project = Project.load(name, repository.python)
        shutil.rmtree(repository.tree, ignore_errors=True)
        assert home(project) == repository.root / folder
        assert not repository.tree.exists()
    tool = repository.root / ".cache/complete/v1.0/benchmark/tool.py"
    assert tool.read_text() == "LAYERS = 9\n"


def test_plain_git_applies_a_complete_series(repository, tmp_path):
    plain = tmp_path / "upstream"
    (wheel,) = (repository.root / ".cache/base").glob("*-1.0-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(plain / "python")
    repository.git("init", "--quiet", cwd=plain)
    repository.git("config", "core.autocrlf", "false", cwd=plain)
    repository.git("add", "--all", "--force", cwd=plain)
    repository.git("commit", "--quiet", "--message=Upstream", cwd=plain)
    patches = sorted(repository.patches.glob("*.patch"))
    repository.git("am", "--quiet", *patches, cwd=plain)
    env = {**repository.env, "PYTHONPATH": str(plain / "python")}
    run(sys.executable, "-m", "pytest", "test", cwd=plain, env=env)


@pytest.mark.parametrize(
    "name, release", [("v1.0", "1.0+test.2"), ("v2.0", "2.0+test.3")]
)
@pytest.mark.parametrize("hook", ["build_wheel", "build_editable", "build_sdist"])
def test_a_build_setting_names_the_series(repository, name, release, hook, tmp_path):
    code = f"import sys, fork.build as b; b.{hook}(sys.argv[1], {{'series': {name!r}}})"
    command = [sys.executable, "-c", code, tmp_path / "built"]
    (tmp_path / "built").mkdir()
    run(*command, cwd=repository.python, env=repository.env)
    (made,) = (tmp_path / "built").iterdir()
    assert made.name.startswith(f"sglang-{release}")
    if hook == "build_sdist":  # it has that series alone, so it needs no setting
        shutil.unpack_archive(made, tmp_path)
        python = tmp_path / f"sglang-{release}"
        assert [p.name for p in (python / "patches").iterdir()] == [name]
        code = "import sys, fork.build as b; b.build_wheel(sys.argv[1])"
        command = [sys.executable, "-c", code, tmp_path / "built"]
        run(*command, cwd=python, env=repository.env)
        (made,) = (tmp_path / "built").glob("*.whl")
    if hook == "build_editable":
        assert version(repository) == release
    with zipfile.ZipFile(made) as wheel:
        (metadata,) = (n for n in wheel.namelist() if n.endswith("/METADATA"))
        text = wheel.read(metadata).decode()
        assert f"Version: {release}\n" in text
        assert ("Requires-Python: >=3.11\n" in text) is (name == "v2.0")
        assert ("kernels<2,>=1" in text) is (name == "v1.0")
        if hook != "build_editable":
            assert (b"layers = 9" in wheel.read("sglang/srt/model.py")) is (
                name == "v1.0"
            )
            assert not any("test_kept" in n or "tool.py" in n for n in wheel.namelist())


def test_the_sources_do_not_need_this_pythons_wheel(repository, wheels, tmp_path):
    """A series is proved and sent upstream with any Python, and installed with some."""
    base = repository.root / "patches/v1.0/base.txt"
    base.write_text(base.read_text().replace("py3-none-any", "cp39-cp39-linux_x86_64"))
    (wheel,) = wheels.glob("*.whl")
    shutil.copy(wheel, tmp_path / "sglang-1.0-cp39-cp39-linux_x86_64.whl")
    shutil.rmtree(repository.root / ".cache/base")
    links = {"PIP_FIND_LINKS": str(tmp_path)}
    refusal = repository.refusal("--series", "v1.0", "checkout", **links)
    assert "use one that a wheel is made for: cp39" in refusal
    written = repository.fork("--series", "v1.0", "upstream", **links)
    assert "dist/upstream/0002-" in written
