"""Compares the answers of several arms to prompts with pictures, with transformers.

    python -m gemma4 pictures --arms fork
    python -m gemma4 pictures --arms base,fork --arm 'fork fa3=--mm-attention-backend fa3'

Small models of the family with random weights answer prompts with pictures through each
arm's server, greedily: of all forms, several, the same twice, at once, behind a cached
prefix, and each more than once. transformers, in float32, then reads prompt and answer
in one pass without a cache. For each kind of prompt, and for all: how far the worst
logprob is from transformers', and how many answered tokens are not transformers' first
choice.

On a GPU the servers run in bfloat16, and transformers in bfloat16 is compared in the
same way. An arm of this checkout's that is more than three times as far, or that
answers a token which float32 finds clearly less likely than its own choice, has failed,
and the program ends with exit status 1. On a CPU the servers run in float32: no token
may differ, and no logprob by more than 1e-5.

What the servers answered is kept beside their logs, and can be read on another machine:

    python -m gemma4 pictures --answers fork .cache/logs/pictures/*-fork.server.json
"""

import argparse
import shlex
from pathlib import Path
from typing import Dict, List

from gemma4.arguments import check_shapes, new_result_path
from gemma4.checkpoint import write_checkpoint
from gemma4.engines.arms import Arm, chosen_arms, described
from gemma4.engines.host import check_port, has_gpu
from gemma4.engines.servers import Setup
from gemma4.quality.answers import NOISE
from gemma4.quality.command import finish
from gemma4.quality.picture_answers import Answer, Difference, Reference, judge
from gemma4.quality.picture_cases import cases
from gemma4.quality.picture_kept import LOG, kept, load_all
from gemma4.report.results import Results
from tqdm import tqdm

POOL_TOKENS = 8192
APART, OTHERS = "worst logprob", "not transformers' choice"
TOKENS = "answered tokens"
ALL = "all"


def arguments(parser) -> None:
    parser.add_result("pictures")
    parser.add_arms("fork")
    parser.add_servers()
    parser.add("--shapes", "Asks models of these shapes.", ["tiny"], metavar="A,B")
    parser.add("--mtp", "Serves drafts with them.", action="store_true")
    parser.add("--chunk", "The tokens of a chunk of the prefill.", 24)
    sentence = (
        "Asks no server: reads these kept answers as that arm's; once for each arm. An "
        "arm that is not the fork's has a name that begins with base."
    )
    files = dict(nargs="+", action="append", metavar=("ARM", "FILE"))
    parser.add("--answers", sentence, [], **files)


def run(args: argparse.Namespace) -> int:
    path = new_result_path(args)
    check_shapes("--shapes", args.shapes)
    args.logs = args.logs.resolve()
    results = Results.start(
        *("quality", args.name, "Prompts with pictures, small models")
    )
    if args.answers:
        return finish(results, path, compare_kept(args, results))
    check_port(args.port)
    arms = chosen_arms(args)
    results.settings = {
        "server": args.flags,
        "chunk": args.chunk,
        "arms": described(arms),
    }
    return finish(results, path, compare(args, arms, results))


def compare(args, arms: List[Arm], results: Results) -> List[str]:
    """Asks each arm; returns what is wrong with the fork's."""
    wrong: List[str] = []
    folder = args.logs / args.name
    on_gpu = has_gpu()
    dtype = "bfloat16" if on_gpu else "float32"
    flags = [*("--dtype", dtype, "--max-total-tokens", str(POOL_TOKENS))]
    flags += ["--chunked-prefill-size", str(args.chunk), *shlex.split(args.flags)]
    total = len(args.shapes) * (len(arms) + on_gpu + 1) * len(cases())
    with tqdm(total=total, unit="kind", disable=None) as bar:
        for shape in args.shapes:
            model, draft = folder / shape, None
            write_checkpoint(model, shape, dtype=dtype, overwrite=True)
            if args.mtp:
                draft = folder / f"{shape}-draft"
                write_checkpoint(
                    draft, shape, assistant=True, dtype=dtype, overwrite=True
                )
            setup = Setup(model, args.port, context=4096, draft=draft, requests=8)
            setup.flags = flags
            given = {}
            for arm in arms:
                bar.set_description(f"{shape}, {arm.name}")
                log = folder / f"{shape}-{arm.name.replace(' ', '-')}{LOG}"
                given[arm.name], silent = kept(arm, setup, log, args.start_timeout, bar)
                for kind, why in silent.items():
                    results.notes.append(f"{shape}, {arm.name}, {kind}: {why}")
                    if arm.path is None:
                        wrong.append(f"{shape}, {arm.name}: {kind}: {why}")
            bar.set_description(f"{shape}, transformers")
            found = read(model, given, on_gpu, bar)
            record(results, {"shape": shape, "mtp": args.mtp}, found)
            wrong += judge_all(shape, found, [a.name for a in arms if a.path is None])
    return wrong


