"""Arms and their servers: what runs, how it is started, asked and stopped.

`run.py`, `profile_step.py`, `eval_quality.py` and `eval_pictures.py` share this. An arm
is written

    fork                    the `sglang` that this interpreter imports
    base                    the pinned release, unpatched
    base+NAME               the release with the series up to the patch of this name
    NAME=FLAGS              the fork with more flags for its server
    NAME@WHERE[=FLAGS]      another environment: a Python interpreter, or the folders
                            that PYTHONPATH is to hold, with ":" between them

and an arm whose name begins with `vllm` is served by vLLM.

The release is that of the series which this interpreter's environment is for. Without a
GPU driver it does not import, so on a CPU `base` is `base+cpu-no-driver`: it serves, its
answers are still wrong there, and it is for trying the programs, not for a measurement.
"""

import contextlib
import ctypes
import dataclasses
import errno
import functools
import hashlib
import importlib.util
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Dict, List, Optional, Tuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PLUGIN = HERE / "plugin"
CACHE = ROOT / ".cache"
HOST = "127.0.0.1"
LAST_PORT = 55535  # SGLang takes the port 10000 above, too
# The patch without which, and those before it, the release does not serve on a CPU.
CPU_BLOCKERS = "cpu-no-driver"
# The tiny model's context many times over; without it the pool takes most of the RAM.
TINY_POOL_TOKENS = 65536
DRAFTED = 3
# What keeps a measurement from another's settings.
FOREIGN = ("SGLANG_PLUGINS", "SGLANG_SIMULATE_ACC_LEN", "SGLANG_TORCH_PROFILER_DIR")


# A signal that comes while a process is started: Python drops what a handler raises in
# the functions that it runs around a fork.
SPAWNING = types.SimpleNamespace(now=False, interrupted=False)


class HouseError(Exception):
    """One sentence for the user: what is wrong, where, and what to do."""


@contextlib.contextmanager
def reported(program: str) -> Iterator[None]:
    """Ends a program with one sentence: bad input, a full disk, a signal."""

    def interrupt(signum, frame):
        if SPAWNING.now:
            SPAWNING.interrupted = True
        else:
            raise KeyboardInterrupt

    signums = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(signum, interrupt) for signum in signums]
    try:
        yield
    except HouseError as e:
        sys.exit(f"{program}: {e}")
    except OSError as e:
        where = f": {e.filename}" if e.filename else ""
        if e.errno == errno.ENOSPC:
            sys.exit(
                f"{program}: the disk is full{where}; make room, and the same command "
                "goes on where it stopped."
            )
        sys.exit(f"{program}: {e.strerror or e}{where}")
    except KeyboardInterrupt:
        print(
            f"{program}: interrupted; no server is left, and the same command goes on "
            "where it stopped.",
            file=sys.stderr,
        )
        sys.exit(130)
    finally:
        for signum, handler in zip(signums, before):
            signal.signal(signum, handler)


@functools.cache
def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# Arms ------------------------------------------------------------------------


