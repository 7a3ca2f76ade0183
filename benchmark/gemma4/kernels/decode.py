"""Times the small kernels and the attention of a Gemma 4 decode step beside the base's.

    python -m gemma4 kernel decode --name decode-h200 --base DIR

DIR holds the release that this series applies to; its kernels are read from their files,
the fork's from the installed sglang.
A sample is one replay of a CUDA graph; the arms take
turns, replay by replay. Three parts, in Gemma-4-26B-A4B's shapes:

- `norms`: the norm of q, k and v with the rotary embedding, the same with the store of
  k and v in the KV pool, and the norms between attention and the feedforward branches;
  their inputs were written just before, as in a model, and come from the L2 cache as long
  as they fit.
- `behind a projection`: the first of them behind the matrix product that makes q, k, v.
- `attention`: both kernels of a decode layer, over KV slots in random order that take
  turns, so that they come from memory.

`bytes` is what must be read and written at the rate of a large copy; `--fa4 SITE` adds
FlashAttention 4 (fa4.py) to the attention.
"""

from types import ModuleType, SimpleNamespace
from typing import Callable, List

import torch
from gemma4.kernels import fa4, files
from gemma4.kernels.inputs import MODEL, bounds, normal, shuffled
from gemma4.kernels.norms import (
    HEADS,
    HIDDEN,
    QKV,
    TOKENS,
    PreFeedforward,
    QKVAndStore,
)
from gemma4.kernels.runner import FA4, Run, add_base, add_fa4, agree

TITLE, SAMPLES = "A decode step's kernels", 15
WINDOW = MODEL["sliding"].window
REQUESTS = (1, 2, 4, 8, 16, 32, 80)
LENGTHS = (100, 1500, 8500)
OPS = "sglang/kernels/ops/layernorm/gemma4_fused_ops.py"
DECODE = "sglang/kernels/ops/attention/decode_attention.py"


