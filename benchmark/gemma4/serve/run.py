"""Takes the turns of the arms: starts a server, sends it the loads, records."""

import argparse
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from typing import Dict, List

from gemma4.arguments import result_path
from gemma4.engines.arms import Arm
from gemma4.engines.host import HOST, has_gpu
from gemma4.engines.servers import ArmServer, Setup, captured_graphs
from gemma4.errors import UserError
from gemma4.pools.usage import FLUSHED, NUMBERS
from gemma4.report.results import Results
from gemma4.serve.client import Client
from gemma4.serve.loads import BURST_SEED, LOADS, Load, bursts
from tqdm import tqdm

SEEDS = 1000  # of a repeat, one a load
START = "start"
# A name, its unit, and bench_serving's name with the factor to that unit.
METRICS = {
    "output": ("tok/s", "output_throughput", 1),
    "mean TTFT": ("s", "mean_ttft_ms", 1e-3),
    "median TTFT": ("s", "median_ttft_ms", 1e-3),
    "mean TPOT": ("ms", "mean_tpot_ms", 1),
    "median TPOT": ("ms", "median_tpot_ms", 1),
    "p99 ITL": ("ms", "p99_itl_ms", 1),
    "duration": ("s", "duration", 1),
}
SUMMARY = ("output", "mean TTFT", "median TTFT", "median TPOT")
OF_START = ("start-up", "CUDA graphs", "CUDA graph memory")


@dataclasses.dataclass
class Turn:
    """One start of one arm's server: the loads it still has to run."""

    repeat: int
    arm: Arm
    mtp: str
    loads: List[str]


class MemoryWatch:
    """The most that is in use on the GPU, by whatever uses it, in GiB; 0 unseen.

    It asks nvidia-smi: to ask CUDA would take memory itself.
    """

    def __init__(self):
        self.peak, self.next = 0.0, 0.0
        device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        self.command = ["nvidia-smi", "-i", device, "--query-gpu=memory.used"]
        self.command += ["--format=csv,noheader,nounits"]
        self.there = has_gpu() and shutil.which("nvidia-smi")

    def look(self) -> None:
        """Looks once a second, however often it is called."""
        now = time.monotonic()
        if not self.there or now < self.next:
            return
        self.next = now + 1.0
        said = subprocess.run(self.command, capture_output=True, text=True).stdout
        if said.strip().isdigit():
            self.peak = max(self.peak, int(said) / 1024)


def mtp_title(mtp: str) -> str:
    return mtp if mtp == "off" else f"{mtp} accepted"


def record_start(results: Results, case: dict, server: ArmServer) -> None:
    """How long a server took to start, and what its CUDA graphs take."""
    values = {"start-up": ("s", server.seconds)}
    if has_gpu() and server.arm.engine == "sglang":
        log = server.log.read_text(errors="replace")
        graphs, memory = captured_graphs(log)
        values["CUDA graphs"] = ("graphs", graphs)
        values["CUDA graph memory"] = ("GiB", memory)
    for metric, (unit, value) in values.items():
        results.append(case, server.arm.name, metric, unit, round(value, 3))


