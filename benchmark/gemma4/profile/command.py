"""Shows where the GPU time of one prefill and one decode step goes, arm beside arm.

    python -m gemma4 profile --name step-h200 --plot docs/img
    python -m gemma4 profile --arms fork --requests 1 --steps decode

For each arm (see engines/arms.py) a server is started; torch.profiler records, through its
/start_profile, the kernels of one prompt's prefill, and those of a few decode steps
while 1, 8 and 80 requests decode; with --mtp a step verifies, accepts and drafts. Each
instant of a step goes to the group of the kernel that runs then, or to `gaps` where
none does, so that the groups add up to the step. A decode step lasts from the first
kernel of one step's first attention to that of the next; a prefill from its first
kernel to its sampled token.

The same --name again adds the arms and steps that it lacks. vLLM's profiler records the
CPU's side as well, which lengthens its gaps: how long a step takes without a profiler
stands beside each.

trace.py says how a kernel's group is found. `--trace FILE` groups a trace that is there
already.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import List

from gemma4.arguments import check_shapes, new_result_path, positive, result_path
from gemma4.engines.arms import chosen_arms
from gemma4.engines.host import check_port, has_gpu
from gemma4.engines.models import prepare_model
from gemma4.engines.servers import ArmServer, Setup
from gemma4.errors import UserError
from gemma4.profile.floors import BYTES, add_floors
from gemma4.profile.live import (
    Profiler,
    Requests,
    decode_title,
    flush,
    profile_decode,
    profile_prefill,
)
from gemma4.profile.trace import GROUPS, TraceError, measured, read_trace
from gemma4.report.results import Results, resume
from gemma4.report.tables import table
from tqdm import tqdm


def arguments(parser) -> None:
    parser.add_result("step")
    parser.add_model()
    parser.add_arms("base,fork")
    parser.add_servers()
    parser.add_plot()
    steps = ["prefill", "decode"]
    parser.add("--steps", "Profiles these steps.", steps, metavar="A,B")
    sentence = "How many requests decode at once."
    parser.add("--requests", sentence, (1, 8, 80), type=positive, nargs="+")
    parser.add("--input", "The tokens of the prompt that is prefilled.", 8000)
    sentence = "The tokens of the prompt of a request that decodes."
    parser.add("--context-tokens", sentence, 1000)
    parser.add("--output", "The tokens of its answer at most.", 400)
    parser.add("--mtp", "Serves without MTP, or so many accepted tokens a step.", "off")
    parser.add("--top", "How many kernels are printed.", 15)
    parser.add("--context", "The context that servers are started with.", 16384)
    parser.add("--trace", "Groups this trace instead of serving.", type=Path)


def run(args: argparse.Namespace) -> None:
    path = new_result_path(args) if args.trace else result_path(args)
    if not has_gpu() and not args.trace:
        raise UserError(
            "This machine has no GPU that torch can use, and a step's time is that of "
            "a GPU's kernels; --trace groups a trace that is there."
        )
    if not args.model:
        check_shapes("--shape", [args.shape])
    prepare_model(args, mtp=args.mtp != "off")
    layers = layer_types(args.model)
    results = prepare_results(args, path)
    if args.trace:
        decode = "prefill" not in args.steps
        step = "decode" if decode else "prefill"
        found = measured(read_trace(args.trace), layers, decode)
        record(results, args.trace.name, step, found, 0.0)
    else:
        profile(args, layers, results, path)
    for step in dict.fromkeys(r.case["step"] for r in results.records):
        print(show(results, step, args.top))
    print(f"\nwrote {results.save(path)}")
    if args.plot:
        from gemma4.report.plot import draw_and_name

        draw_and_name(results, args.plot)


def layer_types(model: Path) -> List[str]:
    config = json.loads((model / "config.json").read_text())
    return config.get("text_config", config)["layer_types"]


def prepare_results(args: argparse.Namespace, path: Path) -> Results:
    """The result file, or what is there of the same measurement, to add arms to."""
    settings = {
        "model": args.model.name,
        "mtp": args.mtp,
        "server": args.flags,
        "context": args.context,
        "context tokens": args.context_tokens,
    }
    if not path.exists():
        title = "Where a step's time goes"
        return Results.start(
            *("kernels", args.name, title), **settings, stacked="group", arms={}
        )
    return resume(path, settings, {})


def profile(args, layers: List[str], results: Results, path: Path) -> None:
    check_port(args.port)
    args.logs = args.logs.resolve()
    arms = chosen_arms(args)
    for arm in arms:
        known = results.settings["arms"].get(arm.name)
        if known and known["code_sha256"] != arm.code:
            raise UserError(
                f"{path} holds the arm {arm.name} with other code: give another --name."
            )
    on = args.mtp != "off"
    setup = Setup(
        *(args.model, args.port),
        context=args.context,
        draft=args.draft if on else None,
        accepted=float(args.mtp) if on else 0.0,
        requests=max(args.requests),
        flags=shlex.split(args.flags),
    )
    kinds = ["prefill"] * ("prefill" in args.steps)
    kinds += [count for count in args.requests] if "decode" in args.steps else []
    title = {kind: decode_title(kind) for kind in kinds if kind != "prefill"}
    title["prefill"] = f"prefill, {args.input} tokens"
    with tqdm(total=len(arms) * (1 + len(kinds)), unit="step", disable=None) as bar:
        for arm in arms:
            missing = [
                kind
                for kind in kinds
                if results.get({"step": title[kind]}, arm.name, "step") is None
            ]
            bar.update(len(kinds) - len(missing))
            if not missing:
                bar.update()
                continue
            bar.set_description(f"{arm.name}: starting")
            stem = args.logs / args.name / arm.name
            own = dataclasses.replace(
                setup, profiles=stem if arm.engine == "vllm" else None
            )
            server = ArmServer(arm, own, stem.with_name(f"{arm.name}.server.log"))
            with server.running(args.start_timeout):
                tqdm.write(f"{arm.name}: up in {server.seconds:.0f} s")
                bar.update()
                profiler = Profiler(server, stem)
                # Builds the kernels, and starts what the profiler starts once.
                profiler.record("warm-up", Requests(server, 2, 100, 32, 0).wait)
                flush(server)
                for kind in missing:
                    bar.set_description(f"{arm.name}: {kind}")
                    try:
                        step = title[kind]
                        if kind == "prefill":
                            kernels, alone = profile_prefill(server, profiler, args)
                        else:
                            kernels, alone = profile_decode(
                                server, profiler, args, kind
                            )
                        found = measured(kernels, layers, kind != "prefill")
                        record(results, arm.name, step, found, alone)
                        results.settings["arms"][arm.name] = arm.describe()
                    except TraceError as e:
                        print(f"{arm.name}, {kind}: {e}", file=sys.stderr)
                    results.save(path)
                    bar.update()
    if "decode" in args.steps and not on:
        add_floors(args, results)


def record(results: Results, arm: str, step: str, found, undisturbed: float) -> None:
    groups, kernels, count = found
    for group in GROUPS:
        samples = [round(one[group] / 1e3, 5) for one in groups]
        if any(samples):
            results.add({"step": step, "group": group}, arm, "time", "ms", samples)
    totals = [round(sum(one.values()) / 1e3, 5) for one in groups]
    results.add({"step": step}, arm, "step", "ms", totals)
    if undisturbed:
        results.add(
            {"step": step}, arm, "without profiler", "ms", [round(1e3 * undisturbed, 4)]
        )
    for name, (launches, us) in sorted(kernels.items(), key=lambda k: -k[1][1])[:40]:
        case = {"step": step, "kernel": name}
        results.add(case, arm, "kernel time", "us a step", [round(us, 2)])
        results.add(case, arm, "launches", "a step", [round(launches, 2)])
    launched = sum(launches for launches, _ in kernels.values())
    results.add({"step": step}, arm, "kernels", "a step", [round(launched, 1)])


def show(results: Results, step: str, top: int) -> str:
    arms = [arm for arm in results.arms() if arm != BYTES]
    against = arms[0] if len(arms) > 1 else None
    parts = [table(results, "time", against, step=step)]
    for arm in arms:
        total = results.get({"step": step}, arm, "step")
        if total is None:
            continue
        said = f"{arm}: a step of {total.median:.3f} ms"
        alone = results.get({"step": step}, arm, "without profiler")
        if alone:
            said += f" ({alone.median:.3f} ms without the profiler)"
        parts.append(said)
        lines = [f"{'us a step':>10} {'launches':>9} {'mean us':>8}  kernel"]
        records = list(results.select(arm, "kernel time", step=step))[:top]
        for record in records:
            launches = results.get(record.case, arm, "launches").median
            us = record.median
            lines.append(
                f"{us:10.1f} {launches:9.1f} {us / launches:8.2f}  {record.case['kernel']}"
            )
        parts.append("\n".join(lines))
    return f"\n{step}\n\n" + "\n\n".join(parts)
