"""Serves Gemma 4 with several arms in turn and sends each the same loads.

    python -m gemma4 serve --name serving-h200
    python -m gemma4 serve --arms base,fork --loads chat,stream --mtp off,2.75
    python -m gemma4 serve --arms fork --upto text-only --arm "ratio=--swa-full-tokens-ratio 0.8"
    python -m gemma4 serve --arm vllm@/opt/vllm/bin/python --arms fork
    python -m gemma4 serve --shape tiny --loads chat --arms base,fork

An arm is `base`, `fork`, `base+NAME`, NAME=FLAGS or NAME@WHERE=FLAGS, as engines/arms.py
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
random ones; engines/plugin/ says how, the same for each arm.
"""

import argparse
from typing import List

from gemma4.arguments import check_shapes, listed, positive, result_path
from gemma4.engines.arms import CPU_BLOCKERS, Arm, chosen_arms, described
from gemma4.engines.host import check_port, has_gpu
from gemma4.engines.models import has_weights, prepare_model
from gemma4.engines.servers import DRAFTED
from gemma4.errors import UserError
from gemma4.report.results import Results, resume
from gemma4.report.tables import table
from gemma4.serve.loads import BURST, LOADS, WARMUP, chosen_loads, named_load
from gemma4.serve.run import OF_START, SUMMARY, Run, longest_context

CLIENT = f"--random-range-ratio 1.0 --warmup-requests {WARMUP} --flush-cache"


def arguments(parser) -> None:
    parser.add_result("serving")
    parser.add_model()
    parser.add_arms("base,fork")
    parser.add_servers()
    parser.add_plot()
    sentence = "Adds the arm base+NAME, the release with the series up to this patch."
    parser.add("--upto", sentence, [], action="append", metavar="NAME")
    sentence = f"Sends these: {', '.join(LOADS)}, or INPUT/OUTPUTxPROMPTS[@AT_ONCE]."
    loads = ["summarization", "chat", "stream", "prefill"]
    parser.add("--loads/--load", sentence, loads, type=_loads, metavar="A,B")
    sentence = "Serves without MTP, or with so many accepted tokens a step."
    parser.add("--mtp", sentence, ["off"], type=_mtp, metavar="A,B")
    parser.add("--repeats", "How many turns each arm takes.", 3)
    parser.add("--seed", "The first load's seed.", 1, type=int)
    sentence = "Sends so many prompts of a load at most, for a large model."
    parser.add("--prompts", sentence, type=positive, metavar="N")
    parser.add("--quick", "Sends small numbers.", action="store_true")
    sentence = "The least context of a request (default: 16384)."
    parser.add("--context", sentence, type=positive)
    sentence = "How many seconds a load may take."
    parser.add("--load-timeout", sentence, 1800.0, metavar="S")


def _loads(text: str) -> List[str]:
    names = listed(text)
    for name in names:
        named_load(name)
    return names


def _mtp(text: str) -> List[str]:
    names = listed(text)
    for name in names:
        if name != "off" and not 1 <= float(name) <= DRAFTED + 1:
            raise ValueError
    return names


def run(args: argparse.Namespace) -> None:
    if not args.model:
        check_shapes("--shape", [args.shape])
    if not has_gpu():
        if args.shape != "tiny" and not args.model:
            raise UserError(
                "This machine has no GPU that torch can use; --shape tiny is what a "
                "CPU serves."
            )
        if args.mtp != ["off"]:
            raise UserError("MTP needs a GPU: leave --mtp off.")
    check_port(args.port)
    args.logs = args.logs.resolve()
    args.context = args.context or (4096 if args.shape == "tiny" else 16384)
    args.chosen = chosen_loads(args)
    title = args.model.name if args.model else args.shape
    real = bool(args.model and has_weights(args.model))
    prepare_model(args, mtp=args.mtp != ["off"])
    args.arm = [f"base+{name}" for name in args.upto] + args.arm
    arms = chosen_arms(args)
    results = prepare_results(args, arms, title, real)
    measured = Run(args, results, arms)
    # Now, rather than after an hour, if it cannot be written.
    results.save(measured.path)
    failures = measured.measure()
    if results.records:
        print(f"\n{summary(results)}\n\nwrote {measured.path}; logs in {measured.logs}")
        if args.plot:
            from gemma4.report.plot import draw_and_name

            draw_and_name(results, args.plot)
    if failures:
        raise UserError(" Also: ".join(failures))


def prepare_results(args, arms: List[Arm], title: str, real: bool) -> Results:
    """The result file to add to: what is there, if it is of the same measurement."""
    weights = "loaded" if has_weights(args.model) else "drawn"
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
    path = result_path(args)
    if not path.exists():
        where = "" if has_gpu() else ", on a CPU"
        kind = "its weights" if real else "random weights"
        title = f"Gemma 4 {title} with {kind}{where}"
        results = Results.start("serving", args.name, title, **settings, arms={})
    else:
        results = resume(path, settings, described(arms))
    results.settings["arms"].update(described(arms))
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
    if f"base+{CPU_BLOCKERS}" in [arm.name for arm in arms]:
        found.append(
            f"base+{CPU_BLOCKERS} is the release with the first patches, "
            "without which it does not serve on a CPU."
        )
    return found


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
