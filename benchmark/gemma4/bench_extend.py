"""Time the extend (prefill) attention kernels of several SGLang trees side by side.

    python benchmark/gemma4/bench_extend.py --name extend-h200 --base DIR
    python benchmark/gemma4/bench_extend.py --name heads --base DIR --shapes heads

DIR holds the pinned release (`pip install --no-deps --target DIR sglang==VERSION`);
`--peer NAME=DIR` adds another version's file, `--fa4 SITE` FlashAttention 4 (fa4.py).
With `--fused` q, k and v are views of one projection's output, as in a model. Arms take
turns, sample by sample, on the same tensors, whose prefix lies in shuffled slots of a
pool. Every arm's answer is compared with the first one's before it is timed. `model`
shapes are Gemma-4-26B-A4B's sliding and full layers; `heads` are other head sizes, for
what must not get slower.
"""

import argparse
import hashlib
import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Callable, Dict, List, Optional

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
import fa4  # noqa: E402
from results import FOLDER, Results, tables  # noqa: E402

FILE = "sglang/kernels/ops/attention/extend_attention.py"
TARGET_MS = 20  # a sample repeats its call until it takes this long

# Name: query heads, KV heads, head size, value head size, window (-1: none)
MODEL = {"sliding": (16, 8, 256, 256, 1023), "full": (16, 2, 512, 512, -1)}
HEADS = {
    "64": (16, 4, 64, 64, -1),
    "96": (16, 4, 96, 96, -1),
    "128": (32, 2, 128, 128, -1),
    "128, window 1023": (16, 8, 128, 128, 1023),
    "192 / 128": (16, 16, 192, 128, -1),
    "256": (16, 4, 256, 256, -1),
    "576 / 512": (16, 1, 576, 512, -1),
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


def _load(name: str, folder: Path) -> tuple:
    """(module, SHA-256) of a tree's kernels; what they import comes from this Python."""
    path = folder / FILE
    if not path.exists():
        raise SystemExit(f"{path} does not exist: give the folder that holds sglang/")
    spec = importlib.util.spec_from_file_location(f"extend_{len(sys.modules)}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module, hashlib.sha256(path.read_bytes()).hexdigest()


def _inputs(heads: tuple, batch: tuple, fused: bool) -> tuple:
    num_heads, num_kv_heads, dim, v_dim, window = heads
    extend, prefix = batch
    # As the backend passes it: a sliding layer gets a request's last keys alone.
    prefix = [min(n, window) if window > 0 else n for n in prefix]
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(
            shape, device="cuda", dtype=torch.bfloat16, generator=generator
        )

    def indptr(lengths):
        return torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)

    num_new, num_cached = sum(extend), sum(prefix)
    slots = torch.randperm(num_cached + 1, device="cuda", generator=generator)
    out = torch.empty((num_new, num_heads, v_dim), device="cuda", dtype=torch.bfloat16)
    shapes = ((num_heads, dim), (num_kv_heads, dim), (num_kv_heads, v_dim))
    if fused:
        sizes = [h * d for h, d in shapes]
        parts = draw(num_new, sum(sizes)).split(sizes, dim=1)
        qkv = [part.unflatten(1, shape) for part, shape in zip(parts, shapes)]
    else:
        qkv = [draw(num_new, *shape) for shape in shapes]
    return (
        *qkv,
        out,
        draw(num_cached + 1, num_kv_heads, dim),
        draw(num_cached + 1, num_kv_heads, v_dim),
        indptr(extend),
        indptr(prefix),
        slots[:num_cached].contiguous(),
        None,
        True,
        None,
        max(extend),
        1.0,
        1.0,
    )


def _fa4_launch(function: Callable, inputs: tuple, heads: tuple, batch: tuple):
    """FlashAttention 4 on the same keys, or None where it has no such head size."""
    dim, v_dim, window = heads[2:]
    if (dim, v_dim) not in ((256, 256), (512, 512)):
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
    return paged.call(function, q.contiguous(), batch[0], window, out)


def _sample(launch: Callable[[], None], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        launch()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def _flops(heads: tuple, batch: tuple) -> int:
    """Of the two products over the visible pairs of query and key."""
    num_heads, _, dim, v_dim, window = heads
    pairs = 0
    for extend, prefix in zip(*batch):
        seen = torch.arange(prefix + 1, prefix + extend + 1)
        if window > 0:
            seen = seen.clamp(max=window + 1)
        pairs += int(seen.sum())
    return 2 * num_heads * (dim + v_dim) * pairs


def _measure(
    results: Results,
    arms: Dict[str, ModuleType],
    flash: Optional[Callable],
    layer: str,
    heads: tuple,
    name: str,
    batch: tuple,
    args: argparse.Namespace,
) -> None:
    inputs = _inputs(heads, batch, args.fused)
    calls = {
        arm: partial(
            module.extend_attention_fwd, *inputs, sliding_window_size=heads[-1]
        )
        for arm, module in arms.items()
    }
    launch = _fa4_launch(flash, inputs, heads, batch) if flash else None
    if launch:
        calls["FlashAttention 4"] = launch
    launches, repeats, expected = {}, {}, None
    for arm, launch in calls.items():
        inputs[3].fill_(float("nan"))
        launch()
        got = inputs[3].float()
        if expected is None:
            expected = got
        elif not torch.allclose(got, expected, atol=2e-2, rtol=2e-2):
            raise SystemExit(
                f"{arm} and {next(iter(arms))} differ by "
                f"{(got - expected).abs().max():.3g} on {layer}, {name}"
            )
        launches[arm] = launch
        repeats[arm] = max(1, round(TARGET_MS / max(_sample(launch, 1), 0.02)))
    times: Dict[str, List[float]] = {arm: [] for arm in launches}
    for _ in range(args.samples):
        for arm, launch in launches.items():
            times[arm].append(round(_sample(launch, repeats[arm]), 5))
    case = {"layer": layer, "new + cached": name}
    for arm, values in times.items():
        results.add(case, arm, "time", "ms", values)
    flops = _flops(heads, batch)
    for arm in launches:
        milliseconds = results.get(case, arm, "time").median
        rate = round(flops / milliseconds / 1e9, 1)
        results.add(case, arm, "rate", "TFLOP/s", [rate])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--name", default="extend", help="of the result file")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of results")
    parser.add_argument("--base", type=Path, required=True, help="of the release")
    parser.add_argument(
        "--fork",
        type=Path,
        default=Path(__file__).parents[2] / "python",
        help="folder that holds the fork's sglang/",
    )
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=DIR", help="another tree"
    )
    parser.add_argument("--fa4", type=Path, metavar="SITE", help="where vLLM lies")
    parser.add_argument("--fused", action="store_true", help="views of a projection")
    parser.add_argument("--shapes", choices=["model", "heads"], default="model")
    parser.add_argument("--samples", type=int, default=7, help="of each arm")
    args = parser.parse_args()
    path = args.out / f"{args.name}.json"
    if path.exists():
        parser.exit(1, f"{path} exists: give another --name, or remove it\n")
    if not torch.cuda.is_available():
        parser.exit(1, "no GPU: the kernels are timed on one\n")
    folders = {"base": args.base}
    for peer in args.peer:
        name, equals, folder = peer.partition("=")
        if not (name and equals and folder):
            parser.error(f"--peer {peer}: give NAME=DIR")
        folders[name] = Path(folder)
    folders["fork"] = args.fork

    flash = fa4.load(args.fa4) if args.fa4 else None
    loaded = {name: _load(name, folder) for name, folder in folders.items()}
    arms = {name: module for name, (module, _) in loaded.items()}
    results = Results.start(
        *("kernels", args.name, "Extend attention"),
        dtype="bfloat16",
        fused=args.fused,
        file_sha256={name: sha256 for name, (_, sha256) in loaded.items()},
    )
    layers = MODEL if args.shapes == "model" else HEADS
    batches = MODEL_BATCHES if args.shapes == "model" else HEADS_BATCHES
    cases = [(layer, name) for layer in layers for name in batches]
    for layer, name in tqdm(cases, unit="case"):
        _measure(
            *(results, arms, flash, layer, layers[layer], name, batches[name], args)
        )
        torch.cuda.empty_cache()

    print(f"wrote {results.save(path)}")
    for table in tables(results):
        print(f"\n{table}")


if __name__ == "__main__":
    main()
