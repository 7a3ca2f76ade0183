"""Plans the KV pools of a hybrid sliding-window model: how many requests fit in each.

    python -m gemma4 pools plan 26b-a4b --kv-memory 74.38GB
    python -m gemma4 pools plan 31b --kv-memory 57GB --ratio 0.05:1.0:0.05 \\
        --plot pictures --json pools.json
    python -m gemma4 pools plan /models/gemma-4-26B-A4B-it --requests 160

The model is a folder or a shape of the checkpoint factory. Pool sizes are the server's: the
folder goes through its argument parser and its pool configurator, so environment
variables count here as they do there. Without --kv-memory it plans for the GPU here.

Exit status: 0 if the load fits, 1 if it does not, 2 if it could not be planned.
"""

import argparse
import contextlib
import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Iterator, List

from gemma4.arguments import positive
from gemma4.errors import UserError
from gemma4.pools.output import add_files, keep, show_table
from gemma4.pools.plan import Layout, Load, Plan, PlanError, gpu_kv_bytes, plan
from gemma4.report.results import Results

UNITS = {"": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}
UNITS.update({f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)})


@contextlib.contextmanager
def model_folder(model: str) -> Iterator[str]:
    """Yields the folder itself, or one written for the shape of that name."""
    from gemma4.checkpoint import SHAPES, write_checkpoint

    if model in SHAPES:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / model
            write_checkpoint(folder, model, weights=False)
            yield str(folder)
    elif (Path(model) / "config.json").is_file():
        yield model
    else:
        raise PlanError(
            f"{model} is neither a folder with a config.json nor one of the shapes "
            f"{', '.join(SHAPES)}."
        )


def memory(text: str) -> int:
    """Bytes from a figure such as 74.4GB or 69GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)?", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no amount of memory; write it like 74.4GB or 69GiB."
        )
    return int(float(match[1]) * UNITS[match[2] or ""])


def ratios(text: str) -> List[float]:
    """One ratio, several with commas, or a range first:last:step."""
    try:
        if ":" in text:
            first, last, step = map(float, text.split(":"))
            count = int((last - first) / step + 1e-6) + 1
            values = [round(first + i * step, 6) for i in range(count)]
        else:
            values = [float(x) for x in text.split(",")]
    except (ValueError, ZeroDivisionError):
        values = []
    if not values or not all(0 < x <= 1 for x in values):
        raise argparse.ArgumentTypeError(
            f"{text!r} gives no ratios in (0, 1]; write 0.15, or 0.1,0.2, or 0.05:1:0.05."
        )
    return values


def show(plans: List[Plan], load: Load, kv_bytes: int) -> None:
    first = plans[0]
    title = (
        f"{kv_bytes / 1e9:.2f} GB for the KV cache; a token takes "
        f"{first.full_bytes_per_token:,} bytes in the full and "
        f"{first.swa_bytes_per_token:,} in the SWA pool\n"
        f"requests of {load.input_len:,} tokens in, {load.output_len:,} out hold "
        f"{first.full_tokens_per_request:,} full and up to "
        f"{first.swa_tokens_per_request:,} SWA tokens"
    )
    names = ["ratio", "full tokens", "SWA tokens", "fit in full", "fit in SWA", "fit"]
    rows = []
    for p in plans:
        numbers = p.full_tokens, p.swa_tokens, p.full_requests, p.swa_requests
        cells = [f"{x:,}" for x in (*numbers, p.requests)]
        rows.append([f"{p.ratio:g}", *cells, p.binds])
    show_table(title, [*names, "binds"], rows)


def to_results(
    plans: List[Plan], load: Load, name: str, kv_bytes: int, model: str
) -> Results:
    """The plans as a result file: tokens and requests of both pools at each ratio."""
    first = plans[0]
    results = Results.start(
        "pools",
        name,
        f"{Path(model).name}, {load.input_len}/{load.output_len}",
        model=Path(model).name,
        kv_bytes=kv_bytes,
        load=dataclasses.asdict(load),
        full_bytes_per_token=first.full_bytes_per_token,
        swa_bytes_per_token=first.swa_bytes_per_token,
        full_tokens_per_request=first.full_tokens_per_request,
        swa_tokens_per_request=first.swa_tokens_per_request,
        swa_tokens_prefilling=first.swa_tokens_prefilling,
    )
    for p in plans:
        case = {"ratio": p.ratio}
        results.add(case, "full", "tokens", "tokens", [p.full_tokens])
        results.add(case, "SWA", "tokens", "tokens", [p.swa_tokens])
        results.add(case, "full", "requests", "at once", [p.full_requests])
        results.add(case, "SWA", "requests", "at once", [p.swa_requests])
    return results


def arguments(parser) -> None:
    parser.add("model", "A model's folder, or a shape such as 26b-a4b.")
    parser.add("--kv-memory", "For both pools, such as 74.4GB or 69GiB.", type=memory)
    sentence = "The share of the GPU here, where --kv-memory is not given."
    parser.add("--mem-fraction-static", sentence, 0.85)
    sentence = "0.15, or 0.1,0.2, or 0.05:1:0.05 (default: the server's own)."
    parser.add("--ratio", sentence, type=ratios)
    parser.add("--input-len", "The tokens of a prompt.", 8000)
    parser.add("--output-len", "The tokens of an answer.", 1000)
    parser.add("--requests", "How many requests have to fit.", type=positive)
    parser.add("--page-size", "The server's --page-size.", Layout.page_size)
    parser.add("--tp-size", "The server's --tp-size.", Layout.tp_size)
    sentence, chunk = (
        "The server's --chunked-prefill-size.",
        Layout.chunked_prefill_size,
    )
    parser.add("--chunked-prefill-size", sentence, chunk)
    sentence = "The server's --speculative-num-draft-tokens."
    parser.add("--draft-tokens", sentence, Layout.draft_tokens, type=int)
    kinds = ("auto", "fp8_e4m3", "fp8_e5m2")
    parser.add("--kv-cache-dtype", "The server's own.", "auto", choices=kinds)
    add_files(parser)


def run(args: argparse.Namespace) -> int:
    load = Load(args.input_len, args.output_len, args.requests)
    layout = Layout(**{f.name: vars(args)[f.name] for f in dataclasses.fields(Layout)})
    try:
        with model_folder(args.model) as folder:
            kv_bytes = args.kv_memory or gpu_kv_bytes(
                folder, args.mem_fraction_static, args.tp_size
            )
            plans = [
                plan(folder, kv_bytes, ratio, load, layout)
                for ratio in args.ratio or [None]
            ]
    except PlanError as e:
        raise UserError(str(e), 2) from None

    show(plans, load, kv_bytes)
    keep(
        args,
        "kv-pools",
        lambda name: to_results(plans, load, name, kv_bytes, args.model),
    )
    best = max(plans, key=lambda p: p.requests)
    wanted = load.num_requests or 1
    if best.requests < wanted:
        print(
            f"The load does not fit: {best.requests} of {wanted} "
            f"request{'s' if wanted > 1 else ''} at ratio {best.ratio:g}, where the "
            f"{best.binds} pool binds."
        )
        return 1
    if len(plans) > 1:
        print(f"Most requests fit at ratio {best.ratio:g}: {best.requests}.")
    return 0