@dataclasses.dataclass
class Arm:
    """One of the things compared.

    Attributes:
        python: The interpreter that serves it.
        path: The folders of its PYTHONPATH; None leaves this process's.
        flags: More flags of its server.
        file: Its engine's `__init__.py`, filled in by `probe`, as are the rest.
        code: Digest of all Python files of the engine.
    """

    name: str
    python: str = sys.executable
    path: Optional[List[str]] = None
    flags: List[str] = dataclasses.field(default_factory=list)
    file: str = ""
    version: str = ""
    code: str = ""

    @property
    def engine(self) -> str:
        return "vllm" if self.name.startswith("vllm") else "sglang"

    def environment(self) -> Dict[str, str]:
        env = {k: v for k, v in os.environ.items() if k not in FOREIGN}
        path = self.path
        if path is None:
            path = [] if self.python != sys.executable else _inherited_path()
        env.update(
            PYTHONPATH=os.pathsep.join([str(PLUGIN), *path]),
            PYTHONUNBUFFERED="1",
            HF_HUB_OFFLINE="1",
            TRANSFORMERS_OFFLINE="1",
            # Commands beside the interpreter, such as ninja, are this environment's.
            PATH=os.pathsep.join(
                [os.path.dirname(self.python), os.environ.get("PATH", "")]
            ),
        )
        if not has_gpu():
            env["SGLANG_USE_CPU_ENGINE"] = "1"
            # Operations of a tiny model take less time than threads take to meet.
            env.setdefault("OMP_NUM_THREADS", "1")
        if self.engine == "vllm":
            env.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
        return env

    def describe(self) -> Dict[str, object]:
        """What a result file says of it."""
        return {
            "engine": self.engine,
            "version": self.version,
            "code_sha256": self.code,
            "flags": shlex.join(self.flags),
        }

    def probe(self) -> None:
        """Finds the engine's file, version and digest, without importing it.

        Raises:
            HouseError: The environment has no such engine.
        """
        program = (
            "import importlib.util as u, sys; s = u.find_spec(sys.argv[1]); "
            "print(s and s.origin or '')"
        )
        with tempfile.TemporaryDirectory() as empty:
            try:
                done = subprocess.run(
                    [self.python, "-c", program, self.engine],
                    **dict(env=self.environment(), cwd=empty),
                    **dict(capture_output=True, text=True),
                )
            except OSError as e:
                raise HouseError(
                    f"The arm {self.name} cannot run {self.python}: {e.strerror}."
                ) from None
        self.file = done.stdout.strip()
        if done.returncode or not self.file:
            where = os.pathsep.join(self.path or []) or self.python
            raise HouseError(
                f"The arm {self.name} has no {self.engine} in {where}: install it "
                "there, or name another interpreter or folder."
            )
        package = Path(self.file).parent
        digest = hashlib.sha256()
        for file in sorted(package.rglob("*.py")):
            if file.name != "_version.py":
                digest.update(str(file.relative_to(package)).encode() + b"\0")
                digest.update(file.read_bytes())
        self.code = digest.hexdigest()[:16]
        version = package / "_version.py"
        found = version.exists() and re.search(
            r"__version__\s*(?:=\s*version\s*)?=\s*['\"](.+?)['\"]", version.read_text()
        )
        self.version = found[1] if found else ""


def _inherited_path() -> List[str]:
    return [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]


def parse_arm(text: str) -> Arm:
    """An arm from what was typed, see the head of this file.

    Raises:
        HouseError: It is none.
    """
    head, _, flags = text.partition("=")
    name, at, where = head.partition("@")
    if not re.fullmatch(r"[A-Za-z][\w.+ -]*", name):
        raise HouseError(f"{text!r} is no arm: write NAME=FLAGS or NAME@WHERE=FLAGS.")
    arm = Arm(name, flags=shlex.split(flags))
    if at:
        places = [os.path.abspath(os.path.expanduser(p)) for p in where.split(":")]
        for place in places:
            if not os.path.exists(place):
                raise HouseError(f"The arm {name} is to run in {place}: no such place.")
        if len(places) == 1 and os.path.isfile(places[0]):
            arm.python = places[0]
        else:
            arm.path = places
        return arm
    found = re.fullmatch(r"base(?:\+([\w.-]+))?", name)
    if found and not flags:
        upto = found[1] or ("" if has_gpu() else CPU_BLOCKERS)
        arm.name = f"base+{upto}" if upto else "base"
        arm.path = [str(release(upto))]
    elif name.startswith("vllm") and not importlib.util.find_spec("vllm"):
        raise HouseError(
            f"The arm {name} needs vLLM, which is not installed beside the fork: name "
            f"its environment, `--arm {name}@PYTHON`."
        )
    return arm


def chosen_arms(names: str, more: List[str], default: List[str]) -> List[Arm]:
    """The arms of --arms, names with commas between, and of each --arm; `default` where
    neither is given. Each is probed.

    Raises:
        HouseError: One is no arm, or its environment has no such engine.
    """
    chosen = [name for name in names.split(",") if name]
    given = (chosen or ([] if more else default)) + more
    arms = [parse_arm(text) for text in given]
    for arm in arms:
        arm.probe()
    return arms


def release(upto: str = "") -> Path:
    """The folder of the pinned release with the patches up to this name; kept."""
    sys.path.insert(0, str(ROOT / "python"))
    from fork import base, series
    from fork.errors import ForkError

    try:
        project, patches = base.installed(), []
        if upto:
            names = project.patch_names()
            if upto not in names:
                raise HouseError(
                    f"The series {project.series} has no patch {upto}: see "
                    f"{project.show(project.settings)}."
                )
            patches = project.patches()[: names.index(upto) + 1]
        digest = hashlib.sha256(project.base.read_bytes())
        for patch in patches:
            digest.update(patch.read_bytes())
        folder = CACHE / "arms" / f"base-{upto or 'none'}-{digest.hexdigest()[:12]}"
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with base.unpacked(project) as content:
            if patches:
                series.patch_package(project, patches, content / "sglang")
            partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
            shutil.copytree(content, partial, dirs_exist_ok=True)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    except ForkError as e:
        raise HouseError(str(e)) from None
    return folder


