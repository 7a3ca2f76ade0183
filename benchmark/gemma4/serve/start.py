"""Times starts of servers, and the first requests after them.

    python -m gemma4 start --arms base,fork
    python -m gemma4 start --arms base,fork --cold --repeats 1

A server is started as a user starts it: what it answers by itself before it is ready
belongs to the start. Then requests of so many tokens come one after the other, the
longest first; none has a token in common with another, and each is answered with one.
With --cold each start finds no kernels that another has compiled: its home is an empty
folder. `--shape tiny` runs on a CPU, to try the program.
"""

import argparse
import tempfile
import time
from pathlib import Path

from gemma4.arguments import check_shapes, new_result_path, positive
from gemma4.checkpoint import FIRST_TEXT_TOKEN, write_checkpoint
from gemma4.engines.arms import Arm, chosen_arms, described
from gemma4.engines.host import check_port
from gemma4.engines.servers import ArmServer, Setup
from gemma4.report.results import Results
from gemma4.report.tables import table
from gemma4.serve.run import START, record_start
from tqdm import tqdm

TIME = "time of a request"
REQUESTS = ("first", "second", "third")


def measure(args: argparse.Namespace, arm: Arm, setup: Setup, results: Results) -> None:
    """One start of an arm's server.

    Raises:
        UserError: It died, was not ready in time, or refused a request.
    """
    log = args.logs / f"{args.name}-{arm.name.replace(' ', '-')}.server.log"
    server = ArmServer(arm, setup, log)
    with tempfile.TemporaryDirectory() as home:
        if args.cold:
            server.env["HOME"] = home
            for name in ("SGLANG_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
                server.env.pop(name, None)
        with server.running(args.start_timeout):
            record_start(results, {"load": START}, server)
            for i, tokens in enumerate(sorted(args.tokens, reverse=True)):
                for j, which in enumerate(REQUESTS):
                    token = FIRST_TEXT_TOKEN + i * len(REQUESTS) + j
                    data = {"input_ids": [token] * tokens}
                    data["sampling_params"] = {"max_new_tokens": 1, "temperature": 0}
                    start = time.perf_counter()
                    server.answer("/generate", data)
                    took = 1000 * (time.perf_counter() - start)
                    case = {"tokens": tokens, "request": which}
                    results.append(case, arm.name, TIME, "ms", round(took, 3))


def arguments(parser) -> None:
    parser.add_result("start")
    parser.add_arms("base,fork")
    parser.add_servers(flags=False)
    parser.add_shape()
    sentence = "How many tokens the requests have."
    parser.add("--tokens", sentence, (8000, 1000), type=positive, nargs="+")
    parser.add("--repeats", "How often each arm is started.", 3)
    sentence = "Starts each server without any compiled kernel."
    parser.add("--cold", sentence, action="store_true")


def run(args: argparse.Namespace) -> None:
    path = new_result_path(args)
    check_shapes("--shape", [args.shape])
    check_port(args.port)
    args.logs = args.logs.resolve()
    arms = chosen_arms(args)
    kind = "Cold starts" if args.cold else "Starts"
    results = Results.start(
        *("serving", args.name, f"{kind}, and the first requests"),
        shape=args.shape,
        arms=described(arms),
    )
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        write_checkpoint(model, args.shape, weights=False)
        setup = Setup(model, args.port, context=max(args.tokens) + 512, warm=True)
        turns = [arm for _ in range(args.repeats) for arm in arms]
        for arm in tqdm(turns, unit="start"):
            measure(args, arm, setup, results)
            results.save(path)
    print(f"wrote {path}")
    for metric in ("start-up", "CUDA graph memory", TIME):
        if any(results.select(metric=metric)):
            print(f"\n{table(results, metric, against=results.arms()[0])}")
