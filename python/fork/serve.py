"""Serves Gemma 4 with the fork, as `make serve` and `make demo` do."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from fork.complete import home
from fork.errors import ForkError
from fork.process import say
from fork.project import Project

HOST = "127.0.0.1"
LAST_PORT = 55535  # SGLang takes the port 10000 above, too
QUESTION = "Why is the sky blue?"
START_SECONDS = 900  # of a real checkpoint, with its kernels built for the first time
# The tiny model's context many times over; without it the pool takes most of the RAM.
TINY_POOL_TOKENS = 65536


def serve(project: Project, port: int, model: str) -> None:
    """Becomes SGLang's server of this model, or of a tiny random one.

    Raises:
        ForkError: The port is in use, or the model's folder cannot be served.
    """
    command, env = _prepare(project, port, model)
    say(f"Serving on http://{HOST}:{port}; Ctrl-C ends it.")
    os.execve(command[0], command, env)


def demo(project: Project, port: int, model: str) -> None:
    """Serves, asks one question, streams the answer to stdout, and stops the server.

    Raises:
        ForkError: As in serve; or the server died, or no token came back.
    """
    command, env = _prepare(project, port, model)
    log = project.cache / f"demo-{port}.log"
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: sys.exit(1))  # stops the server on its way
    server = None
    try:
        with open(log, "w") as output:
            server = subprocess.Popen(
                command, env=env, stdout=output, stderr=output, start_new_session=True
            )
        _wait(server, port, log)
        print(f"> {QUESTION}", flush=True)
        tokens = _ask(port, log)
    finally:
        if server:
            _stop(server)
    if not tokens:
        raise ForkError(f"The server answered without a token: see {log}.")
    say(f"{tokens} tokens came back.")
    if not model:
        say("(The tiny model's weights are random: MODEL=… serves a real checkpoint.)")


def _prepare(project: Project, port: int, model: str) -> tuple[list[str], dict]:
    if not 1 <= port <= LAST_PORT:
        raise ForkError(f"PORT={port} is none that SGLang takes: 1 to {LAST_PORT}.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise ForkError(
                f"Port {port} of {HOST} is in use: stop what listens there, or name "
                "another with PORT=."
            ) from None
    folder = Path(model).expanduser() if model else _tiny(project)
    if folder.is_dir():
        path = str(folder.resolve())
    elif model.startswith((".", "/", "~")):
        raise ForkError(f"MODEL={model} is no folder: give a checkpoint's.")
    else:
        path = model  # a hub's name
    command = [sys.executable, "-m", "sglang.launch_server", "--host", HOST]
    command += ["--port", str(port), "--model-path", path]
    env = dict(os.environ)
    if not model:
        command += ["--max-total-tokens", str(TINY_POOL_TOKENS)]
    if not _has_gpu():
        command += ["--device", "cpu"]
        env["SGLANG_USE_CPU_ENGINE"] = "1"
    return command, env


def _tiny(project: Project) -> Path:
    """The folder of the tiny random model, written by the first call."""
    folder = project.cache / f"gemma-4-tiny-{project.series}"
    if not folder.is_dir():
        factory = home(project) / "benchmark" / "gemma4" / "checkpoint.py"
        command = [sys.executable, str(factory), str(folder), "--shape", "tiny"]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise ForkError("The tiny checkpoint was not written; it says why above.")
    return folder


def _has_gpu() -> bool:
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


def _wait(server: subprocess.Popen, port: int, log: Path) -> None:
    # Nobody's proxy stands between this machine and itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    start = time.monotonic()
    while (waited := time.monotonic() - start) < START_SECONDS:
        if server.poll() is not None:
            tail = "".join(log.read_text(errors="replace").splitlines(True)[-10:])
            raise ForkError(f"The server died while starting; {log} ends:\n{tail}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            opener.open(f"http://{HOST}:{port}/health", timeout=10)
            say(f"\rThe server is up after {waited:.0f} s.        ")
            return
        print(f"\rStarting the server, {waited:3.0f} s …", end="", file=sys.stderr)
        time.sleep(1)
    raise ForkError(f"The server was not up after {START_SECONDS} s: see {log}.")


def _ask(port: int, log: Path) -> int:
    """Prints the answer as it comes, and returns the number of its tokens."""
    import httpx
    from openai import OpenAI, OpenAIError

    client = OpenAI(
        base_url=f"http://{HOST}:{port}/v1",
        api_key="none",
        http_client=httpx.Client(trust_env=False, timeout=600),
    )
    tokens = 0
    try:
        for chunk in client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=64,
            stream=True,
            stream_options={"include_usage": True},
        ):
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
    except (OpenAIError, httpx.HTTPError) as error:
        raise ForkError(f"The server did not answer: {error} (see {log}).") from None
    print()
    return tokens


def _stop(server: subprocess.Popen) -> None:
    try:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