def compare_kept(args, results: Results) -> List[str]:
    """Reads answers of earlier runs; returns what is wrong with those of arms that are
    not called base."""
    given = load_all(args.answers)
    wrong, settings, folder = [], {}, args.logs / args.name
    with tqdm(total=2 * len(given) * len(cases()), unit="kind", disable=None) as bar:
        for shape, arms in given.items():
            bar.set_description(shape)
            dtype = next(iter(arms.values())).dtype
            write_checkpoint(folder / shape, shape, dtype=dtype, overwrite=True)
            answers = {name: was.answers for name, was in arms.items()}
            found = read(folder / shape, answers, dtype != "float32", bar)
            record(results, {"shape": shape}, found)
            mine = [name for name in arms if not name.startswith("base")]
            for name, was in arms.items():
                settings[f"{shape}, {name}"] = was.describe()
                for kind, why in was.silent.items():
                    results.notes.append(f"{shape}, {name}, {kind}: {why}")
                    if name in mine:
                        wrong.append(f"{shape}, {name}: {kind}: {why}")
            wrong += judge_all(shape, found, mine)
    results.settings = {"arms": settings}
    return wrong


def record(results: Results, case: dict, found: Dict[str, dict]) -> None:
    """Adds each kind of prompt that an arm answered, and all of them."""
    rows = {(name, k): d for name, of in found.items() for k, d in of.items()}
    rows.update({(n, ALL): Difference.of_all(of.values()) for n, of in found.items()})
    for (name, kind), difference in rows.items():
        for metric, unit, value in (
            (APART, "nats", difference.apart),
            (OTHERS, "tokens", difference.others),
            (TOKENS, "tokens", difference.tokens),
        ):
            if difference.tokens:
                results.add({**case, "prompts": kind}, name, metric, unit, [value])


def judge_all(shape: str, found: Dict[str, dict], arms: List[str]) -> List[str]:
    """What is wrong with these arms, in words."""
    return [
        f"{shape}, {name}: {line}"
        for name in arms
        for line in judge(found[name], found.get(NOISE))
    ]


def read(model: Path, given: Dict[str, dict], rounded: bool, bar) -> Dict[str, dict]:
    """Arm -> kind -> difference from float32; if the answers are `rounded`, also what
    transformers in bfloat16 would choose after each token that the last arm answered
    that has answers of the kind."""
    exact = Reference(model)
    found = {name: {} for name in given}
    for kind in cases():
        for name, answers in given.items():
            if kind in answers:
                difference = found[name][kind] = Difference()
                for answer in answers[kind]:
                    difference.see(answer, exact.logprobs(answer))
        bar.update()
    if rounded:
        noisy, found[NOISE] = Reference(model, "bfloat16"), {}
        last = {kind: of for answers in given.values() for kind, of in answers.items()}
        for kind, answers in last.items():
            difference = found[NOISE][kind] = Difference()
            for answer in answers:
                best, choice = noisy.logprobs(answer).max(dim=-1)
                own = Answer(answer.prompt, choice.tolist(), best.tolist())
                difference.see(own, exact.logprobs(answer))
            bar.update()
    return found
