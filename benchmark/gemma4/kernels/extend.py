"""Times the extend (prefill) attention kernels of several SGLang trees side by side.

    python -m gemma4 kernel extend --name extend-h200 --base DIR
    python -m gemma4 kernel extend --name heads --base DIR --shapes heads

DIR holds the pinned release (`pip install --no-deps --target DIR sglang==VERSION`);
`--peer NAME=DIR` adds another version's file, `--fa4 SITE` FlashAttention 4 (fa4.py).
With `--fused` q, k and v are views of one projection's output, as in a model. Arms take
turns, sample by sample, on the same tensors, whose prefix lies in shuffled slots of a
pool. Every arm's answer is compared with the first one's before it is timed. `model`
shapes are Gemma-4-26B-A4B's sliding and full layers; `heads` are other head sizes, for
what must not get slower.
"""

from functools import partial
from pathlib import Path
from typing import Callable

import torch
from gemma4.errors import UserError
from gemma4.kernels import fa4, files
from gemma4.kernels.inputs import MODEL, Heads, bounds, normal, shuffled
from gemma4.kernels.runner import FA4, Run, add_base, add_fa4, alike
from gemma4.kernels.timing import time_long_in_turn

TITLE, SAMPLES = "Extend attention", 7
FILE = "sglang/kernels/ops/attention/extend_attention.py"
TARGET_MS = 20  # a sample repeats its call until it takes this long

HEADS = {
    "64": Heads(16, 4, 64, 64),
    "96": Heads(16, 4, 96, 96),
    "128": Heads(32, 2, 128, 128),
    "128, window 1023": Heads(16, 8, 128, 128, 1023),
    "192 / 128": Heads(16, 16, 192, 128),
    "256": Heads(16, 4, 256, 256),
    "576 / 512": Heads(16, 1, 576, 512),
}
# Name: new tokens and cached tokens of each sequence
MODEL_BATCHES = {
    "8192 + 0": ((8192,), (0,)),
    "8192 + 8192": ((8192,), (8192,)),
    "192 + 8000, 7800 + 0": ((192, 8000), (7800, 0)),
    "4096 + 4096, 4000 + 0": ((4096, 4096), (4000, 0)),
    "8192 + 65536": ((8192,), (65536,)),
}
HEADS_BATCHES = {
    "8192 + 0": ((8192,), (0,)),
    "2048 + 16384": ((2048,), (16384,)),
    "16 × 200, 48 × 1, + 500": ((200,) * 16 + (1,) * 48, (500,) * 64),
    "1 × 64 + 0": ((64,), (0,)),
}


def _inputs(heads: Heads, batch: tuple, fused: bool) -> tuple:
    """The arguments of the kernel."""
    torch.manual_seed(0)
    extend, prefix = batch
    # As the backend passes it: a sliding layer gets a request's last keys alone.
    prefix = [heads.kept(n) for n in prefix]
    new, cached = sum(extend), sum(prefix)
    shapes = (heads.queries, heads.dim), (heads.kv, heads.dim), (heads.kv, heads.v_dim)
    slots = shuffled(cached + 1)
    out = normal(new, heads.queries, heads.v_dim)
    if fused:
        sizes = [h * d for h, d in shapes]
        parts = normal(new, sum(sizes)).split(sizes, dim=1)
        qkv = [part.unflatten(1, shape) for part, shape in zip(parts, shapes)]
    else:
        qkv = [normal(new, *shape) for shape in shapes]
    buffers = [normal(cached + 1, *shape) for shape in shapes[1:]]
    return (
        *(*qkv, out, *buffers, bounds(extend), bounds(prefix)),
        *(slots[:cached].contiguous(), None, True, None, max(extend), 1.0, 1.0),
    )


def _fa4_launch(function: Callable, inputs: tuple, heads: Heads, batch: tuple):
    """FlashAttention 4 on the same keys, or None where it has no such head size."""
    if heads not in MODEL.values():
        return None
    q, k, v, out, k_buffer, v_buffer, _, kv_indptr, slots = inputs[:9]
    keys, values = [], []
    bounds, first = kv_indptr.tolist(), 0
    for i, new in enumerate(batch[0]):
        cached = slots[bounds[i] : bounds[i + 1]]
        for found, buffer, x in ((keys, k_buffer, k), (values, v_buffer, v)):
            found.append(torch.cat([buffer[cached], x[first : first + new]]))
        first += new
    paged = fa4.Paged(keys, values)
    return paged.call(function, q.contiguous(), batch[0], heads.window, out)


def _flops(heads: Heads, batch: tuple) -> int:
    """Of the two products over the visible pairs of query and key."""
    pairs = 0
    for extend, prefix in zip(*batch):
        seen = torch.arange(prefix + 1, prefix + extend + 1)
        if heads.window > 0:
            seen = seen.clamp(max=heads.window + 1)
        pairs += int(seen.sum())
    return 2 * heads.queries * (heads.dim + heads.v_dim) * pairs


def arguments(parser) -> None:
    add_base(parser)
    add_fa4(parser)
    sentence = "The folder that holds the fork's sglang/."
    parser.add("--fork", sentence, files.CHECKOUT, type=Path, metavar="DIR")
    sentence = "Adds the sglang/ of another folder, under this name."
    parser.add("--peer", sentence, [], action="append", metavar="NAME=DIR")
    sentence = "Makes q, k and v views of one projection's output, as in a model."
    parser.add("--fused", sentence, action="store_true")
    sentence = "Times the model's layers, or other head sizes."
    parser.add("--shapes", sentence, "model", choices=["model", "heads"])


def measure(run: Run) -> None:
    args = run.args
    paths = {"base": files.of_base(FILE, args.base)}
    for peer in args.peer:
        name, equals, folder = peer.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--peer {peer}: give NAME=DIR.")
        paths[name] = Path(folder) / FILE
    paths["fork"] = args.fork / FILE
    kernels = {name: files.load(path) for name, path in paths.items()}
    run.set(dtype="bfloat16", fused=args.fused)
    run.set(file_sha256={name: kernel.sha256 for name, kernel in kernels.items()})
    layers = MODEL if args.shapes == "model" else HEADS
    batches = MODEL_BATCHES if args.shapes == "model" else HEADS_BATCHES
    cases = [(layer, name) for layer in layers for name in batches]
    for layer, name in run.cases(cases, "extend"):
        heads, batch = layers[layer], batches[name]
        inputs = _inputs(heads, batch, args.fused)
        arms = {
            arm: partial(
                kernel.module.extend_attention_fwd,
                *inputs,
                sliding_window_size=heads.window,
            )
            for arm, kernel in kernels.items()
        }
        flash = run.flash and _fa4_launch(run.flash, inputs, heads, batch)
        if flash:
            arms[FA4] = flash
        case = {"layer": layer, "new + cached": name}
        alike(case, arms, inputs[3], atol=2e-2)
        times = time_long_in_turn(arms, args.replays, TARGET_MS)
        for arm, samples in times.items():
            run.results.add(case, arm, "time", "ms", samples)
        for arm in times:
            milliseconds = run.results.get(case, arm, "time").median
            rate = round(_flops(heads, batch) / milliseconds / 1e9, 1)
            run.results.add(case, arm, "rate", "TFLOP/s", [rate])
        torch.cuda.empty_cache()
