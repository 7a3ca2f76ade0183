"""`make serve` and `make demo`: the real server, and what stops it before it starts."""

import re
import signal
import socket
import time

import pytest
from programs import marked, run, start


def is_free(port: str | int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(port))) != 0


@pytest.fixture
def port() -> str:
    return str(next(port for port in range(23000, 24000) if is_free(port)))


def test_demo_answers_and_leaves_nothing_behind(port, tmp_path):
    done = run("demo", "--port", port, mark=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"\n[1-9]\d* tokens came back\.", done.stderr), done.stderr
    question, answer = done.stdout.split("\n", 1)
    assert question == "> Why is the sky blue?" and answer.strip()
    assert is_free(port) and not marked(str(tmp_path))


@pytest.mark.parametrize(
    "command, signum", [("demo", signal.SIGTERM), ("launch", signal.SIGINT)]
)
def test_a_signal_ends_the_server_too(port, tmp_path, command, signum):
    running = start(command, "--port", port, mark=str(tmp_path))
    deadline = time.monotonic() + 120
    while len(marked(str(tmp_path))) < (2 if command == "demo" else 1):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(3)
    running.send_signal(signum)
    running.communicate(timeout=60)
    assert running.returncode
    assert is_free(port) and not marked(str(tmp_path))


@pytest.mark.parametrize("command", ["launch", "demo"])
def test_a_port_in_use(command, port):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", int(port)))
        taken.listen()
        done = run(command, "--port", port)
    assert done.returncode == 1
    assert f"Port {port} of 127.0.0.1 is in use" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("port", ["0", "55536", "70000"])
def test_a_port_that_is_none(port):
    done = run("launch", "--port", port)
    assert done.returncode == 1
    assert f"Port {port} is none that SGLang takes: 1 to 55535." in done.stderr


@pytest.mark.parametrize("command", ["launch", "demo"])
def test_no_such_model(command, port, tmp_path):
    done = run(command, "--port", port, "--model", str(tmp_path / "none"))
    assert done.returncode == 1
    assert f"The model {tmp_path / 'none'} is no folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_dies(port, tmp_path):
    """Of an empty folder, named relative to where the command was typed."""
    (tmp_path / "model").mkdir()
    mark = str(tmp_path)
    done = run("demo", "--port", port, "--model", "model", cwd=tmp_path, mark=mark)
    assert done.returncode == 1
    assert "The server died while starting" in done.stderr
    assert str(tmp_path / "model") in done.stderr
    assert is_free(port) and not marked(mark)
