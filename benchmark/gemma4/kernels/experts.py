"""Tunes the tiles of SGLang's fused experts for this GPU, and measures what they give.

    python -m gemma4 kernel experts --name experts-h200
    python -m gemma4 kernel experts --name experts-h200 --check DIR

The defaults are Gemma-4-26B-A4B's experts in bfloat16 and take some minutes on one GPU.
The files that SGLang reads are written below `--configs`: point SGLANG_MOE_CONFIG_DIR
there to serve with them, or copy them beside its own. What was timed is kept in
`--configs` too, so that a run which was stopped goes on where it was; `--check DIR` only
measures the files of an earlier run, or of several. SGLang's own files, of whatever
Triton they are, take part.

The kernel is the one that serves, called as it is served. Its tiles are timed for each
projection alone, in CUDA graphs, under even and under skewed routing; several routings
take turns, so that the weights of few tokens come from memory and not from the L2 cache.
Four steps: every tile that the registers and the shared memory hold; the orders of the
grid and the descriptor loads (TMA) of the best; whole layers with the best pairs; and
whole layers beside the default tiles, for the keys and what lies between them.
"""

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Callable, ContextManager, Dict, List

from gemma4.arguments import positive
from gemma4.errors import UserError
from gemma4.kernels.launches import (
    ROUTINGS,
    layer_calls,
    random_weights,
    start_layers,
    start_sglang,
    tiles_from,
    tiles_of,
)
from gemma4.kernels.runner import Run
from gemma4.kernels.tiles import DOWN, DTYPES, GATE_UP, Layer
from gemma4.kernels.timing import capture, replays_in_turn
from gemma4.kernels.tuner import Tuner, tune

TITLE, SAMPLES = "Experts of a layer", 11
KEYS = (
    *(1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048),
    *(3072, 4096, 6144, 8192, 16384),
)


def arguments(parser) -> None:
    sentence = "The folder that gets the files of tiles."
    parser.add("--configs", sentence, Path("tuned"), type=Path)
    sentence = "Searches nothing, and measures the files of these folders."
    parser.add("--check", sentence, type=Path, nargs="+", metavar="DIR")
    parser.add("--experts", "How many experts there are.", 128)
    parser.add("--width", "The width of an expert on one GPU.", 704)
    parser.add("--hidden", "The width of the model.", 2816)
    parser.add("--topk", "How many experts a token gets.", 8)
    parser.add("--dtype", "The dtype of the weights.", "bfloat16", choices=DTYPES)
    sentence = "The activation between the projections."
    parser.add("--activation", sentence, "gelu", choices=("gelu", "silu"))
    sentence = "The numbers of tokens that get tiles of their own."
    parser.add("--keys", sentence, KEYS, type=positive, nargs="+")
    sentence = "The numbers of tokens that are measured (default: keys, and between)."
    parser.add("--tokens", sentence, type=positive, nargs="+")
    parser.add("--workers", "How many processes compile.", os.cpu_count())


def measure(run: Run) -> None:
    args = run.args
    if args.topk > args.experts:
        raise UserError(f"--topk {args.topk} is more than {args.experts} experts.")
    layer = Layer(
        *(args.experts, args.width, args.hidden, args.topk),
        *(args.dtype, args.activation),
    )
    run.set(**asdict(layer))
    run.against = ["default tiles", "SGLang's files"]
    if args.check:
        start_layers()
    else:
        _search(layer, args)
    arms: Dict[str, Callable[[], ContextManager]] = {
        "default tiles": partial(tiles_of, {}),
        "SGLang's files": partial(tiles_from, None),
    }
    for folder in args.check or [args.configs]:
        name = folder.name if args.check else "tuned"
        arms[name] = partial(tiles_from, folder)
        if (folder / "shared").exists():
            arms[f"{name}, one file"] = partial(tiles_from, folder / "shared")
    _compare(run, layer, arms)


def _search(layer: Layer, args: argparse.Namespace) -> None:
    args.configs.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        args.workers, mp_context=spawn, initializer=start_sglang
    ) as pool:
        tuner = Tuner(layer, args.configs / "times.json", pool)
        tune(tuner, list(args.keys), args.configs)


def _compare(
    run: Run, layer: Layer, arms: Dict[str, Callable[[], ContextManager]]
) -> None:
    """Times whole layers with each arm's tiles, in turn, and checks that they agree."""
    weights = [random_weights(layer, projection) for projection in (GATE_UP, DOWN)]
    counts = run.args.tokens or between(sorted(run.args.keys))
    cases = [(tokens, kind) for tokens in counts for kind in ROUTINGS]
    for tokens, kind in run.cases(cases, "whole layers"):
        case = {"tokens": tokens, "routing": kind}
        calls = layer_calls(layer, weights, tokens, kind)
        graphs, expected = {}, None
        for arm, tiles in arms.items():
            # Tiles are looked up when a layer is called: in here, and never again.
            with tiles():
                output = calls[0]().float()
                graphs[arm] = capture(calls)
            expected = output if expected is None else expected
            error = (output - expected).norm() / expected.norm()
            if not error < 0.01:
                raise UserError(f"{arm} at {tokens} tokens differs by {error:.1e}.")
        counted = dict.fromkeys(graphs, len(calls))
        times = replays_in_turn(graphs, counted, run.args.replays)
        for arm, samples in times.items():
            run.results.add(case, arm, "time", "us", samples)


def between(keys: List[int]) -> List[int]:
    """The keys and what lies at both sides of where one key gives way to the next."""
    found = set(keys)
    for low, high in zip(keys, keys[1:]):
        middle = (low + high) // 2
        found.update((middle, min(middle + 1, high)))
    return sorted(found)
