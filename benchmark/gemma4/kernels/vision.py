"""Times the vision tower of several arms on the same pictures.

    python -m gemma4 kernel vision --arms base,fork
    python -m gemma4 kernel vision --arms fork --arm "sdpa=--mm-attention-backend sdpa"

Each arm has a process of its own that holds the model with random weights, its vision
tower whole and one layer of text, and answers with the time that the soft tokens of so
many pictures take, from pixels to the language model's width. The arms take turns,
picture count by picture count. All pictures of a request are handed over at once, as a
server does. An arm's flags are those of its server; its engine is found as
engines/arms.py says. `--shape tiny` runs on a CPU, to try the program.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Dict, List

from gemma4.arguments import check_shapes, new_result_path, positive
from gemma4.checkpoint import write_checkpoint
from gemma4.engines.arms import Arm, chosen_arms, described
from gemma4.engines.host import BENCHMARKS
from gemma4.engines.process import spawn, stop
from gemma4.errors import UserError
from gemma4.kernels.vision_worker import SAID
from gemma4.report.results import Results
from gemma4.report.tables import table
from tqdm import tqdm

COUNTS = (1, 16)


class Asked:
    """An arm's process."""

    def __init__(self, arm: Arm, model: Path, args: argparse.Namespace, log: Path):
        self.arm, self.log = arm, log
        command = [arm.python, "-m", "gemma4.kernels.vision_worker", str(model)]
        command += [str(args.height), str(args.width), *arm.flags]
        env = arm.environment()
        env["PYTHONPATH"] += f"{os.pathsep}{BENCHMARKS}"
        pipe = subprocess.PIPE
        with open(log, "wb") as file:
            self.process = spawn(
                command, stdin=pipe, stdout=pipe, stderr=file, env=env, text=True
            )

    def read(self) -> str:
        """The next line that is an answer, past what the engine prints."""
        for line in self.process.stdout:
            if line.startswith(SAID):
                return line[len(SAID) :]
        self.process.wait()
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        said = f": {last[0][:200]}" if last else ""
        raise UserError(f"{self.arm.name} ended{said}. All it said is in {self.log}.")

    def time(self, count: int) -> List[float]:
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return json.loads(self.read())


def compare(args: argparse.Namespace, arms: List[Arm], results: Results) -> None:
    """Asks the arms in turn.

    Raises:
        UserError: An arm ended, or arms make another number of soft tokens.
    """
    asked: List[Asked] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        write_checkpoint(model, args.shape, weights=False)
        try:
            for arm in arms:
                log = args.logs / f"{args.name}-{arm.name.replace(' ', '-')}.log"
                asked.append(Asked(arm, model, args, log))
                asked[-1].read()
            for count in args.pictures:
                made: Dict[str, int] = {}
                samples: Dict[str, List[float]] = {arm.name: [] for arm in arms}
                turns = tqdm(range(args.repeats), desc=f"{count} pictures", unit="turn")
                for _ in turns:
                    for one in asked:
                        tokens, took = one.time(count)
                        made[one.arm.name] = tokens
                        samples[one.arm.name].append(took)
                if len(set(made.values())) > 1:
                    said = ", ".join(f"{k} {v}" for k, v in made.items())
                    raise UserError(f"The arms make other soft tokens: {said}.")
                case = {"pictures": count, "soft tokens": tokens}
                for name, times in samples.items():
                    results.add(case, name, "vision tower", "ms", times)
        finally:
            for one in asked:
                stop(one.process)


def arguments(parser) -> None:
    parser.add_result("vision")
    parser.add_arms("fork")
    parser.add_logs()
    parser.add_shape()
    parser.add_picture_size()
    sentence = "How many pictures a request has."
    parser.add("--pictures", sentence, COUNTS, type=positive, nargs="+")
    parser.add("--repeats", "How many turns each arm takes.", 11)


def run(args: argparse.Namespace) -> None:
    path = new_result_path(args)
    check_shapes("--shape", [args.shape])
    args.logs = args.logs.resolve()
    args.logs.mkdir(parents=True, exist_ok=True)
    arms = chosen_arms(args)
    results = Results.start(
        *("kernels", args.name, "The vision tower"),
        shape=args.shape,
        height=args.height,
        width=args.width,
        arms=described(arms),
    )
    compare(args, arms, results)
    print(f"wrote {results.save(path)}\n\n{table(results, 'vision tower')}")
