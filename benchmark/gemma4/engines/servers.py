"""A server of one arm: how it is started, asked and stopped."""

import contextlib
import dataclasses
import http.client
import json
import os
import re
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from gemma4.engines.arms import Arm
from gemma4.engines.host import (
    HOST,
    START_SECONDS,
    TINY_POOL_TOKENS,
    check_port,
    has_gpu,
)
from gemma4.engines.models import has_weights
from gemma4.engines.process import spawn, stop
from gemma4.errors import UserError

DRAFTED = 3


@dataclasses.dataclass
class Setup:
    """What the servers of all arms have in common.

    Attributes:
        model: The checkpoint; without weights they are drawn, see plugin/.
        context: Tokens a request may have.
        draft: The MTP draft's checkpoint, or None to serve without MTP.
        accepted: Tokens a verify step yields on average, the bonus token among them.
        flags: More flags for the servers of SGLang.
        warm: Whether a server answers a request of its own before it is ready.
        profiles: Where vLLM's profiler, which is named at its start, is to write.
    """

    model: Path
    port: int = 30000
    context: int = 16384
    draft: Optional[Path] = None
    accepted: float = 0.0
    requests: int = 80
    flags: List[str] = dataclasses.field(default_factory=list)
    warm: bool = False
    profiles: Optional[Path] = None

    def command(self, arm: Arm) -> List[str]:
        dummy = [] if has_weights(self.model) else ["--load-format", "dummy"]
        address = ["--host", HOST, "--port", str(self.port)]
        build = self._sglang if arm.engine == "sglang" else self._vllm
        return [arm.python, "-m", *build(), *dummy, *address, *arm.flags]

    def _sglang(self) -> List[str]:
        flags = ["sglang.launch_server", "--model-path", str(self.model)]
        flags += ["--context-length", str(self.context)]
        if not self.warm:
            flags += ["--skip-server-warmup"]  # bench_serving warms up by itself
        if has_gpu():
            flags += ["--attention-backend", "triton", "--sampling-backend", "pytorch"]
            flags += ["--mem-fraction-static", "0.85"]
        else:
            flags += ["--device", "cpu", "--max-total-tokens", str(TINY_POOL_TOKENS)]
        if self.draft:
            # With MTP the server would run fewer requests at once than without.
            sizes = [n for n in (1, 2, 4, *range(8, self.requests, 8)) if n]
            sizes = [str(n) for n in sizes if n < self.requests] + [str(self.requests)]
            flags += ["--max-running-requests", str(self.requests)]
            flags += ["--cuda-graph-bs-decode", *sizes]
            flags += ["--speculative-algorithm", "NEXTN"]
            flags += ["--speculative-draft-model-path", str(self.draft)]
            flags += ["--speculative-num-steps", str(DRAFTED)]
            flags += ["--speculative-num-draft-tokens", str(DRAFTED + 1)]
            flags += ["--speculative-eagle-topk", "1"]
        return [*flags, *self.flags]

    def _vllm(self) -> List[str]:
        flags = ["vllm.entrypoints.cli.main", "serve", str(self.model)]
        flags += ["--dtype", "bfloat16", "--max-model-len", str(self.context)]
        flags += ["--gpu-memory-utilization", "0.90", "--language-model-only"]
        flags += ["--disable-uvicorn-access-log"]
        if self.draft:
            config = {
                "method": "mtp",
                "model": str(self.draft),
                "num_speculative_tokens": DRAFTED,
                "rejection_sample_method": "synthetic",
                "synthetic_acceptance_length": self.accepted,
            }
            flags += ["--speculative-config", json.dumps(config)]
        if self.profiles:
            config = {
                "profiler": "torch",
                "torch_profiler_dir": str(self.profiles),
                "torch_profiler_with_stack": False,
                "torch_profiler_dump_cuda_time_total": False,
                "ignore_frontend": True,
            }
            flags += ["--profiler-config", json.dumps(config)]
        return flags

    def environment(self, arm: Arm) -> Dict[str, str]:
        env = arm.environment()
        if self.draft and self.accepted and arm.engine == "sglang":
            env["SGLANG_SIMULATE_ACC_LEN"] = str(self.accepted)
        return env