# Servers ---------------------------------------------------------------------


def check_port(port: int) -> None:
    """Raises HouseError unless a server can listen there."""
    if not 1 <= port <= LAST_PORT:
        raise HouseError(f"--port {port} is none that SGLang takes: 1 to {LAST_PORT}.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise HouseError(
                f"Port {port} of {HOST} is in use: stop what listens there, or name "
                "another with --port."
            ) from None


def check_new(path: Path) -> None:
    """Raises HouseError if there is a result of this name."""
    if path.exists():
        raise HouseError(f"{path} exists: give another --name, or remove it.")


def check_model(folder: Path, what: str = "--model") -> None:
    if not (folder / "config.json").is_file():
        raise HouseError(f"{what} {folder} is no checkpoint: it has no config.json.")


def has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _die_with_parent() -> None:
    # Whatever ends this process, SIGKILL too, ends its servers.
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _spawn(command: List[str], **kwargs) -> subprocess.Popen:
    SPAWNING.now = True
    try:
        process = subprocess.Popen(
            command, start_new_session=True, preexec_fn=_die_with_parent, **kwargs
        )
    finally:
        SPAWNING.now = False
    if SPAWNING.interrupted:
        _stop(process)
        raise KeyboardInterrupt
    return process


def _stop(process: subprocess.Popen) -> None:
    """Ends a process with all that it started."""
    try:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(15)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 15
        while _group_lives(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
        return True
    except ProcessLookupError:
        return False


@dataclasses.dataclass
class Setup:
    """What the servers of all arms have in common.

    Attributes:
        model: The checkpoint; without weights they are drawn, see plugin/.
        context: Tokens a request may have.
        draft: The MTP draft's checkpoint, or None to serve without MTP.
        accepted: Tokens a verify step yields on average, the bonus token among them.
        flags: More flags for the servers of SGLang.
        profiles: Where vLLM's profiler, which is named at its start, is to write.
    """

    model: Path
    port: int = 30000
    context: int = 16384
    draft: Optional[Path] = None
    accepted: float = 0.0
    requests: int = 80
    flags: List[str] = dataclasses.field(default_factory=list)
    profiles: Optional[Path] = None

    def command(self, arm: Arm) -> List[str]:
        dummy = [] if has_weights(self.model) else ["--load-format", "dummy"]
        address = ["--host", HOST, "--port", str(self.port)]
        build = self._sglang if arm.engine == "sglang" else self._vllm
        return [arm.python, "-m", *build(), *dummy, *address, *arm.flags]

    def _sglang(self) -> List[str]:
        flags = ["sglang.launch_server", "--model-path", str(self.model)]
        flags += ["--context-length", str(self.context)]
        # The warm-up asks about a picture; bench_serving warms up by itself.
        flags += ["--skip-server-warmup"]
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
    """A running server of one arm.

    Attributes:
        seconds: How long it took to start.
    """

    def __init__(self, arm: Arm, setup: Setup, log: Path):
        self.arm, self.setup, self.log = arm, setup, log
        self.url = f"http://{HOST}:{setup.port}"
        # Nobody's proxy stands between this machine and itself.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, path: str, data: Optional[dict] = None, timeout: float = 60):
        """The open response to a GET, or to a POST of JSON."""
        request = urllib.request.Request(self.url + path)
        if data is not None:
            request.data = json.dumps(data).encode()
            request.add_header("Content-Type", "application/json")
        return self._opener.open(request, timeout=timeout)

    def generate(self, data: dict, timeout: float = 300):
        """What /generate answers to this request.

        Raises:
            HouseError: The server died, refused it or did not answer.
        """
        try:
            with self.ask("/generate", data, timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as e:
            told = e.read().decode(errors="replace")[:200]
            raise HouseError(f"{self.arm.name} answered {e.code}: {told}") from None
        except OSError as e:
            self.check_alive("while it answered")
            raise HouseError(f"{self.arm.name} did not answer ({e}).") from None

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
        told = [ln for ln in lines if re.search(r"Error\b|error:|No space left", ln)]
        last = (told or lines or ["nothing"])[-1].strip()[-300:]
        raise HouseError(
            f"The server of {self.arm.name} died {when} (exit status {status}); its "
            f"log, {self.log}, ends with: {last}"
        )

    @contextlib.contextmanager
    def running(self, timeout: float = 900, tick=lambda seconds: None) -> Iterator:
        """Starts it, yields when it is ready, and stops it, whatever happens.

        Raises:
            HouseError: It died, or was not ready in time, or runs other code.
        """
        check_port(self.setup.port)
        command = self.setup.command(self.arm)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "w") as output:
            output.write(f"$ {shlex.join(command)}\n")
            output.flush()
            start = time.monotonic()
            self.process = _spawn(
                command,
                **dict(stdin=subprocess.DEVNULL, stdout=output, stderr=output),
                **dict(env=self.setup.environment(self.arm), cwd=self.log.parent),
            )
        try:
            while not self._is_ready():
                self.check_alive("while starting")
                self.seconds = time.monotonic() - start
                if self.seconds > timeout:
                    raise HouseError(
                        f"The server of {self.arm.name} was not ready after "
                        f"{timeout:.0f} s: see {self.log}."
                    )
                tick(self.seconds)
                time.sleep(0.5)
            self.seconds = time.monotonic() - start
            self._check_code()
            yield self
        finally:
            _stop(self.process)

    def _is_ready(self) -> bool:
        try:
            return self.ask("/health", timeout=30).status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError, OSError):
            return False

    def _check_code(self) -> None:
        """What the processes of the server said that they run is the arm's."""
        log = self.log.read_text(errors="replace")
        said = dict(re.findall(r"Measured code: (\S+) (\S+)", log))
        files = {os.path.realpath(file) for file in said}
        if files != {os.path.realpath(self.arm.file)}:
            raise HouseError(
                f"The server of {self.arm.name} runs {', '.join(files) or 'no one knows'}"
                f" instead of {self.arm.file}: see {self.log}."
            )
        self.arm.version = next(iter(said.values()))
        drawn = log.count("Random weights:")
        wanted = 0 if has_weights(self.setup.model) else 1 + bool(self.setup.draft)
        if drawn < wanted:
            raise HouseError(
                f"The server of {self.arm.name} drew its random weights in its own "
                f"way ({drawn} of {wanted} models in ours): see {self.log}."
            )


