"""The environment that every make target uses, where it cannot be made."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from fork import env

PYPROJECT = "[dependency-groups]\ndev = []\n"


@pytest.fixture
def host(tmp_path, monkeypatch):
    """env.py as if the repository were an empty folder."""
    root = tmp_path / "a clone"
    (root / "python").mkdir(parents=True)
    (root / "python" / "pyproject.toml").write_text(PYPROJECT)
    monkeypatch.setattr(env, "ROOT", root)
    monkeypatch.setattr(env, "VENV", root / ".venv")
    monkeypatch.setattr(env, "MARK", root / ".venv" / "fork.python")
    monkeypatch.setattr(env, "STAMP", root / ".venv" / "fork.stamp")
    monkeypatch.setattr(env, "PYPROJECT", root / "python" / "pyproject.toml")
    return root


def failure() -> str:
    with pytest.raises(SystemExit) as exit_:
        env.main()
    return str(exit_.value)


@pytest.mark.parametrize("pythons", [((3, 0), (3, 9)), ((3, 99), (3, 99))])
def test_a_python_without_a_base_wheel(host, monkeypatch, pythons):
    monkeypatch.setattr(env, "PYTHONS", pythons)
    message = failure()
    assert f"is Python {sys.version.split()[0]}" in message
    newest = ".".join(map(str, pythons[1]))
    assert f"run `make PYTHON=python{newest}" in message
    assert not (host / ".venv").exists()


def test_no_git(host, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "git is not installed" in failure()
    assert not (host / ".venv").exists()


def test_no_space(host, monkeypatch):
    usage = shutil.disk_usage(host)
    monkeypatch.setattr(env, "INSTALLED_GB", usage.free // 10**9 + 1000)
    message = failure()
    assert f"{host} has " in message and "GB free; make room" in message
    assert not (host / ".venv").exists()


def test_nothing_changed(host, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)  # nothing may be started
    env.VENV.mkdir()
    env.STAMP.write_text(env.wanted())
    env.main()


def test_an_interrupted_installation_is_gone_on_with(host, monkeypatch):
    """pip cannot reach an index; what was made so far stays, and nothing says done."""
    for name, value in {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": "",
        "PIP_RETRIES": "0",
    }.items():
        monkeypatch.setenv(name, value)
    assert "did not finish" in failure()
    assert not env.STAMP.exists()
    mark = env.VENV / "mark"
    mark.touch()
    assert "run the same command again" in failure()
    assert mark.exists() and (env.VENV / "bin" / "python").exists()


def test_an_environment_that_was_cut_off_is_made_anew(host, monkeypatch):
    """Without pip in it, say, since the cut came while pip was put there."""
    with monkeypatch.context() as cut:
        cut.setattr(venv.EnvBuilder, "_setup_pip", interrupt)
        with pytest.raises(KeyboardInterrupt):
            env.make_venv()
    assert (env.VENV / "bin" / "python").exists()
    env.make_venv()
    pip = [env.VENV / "bin" / "python", "-m", "pip", "--version"]
    assert subprocess.run(pip, capture_output=True).returncode == 0


def interrupt(*_):
    raise KeyboardInterrupt


def test_another_pythons_environment_is_made_anew(host):
    env.VENV.mkdir()
    env.MARK.write_text("3.9.0 of another day")
    (env.VENV / "old").touch()
    env.make_venv()
    assert env.MARK.read_text() == sys.version
    assert not (env.VENV / "old").exists()


def test_somebody_elses_environment_is_left_alone(host):
    env.VENV.mkdir()
    (env.VENV / "work").touch()
    assert f"{env.VENV} is none that make made; move it away" in failure()
    assert (env.VENV / "work").exists()


@pytest.mark.parametrize("target", ["serve", "demo", "test", "verify"])
def test_make_says_so_too(target):
    """Each target makes the environment first, with the Python that it is told."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        ["make", target, "PYTHON=/nonexistent/python"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode and "/nonexistent/python" in done.stderr
