"""The distribution: each way to install it, over upstream's, and its end."""

import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.parse
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import FILES, ROOT, run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fork.base import fetch, installed

VERSION = "1.0+test.2"
LAYERS = "import sglang; print(sglang.layers)"
SHOW = (
    "import sglang._version as v, importlib.metadata as m, sglang.srt.model as s;"
    "print(v.__version__, m.version('sglang'), s.__file__)"
)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> Path:
    """What a build requires, as an environment without a network has it."""
    folder = tmp_path_factory.mktemp("libraries")
    for name in ("packaging", "pip", "wheel", "tomli"):
        spec = importlib.util.find_spec(name)
        if spec:
            (folder / name).symlink_to(spec.submodule_search_locations[0])
    return folder


@pytest.fixture(scope="module")
def patched(checked_out, tmp_path_factory):
    """A committed fork that changes, adds and removes a file; not to be changed."""
    repository = checked_out.copy(tmp_path_factory.mktemp("patched") / "a fork é")
    (repository.tree / "srt/no_newline.py").unlink()
    repository.write("srt/model.py", "layers = 3\n\n\ndef main():\n    print(layers)\n")
    repository.commit("srt/E=1,[new].json", "{}\n", "Have three layers")
    repository.fork("export")
    root = repository.root
    repository.git("init", "--quiet", cwd=root)
    repository.git("add", "--all", cwd=root)
    repository.git("commit", "--quiet", "--message=Start", cwd=root)
    return repository


@pytest.fixture
def repository(patched, tmp_path):
    return patched.copy(tmp_path / "a fork é")


class Environment:
    """A virtual environment with nothing in it."""

    def __init__(self, folder: Path, env: dict):
        venv.create(folder, with_pip=False)
        self.folder, self.python = folder, folder / "bin" / "python"
        self.env = env

    def pip(self, *args, check=True):
        command = [self.python, "-m", "pip", *args]
        return run(*command, cwd=self.folder, env=self.env, check=check)

    def install(self, *args, check=True):
        options = ["--no-deps", "--no-build-isolation", "--no-compile"]
        return self.pip("install", *options, *args, check=check)

    def says(self, code: str) -> str:
        env = {**self.env, "PYTHONPATH": ""}
        return run(self.python, "-c", code, cwd=self.folder, env=env).stdout.strip()

    def files(self) -> set:
        return {
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if "__pycache__" not in path.parts
        }


@pytest.fixture
def environment(env, libraries, tmp_path) -> Environment:
    env = {**env, "PYTHONPATH": str(libraries), "PYTHONDONTWRITEBYTECODE": "1"}
    return Environment(tmp_path / "venv", env)


def sdist(repository, environment) -> Path:
    code = "import fork.build as b; b.build_sdist('..')"
    run(sys.executable, "-c", code, cwd=repository.python, env=environment.env)
    return repository.root / f"sglang-{VERSION}.tar.gz"


def wheel(repository, folder: Path, name="build_wheel") -> Path:
    folder.mkdir(exist_ok=True)
    code = f"import sys, fork.build as b; print(b.{name}(sys.argv[1]))"
    command = [sys.executable, "-c", code, folder]
    done = run(*command, cwd=repository.python, env=repository.env)
    return folder / done.stdout.splitlines()[-1]


WAYS = {
    "folder": lambda r, e: [r.python],
    "editable": lambda r, e: ["--editable", r.python],
    "git": lambda r, e: [
        f"sglang @ git+file://{urllib.parse.quote(str(r.root))}#subdirectory=python"
    ],
    "wheel": lambda r, e: [wheel(r, r.root / "dist")],
    "sdist": lambda r, e: [sdist(r, e)],
}


