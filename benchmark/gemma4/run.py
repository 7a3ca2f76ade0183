"""Serve Gemma 4 with several arms in turn and send each the same loads.

    python benchmark/gemma4/run.py --name serving-h200
    python benchmark/gemma4/run.py --arms base,fork --loads chat,stream --mtp off,2.75
    python benchmark/gemma4/run.py --arms fork --upto text-only --arm "ratio=--swa-full-tokens-ratio 0.8"
    python benchmark/gemma4/run.py --arm vllm@/opt/vllm/bin/python --arms fork
    python benchmark/gemma4/run.py --shape tiny --loads chat --arms base,fork

An arm is `base`, `fork`, `base+NAME`, NAME=FLAGS or NAME@WHERE=FLAGS, as serving.py
says. The first arm is what the others are compared with. The arms take turns, A B A B,
once a repeat; each turn starts the arm's server anew, runs every load once through
SGLang's own bench_serving, and stops it. What was measured is written after each load:
the same command goes on where it was interrupted, and a larger --repeats adds samples.

A server compiles kernels when it first meets a batch of another shape. So that none is
compiled inside a load, each answers a burst first that is not measured: many prompts at
once, of each length that the loads have, with other ids than theirs.

With MTP the draft model is random too, so the number of accepted tokens is simulated
(--mtp 2.75: a verify step yields 2.75 tokens on average) and the accepted ids are
random; draft and verify run in full. A checkpoint folder without weights is served with
random ones; plugin/gemma4_house.py says how, the same for each arm.
"""

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
from pathlib import Path
from typing import Dict, Iterable, List, Optional

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
import serving  # noqa: E402
from plan_kv_pools import positive  # noqa: E402
from pool_usage import FLUSHED, NUMBERS  # noqa: E402
from results import FOLDER, Results, hardware, load, table  # noqa: E402
from serving import Arm, Client, HouseError, Server, Setup  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Load:
    """What is sent: prompts of `input` tokens, each answered with `output` tokens."""

    input: int
    output: int
    prompts: int
    at_once: Optional[int] = None
    groups: int = 0  # of prompts that share 8/9 of their input

    def scaled(self, prompts: int, input: int, output: int) -> "Load":
        """With at most so many prompts, and input and output divided."""
        prompts = min(self.prompts, prompts)
        groups = max(min(self.groups, prompts // 2), 1) if self.groups else 0
        return dataclasses.replace(
            self,
            # As many in each group.
            prompts=prompts - prompts % groups if groups else prompts,
            input=max(self.input // input, 1),
            output=max(self.output // output, 1),
            groups=groups,
        )

    @property
    def warmups(self) -> int:
        """Prompts of its own, one after another, before its clock starts."""
        return min(WARMUP, max(self.prompts // 2, 1))

    def title(self, name: str) -> str:
        title = f"{self.input}/{self.output}, {self.prompts} prompts"
        if name in LOADS:
            title = f"{name} {title}"
        if self.groups:
            title += f" in {self.groups} groups"
        if self.at_once:
            title += (
                ", one at a time" if self.at_once == 1 else f", {self.at_once} at once"
            )
        return title

    def arguments(self) -> List[str]:
        """Of bench_serving."""
        if self.groups:
            shared = self.input * 8 // 9
            numbers = {
                "gsp-num-groups": self.groups,
                "gsp-prompts-per-group": self.prompts // self.groups,
                "gsp-system-prompt-len": shared,
                "gsp-question-len": self.input - shared,
                "gsp-output-len": self.output,
            }
            dataset = "generated-shared-prefix"
        else:
            numbers = {
                "random-input-len": self.input,
                "random-output-len": self.output,
                "random-range-ratio": 1.0,
                "num-prompts": self.prompts,
            }
            dataset = "random-ids"
        if self.at_once:
            numbers["max-concurrency"] = self.at_once
        flags = [part for k, v in numbers.items() for part in (f"--{k}", str(v))]
        return ["--dataset-name", dataset, *flags]


LOADS = {
    "summarization": Load(8000, 1000, 80),
    "chat": Load(1000, 1000, 80),
    "stream": Load(1000, 400, 8, at_once=1),
    "prefill": Load(8000, 1, 8, at_once=1),
    "short-prefill": Load(1000, 1, 8, at_once=1),
    "shared-prefix": Load(4500, 500, 80, groups=8),
    "long": Load(65536, 200, 4, at_once=2),
    "128k": Load(131072, 1, 2, at_once=1),
    "crowd": Load(8000, 1000, 160),
    "agents": Load(65536, 400, 64, at_once=32, groups=8),
}
OTHER_LOAD = re.compile(r"([1-9]\d*)/([1-9]\d*)x([1-9]\d*)(?:@([1-9]\d*))?")
SEEDS = 1000  # of a repeat, one a load
WARMUP = 2
# A burst's prompts: tokens in all, so that it takes seconds, and tokens of each answer.
BURST_TOKENS, BURST_OUTPUT, BURST_SEED = 131072, 8, 10**6
BURST = (
    "before its first load each server answers, unmeasured, prompts of other ids, all at "
    f"once: of each length of the loads, {BURST_TOKENS} tokens at most, and as many "
    "short ones as the largest load has"
)
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
HIGHER_IS_BETTER = ("output",)
SUMMARY = ("output", "mean TTFT", "median TTFT", "median TPOT")
OF_START = ("start-up", "CUDA graphs", "CUDA graph memory")
CLIENT = f"--random-range-ratio 1.0 --warmup-requests {WARMUP} --flush-cache"


@dataclasses.dataclass
class Turn:
    """One start of one arm's server: the loads it still has to run."""

    repeat: int
    arm: Arm
    mtp: str
    loads: List[str]


def bursts(loads: Iterable[Load]) -> List[Load]:
    """What a server answers unmeasured before these loads.

    Several prompts fill a chunk of the prefill, one goes over into the next with what
    is cached of it, and all decode together. A load of one prompt at a time meets no
    shape that its own warm-up has not.
    """
    loads = [load for load in loads if load.at_once != 1]
    if not loads:
        return []
    # Long prompts are too many to send as many as decode together later: short ones.
    most = max(load.prompts for load in loads)
    short = min(1000, *(load.input for load in loads))
    found = {short: Load(short, BURST_OUTPUT, most)}
    for load in loads:
        prompts = min(load.prompts, max(BURST_TOKENS // load.input, 1))
        known = found.get(load.input)
        if known is None or known.prompts < prompts:
            found[load.input] = Load(load.input, BURST_OUTPUT, prompts)
    return list(found.values())


class MemoryWatch:
    """The most that is in use on the GPU, by whatever uses it, in GiB; 0 unseen.

    It asks nvidia-smi: to ask CUDA would take memory itself.
    """

    def __init__(self):
        self.peak, self.next = 0.0, 0.0
        device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        self.command = ["nvidia-smi", "-i", device, "--query-gpu=memory.used"]
        self.command += ["--format=csv,noheader,nounits"]
        self.there = serving.has_gpu() and shutil.which("nvidia-smi")

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


class Run:
    def __init__(self, args: argparse.Namespace, results: Results, arms: List[Arm]):
        self.args, self.results, self.arms = args, results, arms
        self.path = args.out / f"{args.name}.json"
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
                except HouseError as e:
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
        server = Server(
            turn.arm, self.setup(turn.mtp), self.logs / f"{stem}.server.log"
        )
        with Client(self.logs / f"{stem}.client.log").running() as client:
            self.bar.set_description(f"{turn.arm.name}: starting")
            with server.running(self.args.start_timeout):
                self.seconds[START, turn.arm.name, turn.mtp] = server.seconds
                self._record_start(turn, server)
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

    def _record_start(self, turn: Turn, server: Server) -> None:
        values = {"start-up": ("s", server.seconds)}
        if serving.has_gpu() and turn.arm.engine == "sglang":
            log = server.log.read_text(errors="replace")
            graphs, memory = serving.captured_graphs(log)
            values["CUDA graphs"] = ("graphs", graphs)
            values["CUDA graph memory"] = ("GiB", memory)
        case = {"load": START, "mtp": mtp_title(turn.mtp)}
        for metric, (unit, value) in values.items():
            self.results.append(case, turn.arm.name, metric, unit, round(value, 3))
        self.results.save(self.path)

    def _burst(self, turn: Turn, server: Server, client: Client) -> None:
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
        server: Server,
        client: Client,
        tick=lambda: None,
    ) -> dict:
        """Sends a load through bench_serving, which empties SGLang's cache before it."""
        backend = "sglang" if turn.arm.engine == "sglang" else "vllm"
        arguments = ["--backend", backend, "--host", serving.HOST]
        arguments += ["--port", str(self.args.port), "--model", str(self.args.model)]
        arguments += [*load.arguments(), "--seed", str(seed), "--disable-tqdm"]
        arguments += ["--warmup-requests", str(load.warmups), "--flush-cache"]
        before = server.log.stat().st_size
        result = client.send(arguments, server, self.args.load_timeout, tick)
        # SGLang refuses a request in a stream that bench_serving takes for its answer.
        refused = re.search(r"\[http_server\] (Error: .*)", server.logged(before))
        if refused:
            raise HouseError(
                f"{turn.arm.name} refused a request of {what}: {refused[1]} See "
                f"{server.log}."
            )
        if result["completed"] != load.prompts:
            raise HouseError(
                f"{turn.arm.name} answered {result['completed']} of {load.prompts} "
                f"requests of {what}: see {client.log} and {server.log}."
            )
        return result

    def _send(self, turn: Turn, name: str, server: Server, client: Client) -> str:
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
            raise HouseError(
                f"{turn.arm.name} holds {held} KV slots though all is answered: see "
                f"{server.log}."
            )
        shown = {m: self.results.get(case, turn.arm.name, m) for m in SUMMARY}
        return ", ".join(
            f"{metric} {record.samples[-1]:.4g} {record.unit}"
            for metric, record in shown.items()
            if record and metric != "median TTFT"
        )

    def _logged(self, server: Server, before: int) -> Dict[str, tuple]:
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
    def _held(server: Server) -> int:
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


def summary(results: Results) -> str:
    """The tables a person reads: medians, and each arm against the first."""
    parts = []
    arms = results.arms()
    for mtp in dict.fromkeys(record.case["mtp"] for record in results.records):
        for metric in (*SUMMARY, *OF_START):
            if any(results.select(metric=metric, mtp=mtp)):
                against = arms[0] if len(arms) > 1 else None
                shown = table(results, metric, against=against, mtp=mtp)
                parts.append(f"MTP {mtp}, {metric}\n\n{shown}")
    return "\n\n".join(parts)


def named_load(name: str) -> Load:
    """One of LOADS, or 1000/500x80@8: tokens in / out x prompts, at most 8 at once.

    Raises:
        argparse.ArgumentTypeError: It is neither.
    """
    if name in LOADS:
        return LOADS[name]
    numbers = OTHER_LOAD.fullmatch(name)
    if not numbers:
        raise argparse.ArgumentTypeError(
            f"{name!r} is none of {', '.join(LOADS)}, and not like 1000/500x80@8"
        )
    return Load(*(number and int(number) for number in numbers.groups()))


def chosen_loads(args: argparse.Namespace) -> Dict[str, Load]:
    chosen = {}
    for name in args.loads:
        load = named_load(name)
        if args.prompts:
            load = load.scaled(prompts=args.prompts, input=1, output=1)
        if args.quick:
            load = load.scaled(prompts=16, input=1, output=10)
        if args.shape == "tiny":
            load = load.scaled(prompts=8, input=32, output=32)
        chosen[name] = load
    return chosen


def prepare_model(args: argparse.Namespace) -> None:
    """Writes the shape's folders where they are needed, into the cache."""
    from checkpoint import CheckpointError, write_checkpoint

    if args.model:
        serving.check_model(args.model)
        if args.draft:
            serving.check_model(args.draft, "--draft")
        elif args.mtp != ["off"]:
            raise HouseError("With --model, MTP needs the draft's folder: --draft.")
        args.model, args.draft = (p and p.resolve() for p in (args.model, args.draft))
        return
    tiny = args.shape == "tiny"
    suffix = "" if tiny else "-no-weights"
    args.model = serving.CACHE / f"gemma-4-{args.shape}{suffix}"
    drafts = [] if args.mtp == ["off"] else [True]
    try:
        for assistant in (False, *drafts):
            folder = args.model
            if assistant:
                folder = args.draft = folder.with_name(f"{folder.name}-draft")
            if not (folder / "config.json").exists():
                write_checkpoint(folder, args.shape, assistant=assistant, weights=tiny)
    except CheckpointError as e:
        raise HouseError(str(e)) from None


def resume(path: Path, settings: dict, arms: Dict[str, dict]) -> Results:
    """The result file to add to, of the same measurement as far as it knows the arms.

    Raises:
        HouseError: It is none, or of another.
    """
    try:
        results = load(path)
    except (OSError, ValueError) as e:
        raise HouseError(f"{e}; give another --name.") from None
    known = results.settings.setdefault("arms", {})
    differing = [k for k, v in settings.items() if results.settings.get(k) != v]
    if results.hardware.get("gpu") != hardware().get("gpu"):
        differing.append("GPU")
    for name, arm in arms.items():
        if name in known:
            old, new = dict(known[name]), dict(arm)
            old.pop("version"), new.pop("version")
            if old != new:
                differing.append(name)
    if differing:
        raise HouseError(
            f"{path} was measured otherwise ({', '.join(differing)} differ): give "
            "another --name, or remove it."
        )
    return results


def prepare_results(args: argparse.Namespace, arms: List[Arm]) -> Results:
    """The result file to add to: what is there, if it is of the same measurement."""
    weights = "loaded" if serving.has_weights(args.model) else "drawn"
    settings = {
        "model": args.model.name,
        "weights": weights,
        "server": args.flags,
        "client": CLIENT,
        "burst": BURST,
        "seed": args.seed,
        "context": longest_context(args),
        "requests": max(load.prompts for load in args.chosen.values()),
    }
    described = {arm.name: arm.describe() for arm in arms}
    path = args.out / f"{args.name}.json"
    if not path.exists():
        where = "" if serving.has_gpu() else ", on a CPU"
        kind = (
            "random weights" if weights == "drawn" or not args.real else "its weights"
        )
        title = f"Gemma 4 {args.title} with {kind}{where}"
        results = Results.start("serving", args.name, title, **settings, arms=described)
        for note in notes(args, arms, weights):
            results.notes.append(note)
        return results
    results = resume(path, settings, described)
    results.settings["arms"].update(described)
    for note in notes(args, arms, weights):
        if note not in results.notes:
            results.notes.append(note)
    return results


def notes(args: argparse.Namespace, arms: List[Arm], weights: str) -> List[str]:
    found = []
    if weights == "drawn":
        found.append(
            "Random weights, drawn by each server: N(0, 0.02) for matrices, ones elsewhere."
        )
    if args.mtp != ["off"]:
        found.append(
            "MTP: a random draft model of 3 tokens; the number of accepted tokens is "
            "simulated, and the accepted ids are random (vLLM's are its draft's own)."
        )
    if f"base+{serving.CPU_BLOCKERS}" in [arm.name for arm in arms]:
        found.append(
            f"base+{serving.CPU_BLOCKERS} is the release with the first patches, "
            "without which it does not serve on a CPU."
        )
    return found


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def listed(text: str) -> List[str]:
        return [name.strip() for name in text.split(",") if name.strip()]

    def loads(text: str) -> List[str]:
        names = listed(text)
        for name in names:
            named_load(name)
        return names

    def mtp(text: str) -> List[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name != "off" and not 1 <= float(name) <= serving.DRAFTED + 1:
                raise ValueError
        return names

    parser.add_argument("--name", default="serving", help="of the result file")
    parser.add_argument("--shape", default="26b-a4b", help="of random weights")
    parser.add_argument("--model", type=Path, help="a checkpoint, instead of --shape")
    parser.add_argument("--draft", type=Path, help="its MTP draft's checkpoint")
    parser.add_argument("--arms", type=listed, metavar="A,B", help="default: base,fork")
    parser.add_argument("--arm", action="append", default=[], metavar="ARM")
    parser.add_argument(
        "--upto", action="append", default=[], metavar="NAME", help="same as base+NAME"
    )
    parser.add_argument(
        *("--loads", "--load"),
        **dict(type=loads, metavar="A,B"),
        help=", ".join([*LOADS, "or INPUT/OUTPUTxPROMPTS[@AT_ONCE]"]),
        default=["summarization", "chat", "stream", "prefill"],
    )
    parser.add_argument(
        "--mtp",
        type=mtp,
        default=["off"],
        help="off, or accepted tokens a step; a list",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--prompts",
        type=positive,
        metavar="N",
        help="of a load at most, for a large model",
    )
    parser.add_argument("--quick", action="store_true", help="small numbers")
    parser.add_argument("--flags", default="", help="more for every SGLang server")
    parser.add_argument("--context", type=int, help="at least; default 16384")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--start-timeout", type=float, default=900, metavar="SECONDS")
    parser.add_argument("--load-timeout", type=float, default=1800, metavar="SECONDS")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of results")
    parser.add_argument("--logs", type=Path, default=serving.CACHE / "logs")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw SVGs there")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> None:
    args = parse(argv)
    with serving.reported("run.py"):
        from checkpoint import SHAPES

        args.real = bool(args.model and serving.has_weights(args.model))
        if not args.model and args.shape not in SHAPES:
            raise HouseError(f"--shape {args.shape} is none of {', '.join(SHAPES)}.")
        if not serving.has_gpu():
            if args.shape != "tiny" and not args.model:
                raise HouseError(
                    "This machine has no GPU that torch can use; --shape tiny is what "
                    "a CPU serves."
                )
            if args.mtp != ["off"]:
                raise HouseError("MTP needs a GPU: leave --mtp off.")
        serving.check_port(args.port)
        args.logs = args.logs.resolve()
        args.title = args.model.name if args.model else args.shape
        args.context = args.context or (4096 if args.shape == "tiny" else 16384)
        args.chosen = chosen_loads(args)
        prepare_model(args)
        given = args.arms or ([] if args.arm or args.upto else ["base", "fork"])
        given += [f"base+{name}" for name in args.upto] + args.arm
        arms = [serving.parse_arm(text) for text in given]
        for arm in arms:
            arm.probe()
            note = f", PYTHONPATH {':'.join(arm.path)}" if arm.path else ""
            print(f"{arm.name}: {arm.engine} in {Path(arm.file).parent}{note}")
        if len({arm.name for arm in arms}) < len(arms):
            raise HouseError("Two arms have one name.")
        results = prepare_results(args, arms)
        run = Run(args, results, arms)
        results.save(
            run.path
        )  # now, rather than after an hour, if it cannot be written
        failures = run.measure()
        if results.records:
            print(f"\n{summary(results)}\n\nwrote {run.path}; logs in {run.logs}")
        if results.records and args.plot:
            from plot import draw

            for picture in draw(results, args.plot):
                print(picture)
        if failures:
            raise HouseError(" Also: ".join(failures))


if __name__ == "__main__":
    main()