def captured_graphs(log: str) -> Tuple[int, float]:
    """(CUDA graphs that a server of SGLang captured, the GiB they took), of its log.

    Each runner, the draft's too, reports its begin, a bar, and its end, where some
    tell the memory; that of the others is what the bar saw leave.
    """
    count, memory = 0, 0.0
    runs = re.findall(r"Capture (?:[^\n]* )?graph begin(.*?graph end[^\n]*)", log, re.S)
    for run in runs:
        count += max(map(int, re.findall(r"\d+/(\d+) \[", run)), default=0)
        told = re.findall(r"graph end.*mem usage=([\d.]+) GB", run)
        free = [float(value) for value in re.findall(r"avail_mem=([\d.]+) GB", run)]
        memory += (
            float(told[-1]) if told else max(free, default=0) - min(free, default=0)
        )
    return count, round(memory, 3)


class Client:
    """SGLang's bench_serving, imported once and run for each load.

    It is the one of this interpreter for every arm: what sends does not differ.
    """

    def __init__(self, log: Path):
        self.log = log

    @contextlib.contextmanager
    def running(self) -> Iterator["Client"]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        if not has_gpu():
            env["SGLANG_USE_CPU_ENGINE"] = "1"
        with open(self.log, "a") as output:
            self.process = _spawn(
                [sys.executable, str(HERE / "client.py")],
                **dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output),
                **dict(env=env, cwd=self.log.parent, text=True, bufsize=1),
            )
        try:
            yield self
        finally:
            _stop(self.process)
            self.process.stdin.close()
            self.process.stdout.close()

    def send(
        self,
        arguments: List[str],
        server: Server,
        timeout: float,
        tick=lambda: None,
    ) -> dict:
        """Runs bench_serving with these arguments; returns its result.

        `tick` is called a few times a second meanwhile.

        Raises:
            HouseError: It failed, the server died, or it took longer than `timeout`.
        """
        with tempfile.TemporaryDirectory(prefix="bench-serving-") as folder:
            output = Path(folder) / "result.jsonl"
            line = json.dumps([*arguments, "--output-file", str(output)])
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            start = time.monotonic()
            while not select.select([self.process.stdout], [], [], 0.2)[0]:
                tick()
                server.check_alive("under load")
                if time.monotonic() - start > timeout:
                    raise HouseError(
                        f"The load took longer than {timeout:.0f} s: see {self.log}."
                    )
            tick()
            said = self.process.stdout.readline().strip()
            server.check_alive("under load")
            if said != "done" or not output.exists():
                raise HouseError(
                    f"bench_serving failed ({said or 'it died'}): see {self.log}."
                )
            return json.loads(output.read_text().splitlines()[-1])