@pytest.mark.parametrize("way", WAYS)
def test_it_replaces_upstreams_and_leaves_nothing(repository, environment, wheels, way):
    empty = environment.files()
    environment.install(*wheels.glob("*.whl"))
    assert environment.says(LAYERS) == "2"
    environment.install(*WAYS[way](repository, environment))

    version, distribution, file = environment.says(SHOW).split(" ", 2)
    assert version == distribution == VERSION
    where = repository.tree if way == "editable" else environment.folder
    assert Path(file).is_relative_to(where)
    assert environment.says(LAYERS) == "3"
    script = environment.folder / "bin" / "sglang"
    assert run(script, cwd="/", env={}).stdout == "3\n"
    site = {Path(name).name for name in environment.files()}
    assert "no_newline.py" not in site
    assert not any(name.startswith("sglang-1.0.dist-info") for name in site)

    environment.pip("uninstall", "--yes", "sglang")
    assert environment.files() <= empty
    assert (repository.tree / "srt/model.py").exists()


def test_the_wheel_is_the_bases_but_for_the_series(repository, wheels, tmp_path):
    (upstream,) = wheels.glob("*.whl")
    ours = wheel(repository, tmp_path / "one")
    assert ours.name == f"sglang-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(upstream) as base, zipfile.ZipFile(ours) as fork:
        info = f"sglang-{VERSION}.dist-info/"
        renamed = {
            name: name.replace("sglang-1.0.dist-info/", info)
            for name in base.namelist()
        }
        changed = {
            name
            for name, new in renamed.items()
            if new in fork.namelist() and base.read(name) != fork.read(new)
        }
        assert changed == {
            "sglang/_version.py",
            "sglang/srt/model.py",
            "sglang-1.0.dist-info/METADATA",
            "sglang-1.0.dist-info/RECORD",
        }
        assert set(renamed.values()) ^ set(fork.namelist()) == {
            "sglang/srt/no_newline.py",
            "sglang/srt/E=1,[new].json",
        }
        mode = fork.getinfo("sglang/srt/script.sh").external_attr >> 16
        assert mode & 0o777 == 0o755
        metadata = email.message_from_bytes(fork.read(f"{info}METADATA"))
        expected = email.message_from_bytes(FILES["sglang-1.0.dist-info/METADATA"])
    assert metadata["Version"] == VERSION
    assert metadata.get_all("Requires-Dist") == [
        "kernels<2,>=1",
        'numpy>=1; python_version >= "3.8"',
        'kernels[cli]<2,>=1; extra == "more"',
    ]
    for message in (metadata, expected):
        del message["Version"], message["Requires-Dist"]
    squeezed = [
        sorted((name, " ".join(str(value).split())) for name, value in message.items())
        for message in (metadata, expected)
    ]
    assert squeezed[0] == squeezed[1]
    assert metadata.get_payload() == expected.get_payload()


def test_a_build_can_be_repeated_to_the_byte(repository, environment, tmp_path):
    """From the repository, and from nothing but the sdist."""
    one = wheel(repository, tmp_path / "one").read_bytes()
    with tarfile.open(sdist(repository, environment)) as archive:
        archive.extractall(tmp_path / "sdist")
    shutil.move(repository.root, tmp_path / "moved")
    (folder,) = (tmp_path / "sdist").iterdir()
    repository.python = folder
    assert wheel(repository, tmp_path / "two").read_bytes() == one


def test_the_metadata_alone_is_that_of_the_wheel(repository, tmp_path):
    built = wheel(repository, tmp_path / "one")
    hook = "prepare_metadata_for_build_wheel"
    info = wheel(repository, tmp_path / "metadata", hook)
    with zipfile.ZipFile(built) as archive:
        for name in ("METADATA", "WHEEL", "entry_points.txt"):
            assert archive.read(f"{info.name}/{name}") == (info / name).read_bytes()


def test_an_editable_install_takes_the_tree_as_it_is(repository, environment):
    """Its edits count at once, and no install overwrites them."""
    model = repository.tree / "srt/model.py"
    environment.install("--editable", repository.python)
    model.write_text("layers = 4\n")
    assert environment.says(LAYERS) == "4"
    (repository.patches / "0001-Have-three-layers.patch").unlink()
    environment.install("--editable", repository.python)
    assert environment.says(LAYERS) == "4"
    assert "holds work that was not exported" in repository.refusal("checkout")


