"""Compares the answers of several arms: of a small trained Gemma-4 MoE, and on MMLU.

    python -m gemma4 train .cache/gemma-4-trained
    python -m gemma4 quality --arms base,fork
    python -m gemma4 quality --wrong window,experts,pools
    python -m gemma4 quality --model /models/gemma-4-26B-A4B-it --mmlu mmlu.csv

The trained model (tasks.py says on which tasks) answers through each arm's server,
all prompts at once, greedily. transformers, in float32, then reads prompt and answer in
one pass without a cache. For each task: how many tokens are right, how many are
transformers' own first choice, and how far the logprobs are from transformers'.
transformers in bfloat16 is compared in the same way: an arm whose logprobs are more
than three times as far, or which answers a token that float32 finds clearly less
likely than its own choice, has failed, and the program ends with exit status 1.

`--wrong` adds arms that are wrong on purpose, to show that they fail: a window that is
one token too wide or too narrow, a router that drops the last of the chosen experts,
and pools whose sliding part is too small for the window.

MMLU: 500 questions, seed 0, temperature 0, in a prompt of our own. The file is
simple-evals' mmlu.csv with columns Question, A, B, C, D, Answer and Subject; nothing is
downloaded. It needs a checkpoint with weights.
"""

import argparse
import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import Dict, List

from gemma4.arguments import new_result_path
from gemma4.engines.arms import Arm, chosen_arms, described
from gemma4.engines.host import CACHE, check_port
from gemma4.engines.models import check_model, has_weights
from gemma4.engines.servers import ArmServer, Setup
from gemma4.errors import UserError
from gemma4.quality import mmlu
from gemma4.quality.answers import (
    NOISE,
    REFERENCE,
    VALUES,
    Answer,
    Reference,
    ask,
    differ,
    judge,
    prompts,
    record,
)
from gemma4.quality.wrong import wrong_arms
from gemma4.report.results import Results
from gemma4.report.tables import table
from tqdm import tqdm

CONTEXT = 6144


def arguments(parser) -> None:
    parser.add_result("quality")
    parser.add_arms("base,fork")
    parser.add_servers()
    model = CACHE / "gemma-4-trained"
    parser.add("--model", "The checkpoint that is asked.", model, type=Path)
    sentence = "Adds arms that are wrong on purpose: window, experts, pools."
    parser.add("--wrong", sentence, [], metavar="A,B")
    parser.add("--prompts", "How many prompts of each kind.", 4)
    sentence = "Asks these questions instead."
    parser.add("--mmlu", sentence, type=Path, metavar="CSV")


def run(args: argparse.Namespace) -> int:
    path = new_result_path(args)
    if not args.mmlu and not (args.model / "config.json").exists():
        raise UserError(
            f"{args.model} is not there: `python -m gemma4 train {args.model}` trains it."
        )
    check_model(args.model)
    check_port(args.port)
    if not has_weights(args.model):
        raise UserError(f"--model {args.model} has no weights to ask.")
    if args.mmlu and not args.mmlu.is_file():
        raise UserError(
            f"--mmlu {args.mmlu} is not there: it is simple-evals' mmlu.csv."
        )
    args.model, args.logs = args.model.resolve(), args.logs.resolve()
    arms = chosen_arms(args)
    results = Results.start(
        *("quality", args.name, "MMLU" if args.mmlu else "A small trained Gemma-4 MoE"),
        model=args.model.name,
        server=args.flags,
        arms=described(arms),
    )
    failed = (mmlu.compare if args.mmlu else compare)(args, arms, results)
    return finish(results, path, failed)


def finish(results: Results, path: Path, failed: List[str]) -> int:
    """Shows and saves a result; returns the exit status, 1 where an arm has failed."""
    for metric in dict.fromkeys(r.metric for r in results.records):
        print(f"\n{table(results, metric)}")
    print(f"\nwrote {results.save(path)}")
    for note in results.notes:
        print(note)
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


def compare(args, arms: List[Arm], results: Results) -> List[str]:
    """Asks the trained model; returns what is wrong with any arm that should be right."""
    asked = prompts(args.prompts)
    folder = args.logs / args.name
    served = [(arm, args.model, []) for arm in arms]
    for title, (model, flags) in wrong_arms(args.wrong, args.model, folder).items():
        wrong = dataclasses.replace(arms[-1], name=f"wrong: {title}")
        served.append((wrong, model, flags))
    answers: Dict[str, List[Answer]] = {}
    silent: Dict[str, str] = {}
    slowest = 0.0
    with tqdm(total=len(served) + 2, unit="arm", disable=None) as bar:
        for arm, model, flags in served:
            bar.set_description(arm.name)
            setup = Setup(
                *(model, args.port),
                context=CONTEXT,
                flags=[*shlex.split(args.flags), *flags],
            )
            log = folder / f"{arm.name.replace(' ', '-')}.server.log"
            server = ArmServer(arm, setup, log)
            # One that is wrong may never answer; it gets the time that others took.
            begin, wrong = time.monotonic(), arm.name.startswith("wrong: ")
            timeout = 60 + 3 * slowest if wrong and slowest else 900
            with server.running(args.start_timeout):
                try:
                    answers[arm.name] = ask(server, asked, timeout)
                except UserError as e:
                    if not wrong:
                        raise
                    silent[arm.name] = str(e)
            slowest = max(slowest, 0 if wrong else time.monotonic() - begin)
            bar.update()
        bar.set_description(REFERENCE)
        reference = Reference(args.model)
        found = {
            name: [
                differ(p, a, reference.logprobs(p.tokens, a.tokens))
                for p, a in zip(asked, given)
            ]
            for name, given in answers.items()
        }
        bar.update()
        bar.set_description(NOISE)
        rounded = Reference(args.model, "bfloat16")
        answers[NOISE], found[NOISE] = [], []
        for p in asked:
            logprobs = rounded.logprobs(p.tokens, p.answer)
            best, choice = logprobs.max(dim=-1)
            answer = Answer(p.answer, logprobs[:, VALUES].tolist())
            answers[NOISE].append(answer)
            exact = reference.logprobs(p.tokens, p.answer)
            difference = differ(p, answer, exact)
            difference.right = [a == b for a, b in zip(choice.tolist(), p.answer)]
            own = exact.max(dim=-1)[1].tolist()
            difference.chosen = [a == b for a, b in zip(choice.tolist(), own)]
            found[NOISE].append(difference)
        bar.update()
    failed = []
    for name, differences in found.items():
        record(results, name, asked, differences)
        said = judge(name, asked, answers[name], differences, found[NOISE])
        if name.startswith("wrong: "):
            print(f"{name}: {'caught: ' + said[0] if said else 'NOT caught'}")
            failed += [] if said else [f"{name} was not caught"]
        elif name != NOISE:
            failed += said
    for name, said in silent.items():
        print(f"{name}: caught: {said}")
        results.notes.append(f"{name} did not answer at all.")
    return failed
