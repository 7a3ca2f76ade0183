"""Times the verify step's attention beside the release's and the bytes it must read.

    python -m gemma4 kernel verify --name verify-h200

A layer of Gemma-4-26B-A4B in bf16 with 4 drafted tokens a request: `sliding` has 16
query heads, 8 KV heads of 256 and a window of 1023 tokens before a token, `full` 16
query heads and 2 KV heads of 512; `mla` and `gqa` are layers of other models. Lengths
are those before the draft, the slots of the KV cache are in random order. `base` is the
extend kernel of the release, which verified there, `fork` the verify kernel.

A sample is one replay of a CUDA graph whose launches go through copies of the KV cache
that together are larger than the L2 cache, as the layers of a model do; the arms take
turns, replay by replay. `bytes` is K and V of the prefix at the rate of a large copy;
`--fa4 SITE` adds FlashAttention 4 (fa4.py), for the layers of Gemma 4.
"""

from functools import partial
from pathlib import Path

import torch
from gemma4.kernels import fa4, files
from gemma4.kernels.inputs import MODEL, Heads, bounds, normal, shuffled
from gemma4.kernels.runner import FA4, Run, add_fa4, alike

TITLE, SAMPLES = "Attention of a verify step", 11
LAYERS = {**MODEL, "gqa": Heads(32, 8, 128, 128), "mla": Heads(128, 1, 576, 512)}
# layer, requests, tokens of each ("mixed": a few long requests among short ones)
CASES = [
    *(("sliding", 1, 8500), ("sliding", 8, 8500), ("sliding", 80, 8500)),
    *(("full", 1, 8500), ("full", 8, 8500), ("full", 80, 1500), ("full", 80, 8500)),
    *(("full", 1, 65536), ("full", 80, "mixed"), ("gqa", 32, 4096), ("mla", 16, 4096)),
]
MIXED = [65536, 30000] + [100 * i for i in range(1, 79)]
# So many bytes of KV do not fit an L2 cache.
COLD_BYTES = 3 * 10**8
OPS = "sglang/kernels/ops/attention"


class Layer:
    """Inputs of one layer's verify step, in `copies` copies."""

    def __init__(self, name: str, requests: int, tokens, drafted: int):
        heads, self.drafted = LAYERS[name], drafted
        lens = MIXED[:requests] if tokens == "mixed" else [tokens] * requests
        kept = self.kept = [heads.kept(n) for n in lens]
        used, rows, self.window = sum(kept), requests * drafted, heads.window
        shared = name == "mla"  # its values are the beginnings of its keys
        width = heads.dim if shared else heads.dim + heads.v_dim
        self.bytes = 2 * used * heads.kv * width
        self.copies = []
        for _ in range(max(1, min(64, round(COLD_BYTES / self.bytes)))):
            keys = normal(used, heads.kv, heads.dim)
            values = (
                keys[..., : heads.v_dim]
                if shared
                else normal(used, heads.kv, heads.v_dim)
            )
            self.copies.append(
                (
                    normal(rows, heads.queries, heads.dim),
                    normal(rows, heads.kv, heads.dim),
                    normal(rows, heads.kv, heads.v_dim),
                    normal(rows, heads.queries, heads.v_dim),
                    *(keys, values, shuffled(used)),
                )
            )
        self.qo_indptr, self.kv_indptr = bounds([drafted] * requests), bounds(kept)
        chain = torch.ones(drafted, drafted, dtype=torch.uint8).tril()
        masks = [
            torch.cat([torch.ones(drafted, n, dtype=torch.uint8), chain], 1).flatten()
            for n in lens
        ]
        self.mask = torch.cat(masks).cuda()
        self.mask_indptr = bounds([len(m) for m in masks], torch.int64)
        offsets = [n - m for n, m in zip(lens, kept)]
        self.offsets = torch.tensor(offsets, dtype=torch.int32, device="cuda")

    def base(self, function, i):
        q, k, v, o, k_buffer, v_buffer, slots = self.copies[i % len(self.copies)]
        function(
            *(q, k, v, o, k_buffer, v_buffer, self.qo_indptr, self.kv_indptr, slots),
            *(self.mask, True, self.mask_indptr, self.drafted, 1.0, 1.0),
            sliding_window_size=self.window,
            window_kv_offsets=self.offsets,
        )
        return o

    def flash(self, function):
        """Launches of FlashAttention 4, one for each copy."""
        launches, new = [], [self.drafted] * len(self.kept)
        for q, k, v, o, k_buffer, v_buffer, slots in self.copies:
            paged = fa4.Paged(
                *(
                    [
                        torch.cat(pair)
                        for pair in zip(buffer[slots].split(self.kept), x.split(new))
                    ]
                    for buffer, x in ((k_buffer, k), (v_buffer, v))
                )
            )
            launches.append(paged.call(function, q, new, self.window, o))
        return launches

    def fork(self, function, i):
        q, k, v, o, k_buffer, v_buffer, slots = self.copies[i % len(self.copies)]
        cores = torch.cuda.get_device_properties(0).multi_processor_count
        function(
            *(q, k, v, o, k_buffer, v_buffer, self.kv_indptr, slots, self.drafted),
            *(cores, 1.0, 1.0, q.shape[-1] ** -0.5),
            sliding_window_size=self.window,
        )
        return o


def arguments(parser) -> None:
    add_fa4(parser)
    parser.add("--drafted", "How many tokens of a request are verified.", 4)
    layers = dict(nargs="+", choices=LAYERS)
    parser.add("--layers", "The layers that are timed.", tuple(LAYERS), **layers)
    sentence = "The fork's verify_attention.py, where it is another."
    parser.add("--kernel", sentence, type=Path)
    sentence = "The release's extend_attention.py (default: it is unpacked)."
    parser.add("--base-kernel", sentence, type=Path)


def measure(run: Run) -> None:
    args = run.args
    fork = files.load(files.of_fork(f"{OPS}/verify_attention.py", args.kernel))
    base = files.load(args.base_kernel or files.of_base(f"{OPS}/extend_attention.py"))
    run.set(drafted=args.drafted, kernel_sha256=fork.sha256)
    run.set(base_kernel_sha256=base.sha256)
    run.results.notes.append("`mixed`: 65536 and 30000 tokens, then 100 to 7800.")
    cases = [case for case in CASES if case[0] in args.layers]
    for name, requests, tokens in run.cases(cases, "verify"):
        layer = Layer(name, requests, tokens, args.drafted)
        copies = len(layer.copies)
        base_call = partial(layer.base, base.module.extend_attention_fwd)
        fork_call = partial(layer.fork, fork.module.verify_attention_fwd)
        arms = {
            "base": [partial(base_call, i) for i in range(copies)],
            "fork": [partial(fork_call, i) for i in range(max(4, copies))],
        }
        if run.flash and name in MODEL:
            arms[FA4] = layer.flash(run.flash)
        case = {"layer": name, "requests": requests, "tokens": tokens}
        first = {arm: calls[0] for arm, calls in arms.items()}
        alike(case, first, layer.copies[0][3], atol=4e-3)
        run.time(case, arms, layer.bytes)
