"""Time the fused Gemma 4 router beside torch, other projects' kernels and the limits.

    python benchmark/gemma4/bench_routing.py --name routing-h200
    python benchmark/gemma4/bench_routing.py --name routing-h200 --peer-site DIR

Other projects' kernels are read from their own wheels, installed here or unpacked in
DIR (`pip install --no-deps --target DIR sglang==0.5.23`), without importing the rest of
them; one that is not there is skipped. A sample is one replay of a CUDA graph of 50
launches; the arms take turns, replay by replay. The logits were written just before,
as in a model, so they come from the L2 cache as long as they fit. The limits: an empty
launch, and the bytes of logits and outputs at the rate of a large copy.

A second table puts the router behind the matrix product that makes its logits, where
a kernel that is launched early (programmatic dependent launch) shows what that gives.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import statistics
import sys
import types
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, Optional

import torch
import triton
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from results import FOLDER, Results, tables  # noqa: E402
from timing import copy_rate, time_in_turn  # noqa: E402

TOKENS = (1, 8, 32, 80, 160, 320, 512, 1024, 2048, 4096, 8192, 16384, 65536, 262144)
PROJECTED_TOKENS = (1, 8, 80, 320, 1024, 8192)
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
LAUNCHES = 50
OURS = "sglang/kernels/ops/moe/gemma4_routing.py"

# The distribution, its file, the function's name and how it is called.
PEERS = {
    "sglang": (
        "sglang/kernels/ops/moe/gemma4_routing.py",
        "gemma4_fused_routing",
        lambda route, logits, scale, topk: route(logits, scale, topk),
    ),
    "vllm": (
        "vllm/model_executor/models/gemma4.py",
        "gemma4_fused_routing_kernel_triton",
        lambda route, logits, scale, topk: route(logits, topk, scale),
    ),
}


@triton.jit
def _empty_kernel(pointer):
    pass


def _torch_routing(logits, scale, topk):
    """The chain of torch operations that the fused kernels stand for."""
    topk_logits, topk_ids = torch.topk(logits, k=topk, dim=-1)
    topk_weights = torch.nn.functional.softmax(topk_logits, dim=-1)
    topk_weights = topk_weights * scale[topk_ids].to(topk_weights.dtype)
    return topk_weights.to(torch.float32), topk_ids.to(torch.int32)


def _load_ours(path: Optional[Path]) -> tuple:
    """(routing function, SHA-256 of its file); the file needs torch and triton alone."""
    if path is None:
        checkout = Path(__file__).parents[2] / "python" / OURS
        found = importlib.util.find_spec("sglang")
        installed = Path(found.origin).parents[1] / OURS if found else checkout
        path = checkout if checkout.exists() else installed
    if not path.exists():
        raise SystemExit(f"{path} does not exist: run `make fork`, or give --kernel")
    spec = importlib.util.spec_from_file_location("gemma4_routing", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "gemma4_fused_routing"):
        raise SystemExit(f"{path} has no gemma4_fused_routing: is the series applied?")
    return module.gemma4_fused_routing, hashlib.sha256(path.read_bytes()).hexdigest()


def _load_peer(name: str, sites: List[str]) -> Optional[tuple]:
    """(arm, routing function) of a distribution's newest copy with a fused router."""
    file, function, call = PEERS[name]
    found = importlib.metadata.Distribution.discover(
        name=name, path=[*sites, *sys.path]
    )
    versions = []
    for distribution in found:
        versions.append(distribution.version)
        path = Path(distribution.locate_file(file))
        if not path.exists():
            continue
        # Only the function and the kernels of that file, so that the package, which
        # may need what is not here, is not imported.
        tree = ast.parse(path.read_text())
        kernels = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef)
            and (node.name == function or "_gemma4_routing_kernel" == node.name)
        ]
        module = types.ModuleType(f"{name}_routing")
        module.__dict__.update(torch=torch, triton=triton, tl=triton.language)
        sys.modules[module.__name__] = module
        code = compile(ast.Module(kernels, []), str(path), "exec")
        exec(code, module.__dict__)
        route = getattr(module, function)
        arm = f"{name} {distribution.version}"
        return arm, lambda *args: call(route, *args)
    reason = f"{versions[0]} has no {file}" if versions else "is not installed"
    print(f"{name} {reason}: skipped")
    return None


