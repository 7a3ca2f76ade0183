"""Time the extend (prefill) attention kernels of several SGLang trees side by side.

    python benchmark/gemma4/bench_extend.py --name extend-h200 --base DIR
    python benchmark/gemma4/bench_extend.py --name heads --base DIR --shapes heads

DIR holds the pinned release (`pip install --no-deps --target DIR sglang==VERSION`);
`--peer NAME=DIR` adds another version's file. Arms take turns, sample by sample, on the
same tensors, whose prefix lies in shuffled slots of a pool. Every arm's answer is
compared with the first one's before it is timed. `model` shapes are Gemma-4-26B-A4B's
sliding and full layers; `heads` are other head sizes, for what must not get slower.
"""

import argparse
import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Callable, Dict, List

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from results import FOLDER, Results, tables  # noqa: E402

FILE = "sglang/srt/layers/attention/triton_ops/extend_attention.py"
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


def _inputs(heads: tuple, batch: tuple) -> tuple:
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
    return (
        draw(num_new, num_heads, dim),
        draw(num_new, num_kv_heads, dim),
        draw(num_new, num_kv_heads, v_dim),
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
    layer: str,
    heads: tuple,
    name: str,
    batch: tuple,
    samples: int,
) -> None:
    inputs = _inputs(heads, batch)
    launches, repeats, expected = {}, {}, None
    for arm, module in arms.items():

        def launch(module=module):
            module.extend_attention_fwd(*inputs, sliding_window_size=heads[-1])

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
    times: Dict[str, List[float]] = {arm: [] for arm in arms}
    for _ in range(samples):
        for arm, launch in launches.items():
            times[arm].append(round(_sample(launch, repeats[arm]), 5))
    case = {"layer": layer, "new + cached": name}
    for arm, values in times.items():
        results.add(case, arm, "time", "ms", values)
    flops = _flops(heads, batch)
    for arm in arms:
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

    loaded = {name: _load(name, folder) for name, folder in folders.items()}
    arms = {name: module for name, (module, _) in loaded.items()}
    results = Results.start(
        *("kernels", args.name, "Extend attention"),
        dtype="bfloat16",
        file_sha256={name: sha256 for name, (_, sha256) in loaded.items()},
    )
    layers = MODEL if args.shapes == "model" else HEADS
    batches = MODEL_BATCHES if args.shapes == "model" else HEADS_BATCHES
    cases = [(layer, name) for layer in layers for name in batches]
    for layer, name in tqdm(cases, unit="case"):
        _measure(results, arms, layer, layers[layer], name, batches[name], args.samples)
        torch.cuda.empty_cache()

    print(f"wrote {results.save(path)}")
    for table in tables(results):
        print(f"\n{table}")


if __name__ == "__main__":
    main()
