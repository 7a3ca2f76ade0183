"""Time the verify step's attention beside the release's and the bytes it must read.

    python benchmark/gemma4/bench_verify.py --name verify-h200

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

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import List, Optional

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
import fa4  # noqa: E402
from results import FOLDER, Results, tables  # noqa: E402
from timing import copy_rate, time_in_turn  # noqa: E402

LAYERS = {
    "sliding": dict(heads=16, kv_heads=8, head_dim=256, v_head_dim=256, window=1023),
    "full": dict(heads=16, kv_heads=2, head_dim=512, v_head_dim=512, window=-1),
    "gqa": dict(heads=32, kv_heads=8, head_dim=128, v_head_dim=128, window=-1),
    "mla": dict(heads=128, kv_heads=1, head_dim=576, v_head_dim=512, window=-1),
}
# layer, requests, tokens of each ("mixed": a few long requests among short ones)
CASES = [
    *(("sliding", 1, 8500), ("sliding", 8, 8500), ("sliding", 80, 8500)),
    *(("full", 1, 8500), ("full", 8, 8500), ("full", 80, 1500), ("full", 80, 8500)),
    *(("full", 1, 65536), ("full", 80, "mixed"), ("gqa", 32, 4096), ("mla", 16, 4096)),
]
MIXED = [65536, 30000] + [100 * i for i in range(1, 79)]
# So many bytes of KV do not fit an L2 cache.
COLD_BYTES = 3 * 10**8
OPS = "kernels/ops/attention"
CHECKOUT = Path(__file__).parents[2] / "python" / "sglang"


def _module(name: str, path: Path):
    """(the module in a file, its SHA-256)"""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, hashlib.sha256(path.read_bytes()).hexdigest()


def _base_kernel(folder: str) -> Path:
    """extend_attention.py of the release, from the first commit of python/sglang."""
    shown = subprocess.run(
        ["git", "show", f"refs/fork/base:{OPS}/extend_attention.py"],
        cwd=CHECKOUT if CHECKOUT.exists() else None,
        capture_output=True,
    )
    if not CHECKOUT.exists() or shown.returncode:
        raise SystemExit(
            f"{CHECKOUT} does not hold the release: run `make fork`, or give "
            "--base-kernel"
        )
    path = Path(folder) / "extend_attention.py"
    path.write_bytes(shown.stdout)
    return path


class Layer:
    """Inputs of one layer's verify step, in `copies` copies."""

    def __init__(self, name, requests, tokens, drafted):
        layer = LAYERS[name]
        heads, kv_heads = layer["heads"], layer["kv_heads"]
        Lq, Lv, self.window = layer["head_dim"], layer["v_head_dim"], layer["window"]
        lens = MIXED[:requests] if tokens == "mixed" else [tokens] * requests
        kept = self.kept = [min(n, self.window) if self.window > 0 else n for n in lens]
        used, batch, self.drafted = sum(kept), len(lens), drafted
        self.bytes = used * kv_heads * (Lq if name == "mla" else Lq + Lv) * 2
        copies = max(1, min(64, round(COLD_BYTES / self.bytes)))

        def normal(*shape):
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

        self.copies = []
        for _ in range(copies):
            k_buffer = normal(used, kv_heads, Lq)
            v_buffer = (
                k_buffer[..., :Lv] if name == "mla" else normal(used, kv_heads, Lv)
            )
            q, k = normal(batch * drafted, heads, Lq), normal(
                batch * drafted, kv_heads, Lq
            )
            v, o = normal(batch * drafted, kv_heads, Lv), normal(
                batch * drafted, heads, Lv
            )
            slots = torch.randperm(used, device="cuda")
            self.copies.append((q, k, v, o, k_buffer, v_buffer, slots))

        def indptr(counts, dtype):
            bounds = torch.zeros(len(counts) + 1, dtype=dtype, device="cuda")
            bounds[1:] = torch.tensor(counts).cumsum(0)
            return bounds

        self.qo_indptr = indptr([drafted] * batch, torch.int32)
        self.kv_indptr = indptr(kept, torch.int32)
        chain = torch.ones(drafted, drafted, dtype=torch.uint8).tril()
        masks = [
            torch.cat([torch.ones(drafted, n, dtype=torch.uint8), chain], 1).flatten()
            for n in lens
        ]
        self.mask = torch.cat(masks).cuda()
        self.mask_indptr = indptr([len(m) for m in masks], torch.int64)
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
            *(q, k, v, o, k_buffer, v_buffer, self.kv_indptr, slots),
            *(self.mask, self.mask_indptr, self.drafted, cores, 1.0, 1.0),
            sliding_window_size=self.window,
            window_kv_offsets=self.offsets,
        )
        return o


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--name", default="verify", help="of the result file")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of results")
    parser.add_argument("--drafted", type=int, default=4, help="tokens a request")
    parser.add_argument("--replays", type=int, default=11, help="samples of each arm")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--fa4", type=Path, metavar="SITE", help="where vLLM lies")
    parser.add_argument("--kernel", type=Path, help="another verify_attention.py")
    parser.add_argument(
        "--base-kernel", type=Path, help="the base's extend_attention.py"
    )
    args = parser.parse_args(argv)
    path = args.out / f"{args.name}.json"
    if path.exists():
        parser.exit(1, f"{path} exists: give another --name, or remove it\n")
    if not torch.cuda.is_available():
        parser.exit(1, "no GPU: the verify kernel is timed on one\n")
    kernel = args.kernel or CHECKOUT / OPS / "verify_attention.py"
    if not kernel.exists():
        parser.exit(1, f"{kernel} does not exist: run `make fork`, or give --kernel\n")

    with tempfile.TemporaryDirectory() as folder:
        base_kernel = args.base_kernel or _base_kernel(folder)
        base, base_sha256 = _module("base_extend_attention", base_kernel)
        fork, sha256 = _module("verify_attention", kernel)
        flash = fa4.load(args.fa4) if args.fa4 else None
        rate = copy_rate()
        results = Results.start(
            *("kernels", args.name, "Attention of a verify step"),
            drafted=args.drafted,
            kernel_sha256=sha256,
            base_kernel_sha256=base_sha256,
            copy_bytes_per_us=round(rate),
            limits=["bytes"],
        )
        results.notes.append("`mixed`: 65536 and 30000 tokens, then 100 to 7800.")
        torch.manual_seed(0)
        cases = [case for case in CASES if case[0] in args.layers]
        for name, requests, tokens in tqdm(cases, unit="case"):
            layer = Layer(name, requests, tokens, args.drafted)

            def run_base(i, layer=layer):
                return layer.base(base.extend_attention_fwd, i)

            def run_fork(i, layer=layer):
                return layer.fork(fork.verify_attention_fwd, i)

            expected = run_base(0).float().clone()
            # Sums of many values are small: what bf16 leaves of them.
            if not torch.allclose(run_fork(0).float(), expected, rtol=2e-2, atol=4e-3):
                raise SystemExit(f"fork and base differ in {name} {requests} {tokens}")
            launches = max(4, len(layer.copies))
            arms = {
                "base": [partial(run_base, i) for i in range(len(layer.copies))],
                "fork": [partial(run_fork, i) for i in range(launches)],
            }
            if flash and name in ("sliding", "full"):
                calls = layer.flash(flash)
                calls[0]()
                got = layer.copies[0][3].float()
                if not torch.allclose(got, expected, rtol=2e-2, atol=4e-3):
                    raise SystemExit(
                        f"FA4 and base differ in {name} {requests} {tokens}"
                    )
                arms["FlashAttention 4"] = calls
            case = {"layer": name, "requests": requests, "tokens": tokens}
            for arm, samples in time_in_turn(arms, args.replays).items():
                results.add(case, arm, "time", "us", samples)
            results.add(case, "bytes", "time", "us", [round(layer.bytes / rate, 3)])

    print(f"wrote {results.save(path)}")
    for table in tables(results):
        print(f"\n{table}")


if __name__ == "__main__":
    main()
