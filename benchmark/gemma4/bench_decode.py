"""Time the small kernels and the attention of a Gemma 4 decode step beside the base's.

    pip install --no-deps --target DIR sglang==0.5.23
    python benchmark/gemma4/bench_decode.py --name decode-h200 --base DIR

DIR holds the release that this series applies to; its kernels are read from their files,
the fork's from the installed sglang. A sample is one replay of a CUDA graph; the arms take
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

import argparse
import importlib.util
import statistics
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Callable, Dict, List

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
import fa4  # noqa: E402
from results import FOLDER, Results, table  # noqa: E402
from timing import copy_rate, time_in_turn  # noqa: E402

HIDDEN, HEADS, WINDOW, EPS = 2816, 16, 1023, 1e-6
# Head size, KV heads.
LAYERS = {"sliding": (256, 8), "full": (512, 2)}
TOKENS = (1, 8, 80, 320, 1024, 8192)
REQUESTS = (1, 2, 4, 8, 16, 32, 80)
LENGTHS = (100, 1500, 8500)
OPS = "sglang/kernels/ops/layernorm/gemma4_fused_ops.py"
DECODE = "sglang/kernels/ops/attention/decode_attention.py"


def _load(site: Path, file: str, name: str) -> ModuleType:
    """A module from its file alone, beside the installed one."""
    path = site / file
    if not path.exists():
        raise SystemExit(f"{path} does not exist: unpack the base's wheel to --base")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _agree(name: str, got: torch.Tensor, exact: torch.Tensor) -> None:
    """Times mean nothing if what was timed is wrong."""
    error = (got.double() - exact).norm() / exact.norm()
    if not error < 6e-3:
        raise SystemExit(f"{name} is off by {error:.1e} from float64")


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.pow(2).mean(dim=-1, keepdim=True) + EPS).rsqrt() * weight


def _weights(count: int, size: int) -> List[torch.Tensor]:
    return [torch.rand(size, device="cuda").bfloat16() + 0.5 for _ in range(count)]


class QKV:
    """The q/k/v norm and the rotary embedding of one layer."""

    def __init__(self, base: ModuleType, fork: ModuleType, layer: str, tokens: int):
        from sglang.kernels.ops.attention.rope import (
            apply_rope_with_cos_sin_cache_inplace,
        )

        self.base, self.fork = base, fork
        self.rope = apply_rope_with_cos_sin_cache_inplace
        self.D, self.kv_heads = LAYERS[layer]
        self.tokens = tokens
        self.sizes = [h * self.D for h in (HEADS, self.kv_heads, self.kv_heads)]
        self.weights = _weights(2, self.D)
        self.positions = torch.randint(0, 8000, (tokens,), device="cuda")
        angles = torch.rand((8192, self.D // 2), device="cuda") * 7
        self.cache = torch.cat([angles.cos(), angles.sin()], dim=-1)
        self.qkv = torch.randn((tokens, sum(self.sizes)), device="cuda").bfloat16()

    def arms(self) -> Dict[str, Callable[[], object]]:
        q, k, v = self.qkv.split(self.sizes, dim=-1)
        shape = (HEADS, self.kv_heads, self.D, EPS)

        def norm_then_rope():
            self.base.gemma_qkv_rmsnorm(q, k, v, *self.weights, *shape)
            self.rope(
                positions=self.positions,
                q=q.view(self.tokens, -1, self.D),
                k=k.view(self.tokens, -1, self.D),
                cos_sin_cache=self.cache,
                is_neox=True,
            )

        def fused():
            self.fork.gemma4_qkv_rmsnorm_rope(
                *(q, k, v, *self.weights, self.positions, self.cache, *shape)
            )

        return {"base": norm_then_rope, "fork": fused}

    def check(self) -> None:
        parts = self.qkv.double().split(self.sizes, dim=-1)
        parts = [part.view(self.tokens, -1, self.D) for part in parts]
        one = torch.ones_like(self.weights[0])
        cos, sin = self.cache[self.positions].double()[:, None].chunk(2, dim=-1)
        exact = []
        for part, weight in zip(parts, [*self.weights, one]):
            y = _norm(part, weight.double())
            if weight is not one:
                a, b = y.chunk(2, dim=-1)
                y = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
            exact.append(y.flatten(1))
        before = self.qkv.clone()
        for name, call in self.arms().items():
            self.qkv.copy_(before)
            call()
            _agree(f"{name} q/k/v norm", self.qkv, torch.cat(exact, dim=-1))
        self.qkv.copy_(before)

    def bytes(self) -> int:
        return 2 * self.qkv.nbytes + self.tokens * self.D * 4


class QKVAndStore(QKV):
    """The same, and the store of k and v in the KV pool."""

    def __init__(self, base: ModuleType, fork: ModuleType, layer: str, tokens: int):
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        super().__init__(base, fork, layer, tokens)
        size = 2 * max(TOKENS)
        self.pool = MHATokenToKVPool(
            size=size,
            page_size=1,
            dtype=self.qkv.dtype,
            head_num=self.kv_heads,
            head_dim=self.D,
            layer_num=1,
            device="cuda",
            enable_memory_saver=False,
        )
        # Slot 0 is for padding.
        self.slots = 1 + torch.randperm(size, device="cuda")[:tokens]

    def arms(self) -> Dict[str, Callable[[], object]]:
        q, k, v = self.qkv.split(self.sizes, dim=-1)
        shape = (HEADS, self.kv_heads, self.D, EPS)
        buffers = self.pool.get_kv_buffer(0)

        def then_store(call):
            call()
            heads = (x.view(self.tokens, -1, self.D) for x in (k, v))
            self.pool.set_kv_buffer(None, self.slots, *heads, layer_id_override=0)

        def fused():
            self.fork.gemma4_qkv_rmsnorm_rope(
                *(q, k, v, *self.weights, self.positions, self.cache, *shape),
                store_target=(*buffers, self.slots),
            )

        separate = super().arms()
        return {
            "base": lambda: then_store(separate["base"]),
            "two launches": lambda: then_store(separate["fork"]),
            "fork": fused,
        }

    def check(self) -> None:
        super().check()
        before = self.qkv.clone()
        _, *parts = self.qkv.split(self.sizes, dim=-1)
        for name, call in self.arms().items():
            buffers = self.pool.get_kv_buffer(0)
            for buffer in buffers:
                buffer.zero_()
            call()
            for buffer, part in zip(buffers, parts):
                expected = torch.zeros_like(buffer)
                expected[self.slots] = part.unflatten(-1, (-1, self.D))
                if not torch.equal(buffer, expected):
                    raise SystemExit(f"{name} stores k or v wrongly")
            self.qkv.copy_(before)

    def bytes(self) -> int:
        kv = 2 * self.sizes[1] * self.tokens * self.qkv.element_size()
        return super().bytes() + kv + self.slots.nbytes


class PreFeedforward:
    """The norms between attention and the feedforward branches of one layer."""

    def __init__(self, fork: ModuleType, tokens: int):
        self.fork = fork
        self.x, self.residual = (
            torch.randn((tokens, HIDDEN), device="cuda").bfloat16() for _ in range(2)
        )
        self.weights = _weights(4, HIDDEN)
        self.one = torch.ones_like(self.weights[0])

    def arms(self) -> Dict[str, Callable[[], object]]:
        from sgl_kernel import fused_add_rmsnorm, rmsnorm

        post, mlp, router, moe = self.weights

        def five():
            hidden = rmsnorm(self.x, post, EPS)
            fused_add_rmsnorm(hidden, self.residual, mlp, EPS)
            routed = rmsnorm(self.residual, self.one, EPS) * router
            return hidden, routed, rmsnorm(self.residual, moe, EPS)

        def fused():
            return self.fork.gemma4_pre_feedforward_rmsnorms(
                self.x, self.residual, *self.weights
            )

        return {"base": five, "fork": fused}

    def check(self) -> None:
        before = self.residual.clone()
        post, *others = (weight.double() for weight in self.weights)
        summed = before.double() + _norm(self.x.double(), post)
        for name, call in self.arms().items():
            self.residual.copy_(before)
            outputs = call()
            _agree(f"{name} residual", self.residual, summed)
            for output, weight in zip(outputs, others):
                _agree(f"{name} norms", output, _norm(summed, weight))
        self.residual.copy_(before)

    def bytes(self) -> int:
        return 6 * self.x.nbytes


class Attention:
    """Decode attention of one layer: what its backend launches."""

    def __init__(self, layer: str, slots: int):
        self.D, self.kv_heads = LAYERS[layer]
        self.window = WINDOW if layer == "sliding" else None
        shape = (slots, self.kv_heads, self.D)
        self.k, self.v = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        )
        self.slots = torch.randperm(slots, device="cuda")

    def batch(self, requests: int, length: int) -> None:
        self.requests, self.length = requests, length
        # A token attends to itself and to the window before it.
        self.seen = min(length, self.window + 1) if self.window else length
        rows = requests * self.seen
        sets = max(1, min(8, len(self.slots) // rows))
        self.indices = [self.slots[i * rows : (i + 1) * rows] for i in range(sets)]
        ends = torch.arange(requests + 1, device="cuda") * self.seen
        self.indptr = ends.to(torch.int32)
        shape = (requests, HEADS, self.D)
        self.q = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * self.D**-0.5
        self.out = torch.empty_like(self.q)

    def splits(self, most: int) -> torch.Tensor:
        """As many as the backend gives them: it looks at the full layers' heads."""
        from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

        lengths = torch.full((self.requests,), self.length, device="cuda")
        found = torch.empty(self.requests, dtype=torch.int32, device="cuda")
        cores = torch.cuda.get_device_properties(0).multi_processor_count
        get_num_kv_splits_triton[(1,)](
            *(found, lengths, self.requests, 1, HEADS, LAYERS["full"][1], most, cores),
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
            new, window = [1] * self.requests, self.window or -1
            calls.append(paged.call(function, q, new, window, self.out))
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
            _agree(f"{name} attention", self.out[i], exact)

    def bytes(self) -> int:
        return 2 * self.requests * self.seen * self.kv_heads * self.D * 2


def most_splits(requests: int) -> int:
    """The most KV splits that the fork's backend takes for a batch."""
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    backend = SimpleNamespace(
        scale_kv_splits=True,
        max_kv_splits=8,
        num_head=HEADS,
        num_kv_head=LAYERS["full"][1],
        device_core_count=torch.cuda.get_device_properties(0).multi_processor_count,
    )
    return TritonAttnBackend.get_max_kv_splits(backend, requests)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--name", default="decode", help="of the result file")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of results")
    parser.add_argument("--base", type=Path, required=True, help="the base, unpacked")
    parser.add_argument("--fa4", type=Path, metavar="SITE", help="where vLLM lies")
    parser.add_argument("--replays", type=int, default=15, help="samples of each arm")
    args = parser.parse_args()
    path = args.out / f"{args.name}.json"
    if path.exists():
        parser.exit(1, f"{path} exists: give another --name, or remove it\n")
    base_ops, base_decode = (
        _load(args.base, file, f"base_{Path(file).stem}") for file in (OPS, DECODE)
    )
    if not torch.cuda.is_available():
        parser.exit(1, "no GPU: these kernels are timed on one\n")
    import sglang.kernels.ops.attention.decode_attention as fork_decode
    import sglang.kernels.ops.attention.gemma4_qkv_norm_rope as fork_qkv
    import sglang.kernels.ops.layernorm.gemma4_pre_feedforward as fork_norms

    flash = fa4.load(args.fa4) if args.fa4 else None
    torch.manual_seed(0)
    rate = copy_rate()
    results = Results.start(
        *("kernels", args.name, "A decode step's kernels"),
        hidden=HIDDEN,
        heads=HEADS,
        window=WINDOW,
        copy_bytes_per_us=round(rate),
        limits=["bytes"],
    )

    for tokens in tqdm(TOKENS, desc="norms", unit="case"):
        launches = 30 if tokens <= 1024 else 6
        kernels = {"pre-feedforward norms": PreFeedforward(fork_norms, tokens)}
        modules = base_ops, fork_qkv
        for layer in LAYERS:
            kernels[f"q/k/v, {layer}"] = QKV(*modules, layer, tokens)
            kernels[f"q/k/v and store, {layer}"] = QKVAndStore(*modules, layer, tokens)
        for name, kernel in kernels.items():
            kernel.check()
            case = {"kernel": name, "tokens": tokens}
            arms = {arm: [call] * launches for arm, call in kernel.arms().items()}
            for arm, samples in time_in_turn(arms, args.replays).items():
                results.add(case, arm, "time", "us", samples)
            results.add(case, "bytes", "time", "us", [round(kernel.bytes() / rate, 3)])
        results.save(path)

    for tokens in tqdm((1, 8, 80, 320), desc="behind a projection", unit="case"):
        for layer in LAYERS:
            kernel = QKV(base_ops, fork_qkv, layer, tokens)
            hidden = torch.randn((tokens, HIDDEN), device="cuda").bfloat16()
            matrices = [
                torch.randn((HIDDEN, sum(kernel.sizes)), device="cuda").bfloat16()
                for _ in range(3)
            ]

            def behind(call, matrix):
                torch.mm(hidden, matrix, out=kernel.qkv)
                call()

            calls = {"projection alone": lambda: None, **kernel.arms()}
            arms = {
                arm: [lambda c=call, m=m: behind(c, m) for m in matrices * 4]
                for arm, call in calls.items()
            }
            case = {"layer": layer, "tokens": tokens}
            for arm, samples in time_in_turn(arms, args.replays).items():
                results.add(case, arm, "time with projection", "us", samples)
        results.save(path)

    for layer in LAYERS:
        longest = WINDOW + 1 if layer == "sliding" else max(LENGTHS)
        attention = Attention(layer, max(REQUESTS) * longest)
        cases = [(r, n) for n in LENGTHS for r in REQUESTS]
        for requests, length in tqdm(cases, desc=f"attention, {layer}", unit="case"):
            attention.batch(requests, length)
            arms = {
                "base": attention.arm(base_decode, 8),
                "fork": attention.arm(fork_decode, most_splits(requests)),
            }
            if flash:
                arms["FlashAttention 4"] = attention.flash(flash)
            for arm, calls in arms.items():
                attention.check(arm, calls)
            case = {"layer": layer, "tokens each": length, "requests": requests}
            for arm, samples in time_in_turn(arms, args.replays).items():
                results.add(case, arm, "attention", "us", samples)
            moved = [round(attention.bytes() / rate, 3)]
            results.add(case, "bytes", "attention", "us", moved)
        del attention
        results.save(path)

    print(f"wrote {results.save(path)}")
    for metric in ("time", "time with projection", "attention"):
        print(f"\n{table(results, metric)}")
    ratios = [
        record.median / results.get(record.case, "base", record.metric).median
        for record in results.select("fork")
    ]
    print(
        f"\nfork: {min(ratios):.2f} to {max(ratios):.2f} of the base's time, "
        f"median {statistics.median(ratios):.2f}"
    )


if __name__ == "__main__":
    main()
