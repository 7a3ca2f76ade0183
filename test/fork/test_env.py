"""The environments that the make targets use: what they hang on, and where they cannot
be made."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib import metadata
from pathlib import Path

import pytest

from fork import env

ROOT = Path(__file__).resolve().parents[2]
THIS = "{}{}".format(*sys.version_info[:2])
WHEEL = "#   sglang-{}-cp{}-cp{}-manylinux_2_34_x86_64.whl\n"
PYPROJECT = """[dependency-groups]
tools = []
dev = ["pytest"]

[tool.fork]
series = "v1.0"
"""
SERIES = """version = "1.0+test.1"

[[patch]]
name = "one"
tests = [
    "a.py",
]

[pins.kernels]
specifier = ">=1"
"""


@pytest.fixture
def host(tmp_path, monkeypatch):
    """env.py as if the repository were two empty series."""
    root = tmp_path / "a clone"
    (root / "python").mkdir(parents=True)
    (root / "python" / "pyproject.toml").write_text(PYPROJECT)
    (root / "python" / "tools.txt").write_text("")
    for series in ("v1.0", "v2.0"):
        folder = root / "patches" / series
        folder.mkdir(parents=True)
        (folder / "base.txt").write_text(WHEEL.format(series[1:], THIS, THIS))
        (folder / "series.toml").write_text(SERIES)
    monkeypatch.setattr(env, "ROOT", root)
    return root


@pytest.fixture
def engine(host) -> env.Engine:
    return env.Engine("v2.0")


def failure(monkeypatch, name: str = "v2.0") -> str:
    monkeypatch.setattr(sys, "argv", ["env.py", name])
    with pytest.raises(SystemExit) as exit_:
        env.main()
    return str(exit_.value)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_each_series_has_one_of_its_own(host, engine):
    assert engine.folder == host / ".venvs/v2.0"
    other = env.Engine("v1.0")
    assert other.folder == host / ".venvs/v1.0"
    # The same text but for the wheels' version.
    assert engine.wanted() != other.wanted()
    *_, last = engine.installs()
    assert f"series={engine.series}" in last
    assert f"{host}/python/pyproject.toml:dev" in last


@pytest.mark.parametrize(
    "file, old, new, changes",
    [
        ("v2.0/base.txt", "x86_64", "aarch64", True),
        ("v2.0/series.toml", "+test.1", "+test.2", True),
        ("v2.0/series.toml", ">=1", ">=2", True),
        ("../python/pyproject.toml", "pytest", "pytest>=8", True),
        ("v2.0/series.toml", "one", "another", False),
        ("v2.0/series.toml", '"a.py"', '"b.py"', False),
        ("v1.0/base.txt", "x86_64", "aarch64", False),
        ("v1.0/series.toml", "+test.1", "+test.2", False),
        ("../python/pyproject.toml", '"v1.0"', '"v2.0"', False),
    ],
)
def test_what_an_environment_hangs_on(host, engine, file, old, new, changes):
    """On its own series' base, version and pins, and on the tools of the tests."""
    before = engine.wanted()
    edit(host / "patches" / file, old, new)
    assert (engine.wanted() != before) is changes


def test_a_python_without_a_base_wheel(host, monkeypatch):
    base = host / "patches/v2.0/base.txt"
    wheels = [WHEEL.format("2.0", minor, minor) for minor in ("399", "30")]
    base.write_text("".join(wheels))
    message = failure(monkeypatch)
    assert f"is Python {sys.version.split()[0]}" in message
    assert "wheels for 3.0, 3.99; run `make PYTHON=python3.99" in message
    assert not (host / ".venvs").exists()


def test_no_such_series(host, monkeypatch):
    message = failure(monkeypatch, "v3.0")
    assert "no " in message and "SERIES= is one of v1.0, v2.0." in message


