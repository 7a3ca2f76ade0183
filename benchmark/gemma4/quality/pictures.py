"""Compares the answers of several arms to prompts with pictures, with transformers.

    python -m gemma4 pictures --arms fork
    python -m gemma4 pictures --arms base,fork --arm 'fork fa3=--mm-attention-backend fa3'

Small models of the family with random weights answer prompts with pictures through each
arm's server, greedily: of all forms, several, the same twice, at once, behind a cached
prefix, and each more than once. transformers, in float32, then reads prompt and answer
in one pass without a cache. For each kind of prompt: how far the worst logprob is from
transformers', and how many answered tokens are not transformers' first choice.

On a GPU the servers run in bfloat16, and transformers in bfloat16 is compared in the
same way. An arm of this checkout's that is more than three times as far, or that
answers a token which float32 finds clearly less likely than its own choice, has failed,
and the program ends with exit status 1. On a CPU the servers run in float32: no token
may differ, and no logprob by more than 1e-5.
"""

import argparse
import json
import shlex
from pathlib import Path
from typing import Dict, List, Tuple

from gemma4.arguments import check_shapes, new_result_path
from gemma4.checkpoint import write_checkpoint
from gemma4.engines.arms import Arm, chosen_arms, described
from gemma4.engines.host import check_port, has_gpu
from gemma4.engines.servers import ArmServer, Setup
from gemma4.errors import UserError
from gemma4.quality.answers import NOISE
from gemma4.quality.command import finish
from gemma4.quality.picture_answers import Answer, Difference, Reference, ask, judge
from gemma4.quality.picture_cases import cases
from gemma4.report.results import Results
from tqdm import tqdm

POOL_TOKENS = 8192
OTHERS = "not transformers' choice"


def arguments(parser) -> None:
    parser.add_result("pictures")
    parser.add_arms("fork")
    parser.add_servers()
    parser.add("--shapes", "Asks models of these shapes.", ["tiny"], metavar="A,B")
    parser.add("--mtp", "Serves drafts with them.", action="store_true")
    parser.add("--chunk", "The tokens of a chunk of the prefill.", 24)


def run(args: argparse.Namespace) -> int:
    path = new_result_path(args)
    check_shapes("--shapes", args.shapes)
    check_port(args.port)
    args.logs = args.logs.resolve()
    arms = chosen_arms(args)
    results = Results.start(
        *("quality", args.name, "Prompts with pictures, small models"),
        server=args.flags,
        chunk=args.chunk,
        arms=described(arms),
    )
    return finish(results, path, compare(args, arms, results))


def collect(
    arm: Arm, setup: Setup, log: Path, timeout: float, bar
) -> Tuple[dict, dict]:
    """(kind -> answers, kind -> why there are none), of a server started anew where it
    died."""
    answers, silent, left = {}, {}, cases()
    while left:
        server, kind = ArmServer(arm, setup, log), ""
        try:
            with server.running(timeout):
                while left:
                    kind = next(iter(left))
                    asks = left.pop(kind)
                    server.ask("/flush_cache", {})
                    answers[kind] = [a for asked in asks for a in ask(server, asked)]
                    bar.update()
        except UserError as e:
            why = str(e).replace(str(log), log.name)
            if kind:
                silent[kind] = why
            elif arm.path is None:
                raise
            else:  # it does not start
                silent.update(dict.fromkeys(left, why))
                left = {}
            bar.update()
    return answers, silent


def kept(arm: Arm, setup: Setup, log: Path, timeout: float, bar) -> Tuple[dict, dict]:
    """What `collect` says, asked once: of the same code, command and prompts it is
    read from a file beside the log."""
    file = log.with_suffix(".json")
    asked = {kind: [vars(a) for a in asks] for kind, asks in cases().items()}
    what = json.loads(json.dumps([arm.code, setup.command(arm)[1:], asked]))
    if file.exists():
        was, answers, silent = json.loads(file.read_text())
        if was == what:
            bar.update(len(asked))
            return {k: [Answer(**a) for a in of] for k, of in answers.items()}, silent
    answers, silent = collect(arm, setup, log, timeout, bar)
    plain = {kind: [vars(a) for a in of] for kind, of in answers.items()}
    file.write_text(json.dumps([what, plain, silent]))
    return answers, silent


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
                log = folder / f"{shape}-{arm.name.replace(' ', '-')}.server.log"
                given[arm.name], silent = kept(arm, setup, log, args.start_timeout, bar)
                for kind, why in silent.items():
                    results.notes.append(f"{shape}, {arm.name}, {kind}: {why}")
                    if arm.path is None:
                        wrong.append(f"{shape}, {arm.name}: {kind}: {why}")
            bar.set_description(f"{shape}, transformers")
            found = read(model, given, on_gpu, bar)
            for name, differences in found.items():
                for kind, difference in differences.items():
                    case = {"shape": shape, "mtp": args.mtp, "prompts": kind}
                    for metric, unit, value in (
                        ("worst logprob", "nats", difference.apart),
                        (OTHERS, "tokens", difference.others),
                    ):
                        results.add(case, name, metric, unit, [value])
            noise = found.get(NOISE)
            for arm in arms:
                if arm.path is None:
                    said = judge(found[arm.name], noise)
                    wrong += [f"{shape}, {arm.name}: {line}" for line in said]
    return wrong


def read(model: Path, given: Dict[str, dict], on_gpu: bool, bar) -> Dict[str, dict]:
    """Arm -> kind -> difference from float32; on a GPU also what transformers in
    bfloat16 would choose after each token that the last arm answered."""
    exact = Reference(model)
    found = {name: {} for name in given}
    for kind in cases():
        for name, answers in given.items():
            if kind in answers:
                difference = found[name][kind] = Difference()
                for answer in answers[kind]:
                    difference.see(answer, exact.logprobs(answer))
        bar.update()
    if on_gpu:
        rounded, found[NOISE] = Reference(model, "bfloat16"), {}
        for kind, answers in list(given.values())[-1].items():
            difference = found[NOISE][kind] = Difference()
            for answer in answers:
                best, choice = rounded.logprobs(answer).max(dim=-1)
                own = Answer(answer.prompt, choice.tolist(), best.tolist())
                difference.see(own, exact.logprobs(answer))
            bar.update()
    return found