def test_an_editable_install_checks_out_what_is_missing(repository, environment):
    shutil.rmtree(repository.tree)
    environment.install("--editable", repository.python)
    assert environment.says(LAYERS) == "3"


def test_a_build_that_fails_says_why(repository, environment):
    base = repository.patches / "base.txt"
    base.write_text(re.sub("sha256:....", "sha256:0000", base.read_text()))
    for args in ([repository.python], ["--editable", repository.python]):
        done = environment.install(*args, check=False)
        assert done.returncode
        assert "error: The sglang==1.0 that pip was given" in done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr


def test_an_interrupted_install_is_done_again(repository, environment, tmp_path):
    """Killed in the middle of the build: nothing is installed, nothing in the way."""
    shutil.rmtree(repository.tree)
    folder = tmp_path / "bin"
    folder.mkdir()
    git = f'#!/bin/sh\nkill -9 $PPID\nexec {shutil.which("git")} "$@"\n'
    (folder / "git").write_text(git)
    (folder / "git").chmod(0o755)
    path = environment.env["PATH"]
    environment.env["PATH"] = f"{folder}{os.pathsep}{path}"
    for args in ([repository.python], ["--editable", repository.python]):
        assert environment.install(*args, check=False).returncode
    environment.env["PATH"] = path
    environment.install("--editable", repository.python)
    assert environment.says(LAYERS) == "3"


def test_a_pin_of_what_the_base_does_not_require(repository, environment):
    settings = repository.patches / "series.toml"
    settings.write_text(settings.read_text().replace("Kernels", "colonels"))
    done = environment.install(repository.python, check=False)
    said = "series.toml pins colonels, which sglang==1.0 does not require"
    assert said in done.stdout + done.stderr


def test_the_real_wheel(tmp_path):
    """The repository's own series, on the real release that the tests have."""
    project = installed()
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
        + ["--config-settings", f"series={project.series}"]
        + ["--wheel-dir", tmp_path, ROOT / "python"],
        capture_output=True,
        text=True,
    )
    assert not built.returncode, built.stdout + built.stderr
    (ours,) = tmp_path.glob("*.whl")
    assert ours.name.startswith(f"sglang-{project.version}-cp3")
    patches = "".join(patch.read_text() for patch in project.patches())
    with zipfile.ZipFile(fetch(project)) as base, zipfile.ZipFile(ours) as fork:
        names, kept = (
            {n for n in it.namelist() if ".dist-info/" not in n and not n.endswith("/")}
            for it in (base, fork)
        )
        for name in names - {"sglang/_version.py"}:
            if f"a/python/{name} b/python/{name}" not in patches:
                assert base.read(name) == fork.read(name), name
        for name in kept ^ names:
            assert f"a/python/{name} b/python/{name}" in patches
        for suffix in (".so", ".pyc"):
            found = [sum(n.endswith(suffix) for n in there) for there in (names, kept)]
            assert found[0] == found[1]
        metadata = {}
        for archive in (base, fork):
            (name,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
            metadata[archive] = email.message_from_bytes(archive.read(name))
        for key in ("Requires-Python", "Provides-Extra"):
            assert metadata[base].get_all(key) == metadata[fork].get_all(key)
        requires = [set(metadata[it].get_all("Requires-Dist")) for it in (base, fork)]
        changed = {
            canonicalize_name(Requirement(r).name) for r in requires[0] ^ requires[1]
        }
        assert changed == {canonicalize_name(name) for name in project.pins}
        (scripts,) = (n for n in base.namelist() if n.endswith("/entry_points.txt"))
        (renamed,) = (n for n in fork.namelist() if n.endswith("/entry_points.txt"))
        assert base.read(scripts) == fork.read(renamed)