class Attention:
    """Decode attention of one layer: what its backend launches."""

    def __init__(self, layer: str, slots: int):
        _, self.kv_heads, self.D, _, self.window = MODEL[layer]
        self.k, self.v = (normal(slots, self.kv_heads, self.D) for _ in range(2))
        self.slots = shuffled(slots)

    def batch(self, requests: int, length: int) -> None:
        self.requests, self.length = requests, length
        # A token attends to itself and to the window before it.
        self.seen = min(length, self.window + 1) if self.window > 0 else length
        rows = requests * self.seen
        sets = max(1, min(8, len(self.slots) // rows))
        self.indices = [self.slots[i * rows : (i + 1) * rows] for i in range(sets)]
        self.indptr = bounds([self.seen] * requests)
        self.q = normal(requests, HEADS, self.D) * self.D**-0.5
        self.out = torch.empty_like(self.q)

    def splits(self, most: int) -> torch.Tensor:
        """As many as the backend gives them: it looks at the full layers' heads."""
        from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

        lengths = torch.full((self.requests,), self.length, device="cuda")
        found = torch.empty(self.requests, dtype=torch.int32, device="cuda")
        cores = torch.cuda.get_device_properties(0).multi_processor_count
        get_num_kv_splits_triton[(1,)](
            *(found, lengths, self.requests, 1, HEADS, MODEL["full"].kv, most, cores),
            MAX_NUM_SEQ=256,
        )
        return found

    def arm(self, ops: ModuleType, most: int) -> List[Callable[[], object]]:
        shape = (self.requests, HEADS, most)
        parts = torch.empty((*shape, self.D), device="cuda")
        logs = torch.empty(shape, device="cuda")
        splits = self.splits(most)

        def call(indices):
            ops.decode_attention_fwd(
                *(self.q, self.k, self.v, self.out, self.indptr, indices),
                *(parts, logs, splits, most, 1.0, 1.0, 1.0),
                use_pdl=True,
            )

        return [lambda i=indices: call(i) for indices in self.indices]

    def flash(self, function: Callable) -> List[Callable[[], object]]:
        """FlashAttention 4; the newest token is one of those that are seen."""
        calls = []
        # The scale is in q; vLLM's call takes its own.
        q = self.q * self.D**0.5
        for indices in self.indices:
            rows = indices.split(self.seen)
            keys, values = ([x[row] for row in rows] for x in (self.k, self.v))
            paged = fa4.Paged(keys, values)
            new = [1] * self.requests
            calls.append(paged.call(function, q, new, self.window, self.out))
        return calls

    def check(self, name: str, calls: List[Callable[[], object]]) -> None:
        self.out.fill_(float("nan"))
        calls[0]()
        group = HEADS // self.kv_heads
        for i in sorted({0, self.requests - 1}):
            rows = self.indices[0][i * self.seen : (i + 1) * self.seen]
            k, v = (
                x[rows].double().repeat_interleave(group, dim=1)
                for x in (self.k, self.v)
            )
            weights = torch.einsum("hd,shd->hs", self.q[i].double(), k).softmax(-1)
            exact = torch.einsum("hs,shd->hd", weights, v)
            agree(f"{name} attention", self.out[i], exact)

    def bytes(self) -> int:
        return 2 * self.requests * self.seen * self.kv_heads * self.D * 2


def most_splits(requests: int) -> int:
    """The most KV splits that the fork's backend takes for a batch."""
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    backend = SimpleNamespace(
        scale_kv_splits=True,
        max_kv_splits=8,
        num_head=HEADS,
        num_kv_head=MODEL["full"].kv,
        device_core_count=torch.cuda.get_device_properties(0).multi_processor_count,
    )
    return TritonAttnBackend.get_max_kv_splits(backend, requests)


def arguments(parser) -> None:
    add_base(parser)
    add_fa4(parser)


def measure(run: Run) -> None:
    import sglang.kernels.ops.attention.decode_attention as fork_decode
    import sglang.kernels.ops.attention.gemma4_qkv_norm_rope as fork_qkv
    import sglang.kernels.ops.layernorm.gemma4_pre_feedforward as fork_norms

    base_norms, base_decode = (
        files.load(files.of_base(file, run.args.base)).module for file in (OPS, DECODE)
    )
    run.set(hidden=HIDDEN, heads=HEADS, window=WINDOW)
    _time_norms(run, base_norms, fork_qkv, fork_norms)
    _time_behind_a_projection(run, base_norms, fork_qkv)
    for layer in MODEL:
        _time_attention(run, layer, base_decode, fork_decode)


def _time_norms(run: Run, base, fork_qkv, fork_norms) -> None:
    for tokens in run.cases(TOKENS, "norms"):
        launches = 30 if tokens <= 1024 else 6
        kernels = {"pre-feedforward norms": PreFeedforward(fork_norms, tokens)}
        for layer in MODEL:
            kernels[f"q/k/v, {layer}"] = QKV(base, fork_qkv, layer, tokens)
            kernels[f"q/k/v and store, {layer}"] = QKVAndStore(
                base, fork_qkv, layer, tokens
            )
        for name, kernel in kernels.items():
            kernel.check()
            arms = {arm: [call] * launches for arm, call in kernel.arms().items()}
            run.time({"kernel": name, "tokens": tokens}, arms, kernel.bytes())


def _time_behind_a_projection(run: Run, base, fork_qkv) -> None:
    cases = [(tokens, layer) for tokens in (1, 8, 80, 320) for layer in MODEL]
    for tokens, layer in run.cases(cases, "behind a projection"):
        kernel = QKV(base, fork_qkv, layer, tokens)
        hidden = normal(tokens, HIDDEN)
        matrices = [normal(HIDDEN, sum(kernel.sizes)) for _ in range(3)]

        def behind(call, matrix):
            torch.mm(hidden, matrix, out=kernel.qkv)
            call()

        calls = {"projection alone": lambda: None, **kernel.arms()}
        arms = {
            arm: [lambda c=call, m=m: behind(c, m) for m in matrices * 4]
            for arm, call in calls.items()
        }
        case = {"layer": layer, "tokens": tokens}
        run.time(case, arms, metric="time with projection")


def _time_attention(run: Run, layer: str, base, fork) -> None:
    longest = WINDOW + 1 if layer == "sliding" else max(LENGTHS)
    attention = Attention(layer, max(REQUESTS) * longest)
    cases = [(requests, length) for length in LENGTHS for requests in REQUESTS]
    for requests, length in run.cases(cases, f"attention, {layer}"):
        attention.batch(requests, length)
        arms = {
            "base": attention.arm(base, 8),
            "fork": attention.arm(fork, most_splits(requests)),
        }
        if run.flash:
            arms[FA4] = attention.flash(run.flash)
        for arm, calls in arms.items():
            attention.check(arm, calls)
        case = {"layer": layer, "tokens each": length, "requests": requests}
        run.time(case, arms, attention.bytes(), metric="attention")