class Server:
    """A running server.

    Attributes:
        title: What messages call it, `The server` or `The server of ARM`.
        seconds: How long it took to start.
    """

    def __init__(
        self, title: str, command: List[str], env: Dict[str, str], port: int, log: Path
    ):
        self.title, self.command, self.env = title, command, env
        self.port, self.log = port, log
        self.url = f"http://{HOST}:{port}"
        # Nobody's proxy stands between this machine and itself.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, path: str, data: Optional[dict] = None, timeout: float = 60):
        """The open response to a GET, or to a POST of JSON."""
        request = urllib.request.Request(self.url + path)
        if data is not None:
            request.data = json.dumps(data).encode()
            request.add_header("Content-Type", "application/json")
        return self._opener.open(request, timeout=timeout)

    def answer(self, path: str, data: dict, timeout: float = 300):
        """The JSON that it answers to this request.

        Raises:
            UserError: The server died, refused it or did not answer.
        """
        try:
            with self.ask(path, data, timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as e:
            said = e.read().decode(errors="replace")[:200]
            raise UserError(f"{self.title} answered {e.code}: {said}") from None
        except OSError as e:
            self.check_alive("while it answered")
            raise UserError(
                f"{self.title} did not answer ({e}): see {self.log}."
            ) from None

    def logged(self, before: int) -> str:
        """What it has logged since its log was `before` bytes long."""
        with open(self.log, errors="replace") as log:
            log.seek(before)
            return log.read()

    def check_alive(self, when: str) -> None:
        status = self.process.poll()
        if status is None:
            return
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [ln for ln in lines if re.search(r"Error\b|error:|No space left", ln)]
        last = (errors or lines or ["nothing"])[-1].strip()[-300:]
        raise UserError(
            f"{self.title} died {when} (exit status {status}); its log, {self.log}, "
            f"ends with: {last}"
        )

    @contextlib.contextmanager
    def running(
        self, timeout: float = START_SECONDS, tick=lambda seconds: None
    ) -> Iterator:
        """Starts it, yields when it is ready, and stops it, whatever happens.

        Raises:
            UserError: It died, or was not ready in time, or runs other code.
        """
        check_port(self.port)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "w") as output:
            output.write(f"$ {shlex.join(self.command)}\n")
            output.flush()
            start = time.monotonic()
            self.process = spawn(
                self.command,
                **dict(stdin=subprocess.DEVNULL, stdout=output, stderr=output),
                **dict(env=self.env, cwd=self.log.parent),
            )
        try:
            while not self._is_ready():
                self.check_alive("while starting")
                self.seconds = time.monotonic() - start
                if self.seconds > timeout:
                    raise UserError(
                        f"{self.title} was not ready after {timeout:.0f} s: see "
                        f"{self.log}."
                    )
                tick(self.seconds)
                time.sleep(0.5)
            self.seconds = time.monotonic() - start
            self.check_code()
            yield self
        finally:
            stop(self.process)

    def _is_ready(self) -> bool:
        try:
            return self.ask("/health", timeout=30).status == 200
        except (http.client.HTTPException, OSError):
            return False

    def check_code(self) -> None:
        """Raises UserError where it runs other code than it should."""


class ArmServer(Server):
    """A server of one arm, with what all arms have in common."""

    def __init__(self, arm: Arm, setup: Setup, log: Path):
        self.arm, self.setup = arm, setup
        super().__init__(
            *(f"The server of {arm.name}", setup.command(arm), setup.environment(arm)),
            *(setup.port, log),
        )

    def check_code(self) -> None:
        """What the processes of the server said that they run is the arm's."""
        log = self.log.read_text(errors="replace")
        said = dict(re.findall(r"Measured code: (\S+) (\S+)", log))
        files = {os.path.realpath(file) for file in said}
        if files != {os.path.realpath(self.arm.file)}:
            raise UserError(
                f"{self.title} runs {', '.join(files) or 'no one knows'} instead of "
                f"{self.arm.file}: see {self.log}."
            )
        self.arm.version = next(iter(said.values()))
        drawn = log.count("Random weights:")
        wanted = 0 if has_weights(self.setup.model) else 1 + bool(self.setup.draft)
        if drawn < wanted:
            raise UserError(
                f"{self.title} drew its random weights in its own way ({drawn} of "
                f"{wanted} models in ours): see {self.log}."
            )


def captured_graphs(log: str) -> Tuple[int, float]:
    """(CUDA graphs that a server of SGLang captured, the GiB they took), of its log.

    Each runner, the draft's too, reports its begin, a bar, and its end, where some
    report the memory; that of the others is what the bar saw leave.
    """
    count, memory = 0, 0.0
    runs = re.findall(r"Capture (?:[^\n]* )?graph begin(.*?graph end[^\n]*)", log, re.S)
    for run in runs:
        count += max(map(int, re.findall(r"\d+/(\d+) \[", run)), default=0)
        reported = re.findall(r"graph end.*mem usage=([\d.]+) GB", run)
        free = [float(value) for value in re.findall(r"avail_mem=([\d.]+) GB", run)]
        memory += (
            float(reported[-1])
            if reported
            else max(free, default=0) - min(free, default=0)
        )
    return count, round(memory, 3)