def test_no_git(host, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "git is not installed" in failure(monkeypatch)
    assert not (host / ".venvs").exists()


def test_no_space(host, monkeypatch):
    usage = shutil.disk_usage(host)
    monkeypatch.setattr(env, "INSTALLED_GB", usage.free // 10**9 + 1000)
    message = failure(monkeypatch)
    assert f"{host} has " in message and "GB free; make room" in message
    assert not (host / ".venvs").exists()


def test_the_commands_need_no_space_and_no_wheel(host, monkeypatch):
    """They have an environment of their own, that no series is in."""
    installed = []
    monkeypatch.setattr(env, "INSTALLED_GB", 10**6)
    monkeypatch.setattr(env.Environment, "make_venv", lambda tools: None)
    run = lambda command, env: installed.append(command) or done  # noqa: E731
    done = subprocess.CompletedProcess([], 0)
    (host / ".cache/tools").mkdir(parents=True)
    for _ in range(2):  # the second time there is nothing to do
        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(sys, "argv", ["env.py", "tools"])
        env.main()
    (command,) = installed
    assert command[0] == str(host / ".cache/tools/bin/python")
    assert command[-1] == str(host / "python/tools.txt")
    assert "--require-hashes" in command
    (host / "python/tools.txt").write_text("another")
    env.main()
    assert len(installed) == 2


def test_the_commands_environment_is_pinned_by_hashes():
    """Each tool that pyproject.toml asks for, and what these require."""
    lock = (ROOT / "python/tools.txt").read_text()
    pinned = re.findall(
        r"^([a-z-]+)==[\w.]+(?: ; [^\\\n]+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$",
        lock,
        re.MULTILINE,
    )
    lines = [line for line in lock.splitlines() if line[:1] not in ("#", " ")]
    assert len(lines) == len(pinned)
    names = {name for name, _ in pinned}
    settings = tomllib.loads((ROOT / "python/pyproject.toml").read_text())
    asked = settings["dependency-groups"]["tools"]
    assert {re.match("[a-z]+", one)[0] for one in asked} <= names
    for name in names - {"tomli"}:
        for required in metadata.requires(name) or ():
            assert "extra ==" in required or re.match("[a-z]+", required)[0] in names


def test_nothing_changed(host, engine, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)  # nothing may be started
    engine.folder.mkdir(parents=True)
    engine.stamp.write_text(engine.wanted())
    engine.make()


def test_an_interrupted_installation_is_gone_on_with(host, engine, monkeypatch):
    """pip cannot reach an index; what was made so far stays, and nothing says done."""
    for name, value in {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": "",
        "PIP_RETRIES": "0",
    }.items():
        monkeypatch.setenv(name, value)
    assert ".venvs/v2.0 did not finish" in failure(monkeypatch)
    assert not engine.stamp.exists()
    mark = engine.folder / "mark"
    mark.touch()
    assert "run the same command again" in failure(monkeypatch)
    assert mark.exists() and (engine.folder / "bin" / "python").exists()
    assert not (host / ".venvs/v1.0").exists()


def test_an_environment_that_was_cut_off_is_made_anew(engine, monkeypatch):
    """Without pip in it, say, since the cut came while pip was put there."""
    with monkeypatch.context() as cut:
        cut.setattr(venv.EnvBuilder, "_setup_pip", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.make_venv()
    assert (engine.folder / "bin" / "python").exists()
    engine.make_venv()
    pip = [engine.folder / "bin" / "python", "-m", "pip", "--version"]
    assert subprocess.run(pip, capture_output=True).returncode == 0


def interrupt(*_):
    raise KeyboardInterrupt


def test_another_pythons_environment_is_made_anew(engine):
    engine.folder.mkdir(parents=True)
    engine.mark.write_text("3.9.0 of another day")
    (engine.folder / "old").touch()
    engine.make_venv()
    assert engine.mark.read_text() == sys.version
    assert not (engine.folder / "old").exists()


def test_somebody_elses_environment_is_left_alone(engine, monkeypatch):
    engine.folder.mkdir(parents=True)
    (engine.folder / "work").touch()
    message = failure(monkeypatch)
    assert f"{engine.folder} is none that make made; move it away" in message
    assert (engine.folder / "work").exists()


@pytest.mark.parametrize("target", ["serve", "demo", "test", "fork", "patches"])
def test_make_says_so_too(target):
    """Each target makes its environment first, with the Python that it is told."""
    done = subprocess.run(
        ["make", target, "PYTHON=/nonexistent/python"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode and "/nonexistent/python" in done.stderr


def make(*args: str) -> str:
    command = ["make", "--dry-run", "PYTHON=python3", *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def test_make_takes_a_series_everywhere():
    targets = ("fork", "edit", "serve", "demo", "test", "prove", "lint", "patches")
    targets += ("verify", "upstream", "rehearse", "port", "wheel", "smoke", "release")
    for target in targets:
        said = make(target, "SERIES=v0.5.12.post1")
        assert 'series "v0.5.12.post1"' in said or 'series="v0.5.12.post1"' in said
        assert "v0.5.12.post1" not in make(target)


def test_make_needs_the_engine_only_where_it_is_run():
    """A patch is changed and proved by git and a small environment."""
    small = ("fork", "edit", "patches", "upstream", "rehearse", "port", "wheel")
    for target in small:
        said = make(target)
        assert ".cache/tools/bin/python" in said and ".venvs" not in said
    for target in ("serve", "demo", "test", "prove", "lint", "nightly"):
        assert ".venvs/" in make(target)


def test_make_takes_the_first_python_that_the_base_has_a_wheel_for(tmp_path):
    for name, version in (("python3", "3.9"), ("python3.12", "3.12")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {version}\n")
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), "/usr/bin", "/bin"])
    command = ["make", "--dry-run", "env"]
    for found, python in (("3.9", "python3.12"), ("3.13", "python3")):
        (tmp_path / "python3").write_text(f"#!/bin/sh\necho {found}\n")
        (tmp_path / "python3.11").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "python3.11").chmod(0o755)
        done = subprocess.run(
            command, cwd=ROOT, env={"PATH": path}, capture_output=True, text=True
        )
        assert done.stdout == f'"{python}" python/fork/env.py "v0.5.23"\n'
