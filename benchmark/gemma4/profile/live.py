"""Requests that a live server is answering, and the profile of what it does meanwhile."""

import http.client
import random
import shutil
import threading
import time
import urllib.error
from pathlib import Path
from typing import List, Tuple

from gemma4.engines.servers import ArmServer
from gemma4.errors import UserError
from gemma4.profile.trace import Kernel, read_trace

# Kernels alone: recording the CPU's side slows a step down.
ACTIVITIES = ["GPU"]
TRACES = "*.trace.json.gz"
# Tokens that one request alone makes at most while it is profiled.
STREAM = 6400


def decode_title(requests: int) -> str:
    return f"decode, {requests} request{'s' * (requests > 1)}"


class Requests:
    """Random prompts that a server is answering, each in a thread of its own.

    vLLM is asked through the API of OpenAI, which SGLang would count text for.
    """

    def __init__(
        self, server: ArmServer, count: int, input: int, output: int, seed: int
    ):
        self.server, self.first = server, threading.Semaphore(0)
        self.times: List[List[float]] = [[] for _ in range(count)]
        self.failed: List[str] = []
        self.stopped = False
        generator = random.Random(seed)
        self.threads = [
            threading.Thread(
                target=self._ask,
                args=(i, [generator.randrange(1000, 250000) for _ in range(input)]),
                kwargs={"output": output},
                daemon=True,
            )
            for i in range(count)
        ]
        for thread in self.threads:
            thread.start()

    def _ask(self, number: int, prompt: List[int], output: int) -> None:
        sampling = {"temperature": 0, "ignore_eos": True}
        if self.server.arm.engine == "vllm":
            path, asked = "/v1/completions", {"prompt": prompt, "max_tokens": output}
            asked.update(sampling, model=str(self.server.setup.model))
        else:
            path, asked = "/generate", {"input_ids": prompt}
            asked["sampling_params"] = {**sampling, "max_new_tokens": output}
        try:
            asked["stream"] = True
            # vLLM stops a request when nobody listens any more.
            with self.server.ask(path, asked, timeout=600) as response:
                for line in response:
                    if self.stopped:
                        break
                    if line.startswith(b'data: {"error"'):
                        raise OSError(line.decode(errors="replace").strip())
                    if line.startswith(b"data: {"):
                        self.times[number].append(time.perf_counter())
                        if len(self.times[number]) == 1:
                            self.first.release()
            if not self.times[number] and not self.stopped:
                raise OSError("it was answered nothing")
        except (OSError, http.client.HTTPException) as e:
            if not self.stopped:
                self.failed.append(str(e))
            self.first.release()

    def wait_for_first_tokens(self) -> None:
        for _ in self.threads:
            self.first.acquire()
        self.check()

    def wait(self) -> None:
        for thread in self.threads:
            thread.join()
        self.check()

    def stop(self) -> None:
        """Ends those that still run: what they would say is of no use."""
        self.check()
        self.stopped = True
        if self.server.arm.engine == "sglang":
            self.server.ask("/abort_request", {"rid": "", "abort_all": True}).read()
        for thread in self.threads:
            thread.join()

    def check(self) -> None:
        if self.failed:
            self.server.check_alive("while it was profiled")
            raise UserError(f"A request failed: {self.failed[0]}")

    def interval(self, since: float) -> float:
        """The median time between two tokens of a request from then on, in seconds."""
        found = sorted(
            b - a
            for times in self.times
            for a, b in zip(times, times[1:])
            if a >= since
        )
        return found[len(found) // 2] if found else 0.0


class Profiler:
    def __init__(self, server: ArmServer, folder: Path):
        self.server, self.folder = server, folder

    def record(self, name: str, body) -> List[Kernel]:
        """The kernels that ran while `body` did."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        settings = {
            "output_dir": str(folder),
            "activities": ACTIVITIES,
            "with_stack": False,
            "record_shapes": False,
        }
        written = self.server.setup.profiles or folder
        before = set(written.glob(TRACES))
        self.server.ask("/start_profile", settings).read()
        try:
            body()
        finally:
            self.server.ask("/stop_profile", {}, timeout=300).read()
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for path in set(written.glob(TRACES)) - before:
                try:
                    kernels = read_trace(path)
                    folder.mkdir(parents=True, exist_ok=True)
                    path.replace(folder / path.name)
                    return kernels
                except (EOFError, OSError, ValueError):
                    pass  # not written to its end yet
            self.server.check_alive("while it wrote its profile")
            time.sleep(0.1)
        raise UserError(
            f"The server of {self.server.arm.name} wrote no profile into {folder}: see "
            f"{self.server.log}."
        )


def flush(server: ArmServer) -> None:
    """Empties the prefix cache, once the last request has left the scheduler."""
    if server.arm.engine == "vllm":
        return  # No prompt has another's beginning for long.
    for attempt in range(20):
        try:
            server.ask("/flush_cache", {}).read()
            return
        except urllib.error.HTTPError as e:
            if attempt == 19:
                raise UserError(f"The server does not flush its cache: {e}.") from None
            time.sleep(0.25)


def profile_prefill(server, profiler, args) -> Tuple[List[Kernel], float]:
    """(kernels of one prompt's prefill, seconds to its first token without a profiler)"""
    waits = []
    for seed in range(2):  # the first compiles
        begin = time.perf_counter()
        requests = Requests(server, 1, args.input, 1, seed)
        requests.wait()
        waits.append(requests.times[0][0] - begin)
        flush(server)

    def body():
        Requests(server, 1, args.input, 1, 10).wait()

    kernels = profiler.record("prefill", body)
    flush(server)
    return kernels, min(waits)


def profile_decode(server, profiler, args, count: int) -> Tuple[List[Kernel], float]:
    """(kernels of some decode steps, seconds between tokens without a profiler)"""
    # Few requests have short steps, and must last as long.
    output = max(args.output, STREAM // count)
    requests = Requests(server, count, args.context_tokens, output, count)
    requests.wait_for_first_tokens()
    time.sleep(0.3)  # the first steps may compile
    begin = time.perf_counter()
    time.sleep(0.7)
    interval = requests.interval(begin)
    kernels = profiler.record(
        f"decode-{count}", lambda: time.sleep(max(8 * interval, 0.05))
    )
    requests.stop()
    flush(server)
    return kernels, interval