def _check(arms: Dict[str, Callable], experts: int, topk: int) -> None:
    """Every arm selects what a float64 sort does, or the times mean nothing."""
    scale = torch.rand(experts, device="cuda") + 0.5
    logits = torch.randn((1000, experts), device="cuda")
    values, ids = torch.sort(logits.double(), dim=-1, descending=True, stable=True)
    weights = torch.softmax(values[:, :topk], dim=-1) * scale.double()[ids[:, :topk]]
    for name, route in arms.items():
        got_weights, got_ids = route(logits, scale, topk)
        if not torch.equal(got_ids.long(), ids[:, :topk]):
            raise SystemExit(f"{name} selects other experts than a float64 sort")
        torch.testing.assert_close(got_weights.double(), weights, rtol=1e-4, atol=1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--name", default="routing", help="of the result file")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of results")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2816, help="of the projection")
    parser.add_argument("--replays", type=int, default=21, help="samples of each arm")
    parser.add_argument(
        "--peer-site", action="append", default=[], help="folder of unpacked wheels"
    )
    parser.add_argument("--kernel", type=Path, help="another gemma4_fused_ops.py")
    args = parser.parse_args()
    path = args.out / f"{args.name}.json"
    if path.exists():
        parser.exit(1, f"{path} exists: give another --name, or remove it\n")
    if not torch.cuda.is_available():
        parser.exit(1, "no GPU: the router's kernels are timed on one\n")

    ours, sha256 = _load_ours(args.kernel)
    arms = {"torch": _torch_routing, "fork": ours}
    arms.update(filter(None, (_load_peer(name, args.peer_site) for name in PEERS)))
    _check(arms, args.experts, args.topk)

    rate = copy_rate()
    results = Results.start(
        *("kernels", args.name, "Gemma 4 router"),
        experts=args.experts,
        topk=args.topk,
        hidden=args.hidden,
        launches_a_sample=LAUNCHES,
        kernel_sha256=sha256,
        copy_bytes_per_us=round(rate),
        limits=["empty launch", "bytes"],
    )
    results.notes.append(
        "`fork` is the file of settings.kernel_sha256; a version of sglang or vllm is "
        "the peer's."
    )
    torch.manual_seed(0)
    scale = torch.rand(args.experts, device="cuda") + 0.5
    weight = torch.randn((args.experts, args.hidden), device="cuda") * 0.02

    cases = [(T, d, "normal") for d in args.dtypes for T in args.tokens]
    if "float32" in args.dtypes:
        cases += [(T, "float32", "all far") for T in args.tokens]
    for tokens, dtype, kind in tqdm(cases, desc="alone", unit="case"):
        logits = torch.randn((tokens, args.experts), device="cuda").to(DTYPES[dtype])
        if kind == "all far":
            # The float32 kernel's slow path in every row: only the best is positive.
            logits = -logits.abs()
            logits[:, 0] = 1
        calls = {
            name: [partial(route, logits, scale, args.topk)] * LAUNCHES
            for name, route in arms.items()
        }
        calls["empty launch"] = [partial(_empty_kernel[(1,)], logits)] * LAUNCHES
        case = {"tokens": tokens, "dtype": dtype, "logits": kind}
        for name, samples in time_in_turn(calls, args.replays).items():
            results.add(case, name, "time", "us", samples)
        moved = logits.nbytes + scale.nbytes + tokens * args.topk * 8
        results.add(case, "bytes", "time", "us", [round(moved / rate, 4)])

    cases = [(T, d) for d in args.dtypes for T in PROJECTED_TOKENS]
    for tokens, dtype in tqdm(cases, desc="behind the projection", unit="case"):
        hidden = torch.randn((tokens, args.hidden), device="cuda").to(DTYPES[dtype])
        matrix = weight.to(DTYPES[dtype]).t()
        logits = hidden @ matrix

        def project(route=None):
            torch.mm(hidden, matrix, out=logits)
            if route is not None:
                route(logits, scale, args.topk)

        calls = {
            name: [partial(project, route)] * LAUNCHES for name, route in arms.items()
        }
        calls["projection alone"] = [project] * LAUNCHES
        case = {"tokens": tokens, "dtype": dtype, "logits": "projected"}
        for name, samples in time_in_turn(calls, args.replays).items():
            results.add(case, name, "time with projection", "us", samples)

    print(f"wrote {results.save(path)}")
    for table in tables(results):
        print(f"\n{table}")
    peers = [name for name in arms if name not in ("torch", "fork")]
    if peers:
        ratios = []
        for record in results.select("fork", "time"):
            others = [results.get(record.case, peer, "time").median for peer in peers]
            ratios.append(record.median / min(others))
        print(
            f"\nfork: {min(ratios):.2f} to {max(ratios):.2f} of the faster peer's time, "
            f"median {statistics.median(ratios):.2f}"
        )


if __name__ == "__main__":
    main()