class Run:
    def __init__(self, args: argparse.Namespace, results: Results, arms: List[Arm]):
        self.args, self.results, self.arms = args, results, arms
        self.path = result_path(args)
        self.logs = args.logs / args.name
        self.seconds: Dict[tuple, float] = {}

    def case(self, name: str, mtp: str) -> dict:
        return {"load": self.args.chosen[name].title(name), "mtp": mtp_title(mtp)}

    def turns(self) -> List[Turn]:
        """What is missing, in the order in which it is to be measured."""
        turns = []
        for repeat in range(self.args.repeats):
            for mtp in self.args.mtp:
                for arm in self.arms:
                    missing = []
                    for name in self.args.chosen:
                        record = self.results.get(
                            self.case(name, mtp), arm.name, "output"
                        )
                        if record is None or len(record.samples) <= repeat:
                            missing.append(name)
                    if missing:
                        turns.append(Turn(repeat, arm, mtp, missing))
        return turns

    def setup(self, mtp: str) -> Setup:
        on = mtp != "off"
        return Setup(
            self.args.model,
            self.args.port,
            context=longest_context(self.args),
            draft=self.args.draft if on else None,
            accepted=float(mtp) if on else 0.0,
            requests=max(load.prompts for load in self.args.chosen.values()),
            flags=shlex.split(self.args.flags),
        )

    def measure(self) -> List[str]:
        """Takes every turn that is missing; returns what went wrong in any."""
        turns = self.turns()
        failures: Dict[tuple, str] = {}
        self.steps = sum(len(self._kinds(turn)) for turn in turns)
        self.done = 0
        if not turns:
            print("All of it is measured already.")
        with tqdm(total=self.steps, unit="step", disable=None) as self.bar:
            for position, turn in enumerate(turns):
                if (turn.arm.name, turn.mtp) in failures:
                    continue
                try:
                    self._take(turn, turns[position + 1 :])
                except UserError as e:
                    # The other arms may well serve; what they give is kept.
                    failures[turn.arm.name, turn.mtp] = str(e)
        return list(failures.values())

    def _kinds(self, turn: Turn) -> List[str]:
        """The steps of a turn, by the first part of their key in `seconds`."""
        burst = ["burst"] if bursts(self.args.chosen[n] for n in turn.loads) else []
        return [START, *burst, *turn.loads]

    def _take(self, turn: Turn, later: List[Turn]) -> None:
        mtp = "" if turn.mtp == "off" else f"-mtp{turn.mtp}"
        stem = f"{turn.repeat + 1}-{turn.arm.name}{mtp}".replace(" ", "_")
        server = ArmServer(
            turn.arm, self.setup(turn.mtp), self.logs / f"{stem}.server.log"
        )
        with Client(self.logs / f"{stem}.client.log").running() as client:
            self.bar.set_description(f"{turn.arm.name}: starting")
            with server.running(self.args.start_timeout):
                self.seconds[START, turn.arm.name, turn.mtp] = server.seconds
                case = {"load": START, "mtp": mtp_title(turn.mtp)}
                record_start(self.results, case, server)
                self.results.save(self.path)
                self._say(
                    f"{turn.arm.name} {turn.arm.version}, MTP {mtp_title(turn.mtp)}: "
                    f"up in {server.seconds:.0f} s"
                )
                self._burst(turn, server, client)
                for i, name in enumerate(turn.loads):
                    self.bar.set_description(f"{turn.arm.name}: {name}")
                    start = time.monotonic()
                    said = self._send(turn, name, server, client)
                    key = (name, turn.arm.name, turn.mtp)
                    self.seconds[key] = time.monotonic() - start
                    rest = self._left(turn, turn.loads[i + 1 :], later)
                    self._say(
                        f"{turn.arm.name}, {self.case(name, turn.mtp)['load']}: {said} "
                        f"({self.seconds[key]:.0f} s{rest})"
                    )

    def _say(self, message: str) -> None:
        self.done += 1
        self.bar.update()
        tqdm.write(f"[{self.done}/{self.steps}] {message}", file=sys.stdout)
        sys.stdout.flush()

    def _left(self, turn: Turn, loads: List[str], later: List[Turn]) -> str:
        """How long what is left takes, once each kind of step was seen on some arm."""
        steps = [(name, turn.arm.name, turn.mtp) for name in loads]
        for other in later:
            steps += [(k, other.arm.name, other.mtp) for k in self._kinds(other)]
        total = 0.0
        for step in steps:
            alike = [v for k, v in self.seconds.items() if k[0] == step[0]]
            if not alike:
                return ""
            total += self.seconds.get(step, max(alike))
        return f"; about {total / 60:.0f} min left" if total else ""

    def _burst(self, turn: Turn, server: ArmServer, client: Client) -> None:
        found = bursts(self.args.chosen[name] for name in turn.loads)
        if not found:
            return
        self.bar.set_description(f"{turn.arm.name}: burst")
        start = time.monotonic()
        for i, load in enumerate(found):
            seed = self.args.seed + BURST_SEED + i
            self._ask(turn, load, seed, "its burst", server, client)
        seconds = self.seconds["burst", turn.arm.name, turn.mtp] = (
            time.monotonic() - start
        )
        sizes = ", ".join(f"{load.prompts} of {load.input}" for load in found)
        self._say(f"{turn.arm.name}, burst, not measured: {sizes} ({seconds:.0f} s)")

    def _ask(
        self,
        turn: Turn,
        load: Load,
        seed: int,
        what: str,
        server: ArmServer,
        client: Client,
        tick=lambda: None,
    ) -> dict:
        """Sends a load through bench_serving, which empties SGLang's cache before it."""
        backend = "sglang" if turn.arm.engine == "sglang" else "vllm"
        arguments = ["--backend", backend, "--host", HOST]
        arguments += ["--port", str(self.args.port), "--model", str(self.args.model)]
        arguments += [*load.arguments(), "--seed", str(seed), "--disable-tqdm"]
        arguments += ["--warmup-requests", str(load.warmups), "--flush-cache"]
        before = server.log.stat().st_size
        result = client.send(arguments, server, self.args.load_timeout, tick)
        # SGLang refuses a request in a stream that bench_serving takes for its answer.
        refused = re.search(r"\[http_server\] (Error: .*)", server.logged(before))
        if refused:
            raise UserError(
                f"{turn.arm.name} refused a request of {what}: {refused[1]} See "
                f"{server.log}."
            )
        if result["completed"] != load.prompts:
            raise UserError(
                f"{turn.arm.name} answered {result['completed']} of {load.prompts} "
                f"requests of {what}: see {client.log} and {server.log}."
            )
        return result

    def _send(self, turn: Turn, name: str, server: ArmServer, client: Client) -> str:
        chosen = self.args.chosen[name]
        # vLLM's prefix cache lives as long as its server, so that no load may repeat
        # another's prompts; those of a load are the same in each arm.
        names = [*LOADS, *(name for name in self.args.chosen if name not in LOADS)]
        seed = self.args.seed + turn.repeat * SEEDS + names.index(name)
        before = server.log.stat().st_size
        memory = MemoryWatch()
        result = self._ask(turn, chosen, seed, name, server, client, memory.look)
        case = self.case(name, turn.mtp)
        values = {
            metric: (unit, result[key] * factor)
            for metric, (unit, key, factor) in METRICS.items()
            if "TPOT" not in metric and "ITL" not in metric or chosen.output > 1
        }
        values.update(self._logged(server, before))
        held = 0
        if turn.arm.engine == "sglang":
            held = self._held(server)
            values["KV slots held when idle"] = ("slots", held)
        if memory.peak:
            values["peak GPU memory"] = ("GiB", memory.peak)
        if turn.mtp != "off" and result.get("accept_length"):
            values["accepted"] = ("tokens a step", result["accept_length"])
        for metric, (unit, value) in values.items():
            self.results.append(case, turn.arm.name, metric, unit, round(value, 5))
        self.results.save(self.path)
        if held:
            raise UserError(
                f"{turn.arm.name} holds {held} KV slots though all is answered: see "
                f"{server.log}."
            )
        shown = {m: self.results.get(case, turn.arm.name, m) for m in SUMMARY}
        return ", ".join(
            f"{metric} {record.samples[-1]:.4g} {record.unit}"
            for metric, record in shown.items()
            if record and metric != "median TTFT"
        )

    def _logged(self, server: ArmServer, before: int) -> Dict[str, tuple]:
        """Retractions and prefilled tokens since the cache was flushed."""
        text = server.logged(before).rpartition(FLUSHED)[2]
        if server.arm.engine != "sglang":
            return {}
        units = {
            "retractions": ("requests", NUMBERS["retracted"]),
            "prompt tokens prefilled": ("tokens", NUMBERS["prefilled"]),
        }
        return {
            metric: (unit, sum(map(int, re.findall(pattern, text))))
            for metric, (unit, pattern) in units.items()
        }

    @staticmethod
    def _held(server: ArmServer) -> int:
        """KV slots of the fuller pool that nobody gave back, all being answered.

        Those of the prefix cache, which may be evicted, do not count.
        """
        # The last request leaves the scheduler a step after its last token.
        for _ in range(50):
            (load,) = json.load(server.ask("/v1/loads"))["loads"]
            if not load["num_used_tokens"]:
                break
            time.sleep(0.1)
        return load["num_used_tokens"]


def longest_context(args: argparse.Namespace) -> int:
    """Of a request that the servers take: text is sent, which may have more tokens."""
    needed = (load.input * 1.05 + load.output for load in args.chosen.values())
    return max(args.context, int(max(needed)) + 64)
