"""The environment that every make target uses, where it cannot be made."""

import os
import shutil
import subprocess
import sys
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
