"""`make serve` and `make demo`: the real server, and what stops it before it starts."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PYTHON = Path(__file__).resolve().parents[2] / "python"


def fork(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fork", *args]
    return subprocess.run(
        command, cwd=PYTHON, capture_output=True, text=True, timeout=600
    )


def is_free(port: str | int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(port))) != 0


@pytest.fixture
def port() -> str:
    return str(next(port for port in range(23000, 24000) if is_free(port)))


def test_demo_answers_and_leaves_nothing_behind(port):
    done = fork("demo", "--port", port)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\n64 tokens came back\.", done.stderr), done.stderr
    question, answer = done.stdout.split("\n", 1)
    assert question == "> Why is the sky blue?" and answer.strip()
    assert is_free(port)


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_a_port_in_use(command, port):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", int(port)))
        taken.listen()
        done = fork(command, "--port", port)
    assert done.returncode == 1
    assert f"Port {port} of 127.0.0.1 is in use" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("port", ["0", "55536", "70000"])
def test_a_port_that_is_none(port):
    done = fork("serve", "--port", port)
    assert done.returncode == 1
    assert f"PORT={port} is none that SGLang takes: 1 to 55535." in done.stderr


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_no_such_model(command, port, tmp_path):
    done = fork(command, "--port", port, "--model", str(tmp_path / "none"))
    assert done.returncode == 1
    assert f"MODEL={tmp_path / 'none'} is no folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_dies(port, tmp_path):
    done = fork("demo", "--port", port, "--model", str(tmp_path))
    assert done.returncode == 1
    assert "The server died while starting" in done.stderr
    assert "config.json" in done.stderr
    assert is_free(port)
