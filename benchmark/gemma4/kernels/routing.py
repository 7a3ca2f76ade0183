"""Times the fused Gemma 4 router beside torch, other projects' kernels and the limits.

    python -m gemma4 kernel routing --name routing-h200
    python -m gemma4 kernel routing --name routing-h200 --peer-site DIR

Other projects' kernels are read from their own wheels, installed here or unpacked in
DIR (`pip install --no-deps --target DIR sglang==0.5.23`), without importing the rest of
them; one that is not there is skipped. A sample is one replay of a CUDA graph of 50
launches; the arms take turns, replay by replay. The logits were written just before,
as in a model, so they come from the L2 cache as long as they fit. The limits: an empty
launch, and the bytes of logits and outputs at the rate of a large copy.

A second table puts the router behind the matrix product that makes its logits, where
a kernel that is launched early (programmatic dependent launch) shows what that gives.
"""

from functools import partial
from pathlib import Path
from typing import Callable, Dict, List

import torch
import triton
from gemma4.arguments import positive
from gemma4.errors import UserError
from gemma4.kernels import files
from gemma4.kernels.runner import BYTES, Run

TITLE, SAMPLES = "Gemma 4 router", 21
TOKENS = (1, 8, 32, 80, 160, 320, 512, 1024, 2048, 4096, 8192, 16384, 65536, 262144)
PROJECTED_TOKENS = (1, 8, 80, 320, 1024, 8192)
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
LAUNCHES = 50
FILE = "sglang/kernels/ops/moe/gemma4_routing.py"
FUNCTION = "gemma4_fused_routing"

# The distribution, its file, the function's name and how it is called.
PEERS = {
    "sglang": (
        FILE,
        FUNCTION,
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


def _peers(sites: List[str]) -> Dict[str, Callable]:
    arms = {}
    for name, (file, function, call) in PEERS.items():
        names = (function, "_gemma4_routing_kernel")
        found = files.of_peer(name, file, names, sites)
        if found:
            version, module = found
            arms[f"{name} {version}"] = partial(call, getattr(module, function))
    return arms


def _check(arms: Dict[str, Callable], experts: int, topk: int) -> None:
    """Every arm selects what a float64 sort does, or the times mean nothing."""
    scale = torch.rand(experts, device="cuda") + 0.5
    logits = torch.randn((1000, experts), device="cuda")
    values, ids = torch.sort(logits.double(), dim=-1, descending=True, stable=True)
    weights = torch.softmax(values[:, :topk], dim=-1) * scale.double()[ids[:, :topk]]
    for name, route in arms.items():
        got_weights, got_ids = route(logits, scale, topk)
        if not torch.equal(got_ids.long(), ids[:, :topk]):
            raise UserError(f"{name} selects other experts than a float64 sort.")
        torch.testing.assert_close(got_weights.double(), weights, rtol=1e-4, atol=1e-6)


def arguments(parser) -> None:
    parser.add("--tokens", "The tokens routed.", TOKENS, type=positive, nargs="+")
    dtypes = dict(nargs="+", choices=DTYPES)
    parser.add("--dtypes", "The dtypes of the logits.", tuple(DTYPES), **dtypes)
    parser.add("--experts", "How many experts there are.", 128)
    parser.add("--topk", "How many of them a token gets.", 8)
    parser.add("--hidden", "The width of the projection before the router.", 2816)
    sentence = "Adds a folder in which other projects' wheels are unpacked."
    parser.add("--peer-site", sentence, [], action="append", metavar="DIR")
    sentence = "The fork's gemma4_routing.py, where it is another."
    parser.add("--kernel", sentence, type=Path)


def measure(run: Run) -> None:
    args = run.args
    route, sha256 = files.load(files.of_fork(FILE, args.kernel), FUNCTION)
    peers = _peers(args.peer_site)
    arms = {"torch": _torch_routing, "fork": getattr(route, FUNCTION), **peers}
    _check(arms, args.experts, args.topk)
    run.against = list(peers)
    run.set(experts=args.experts, topk=args.topk, hidden=args.hidden)
    run.set(launches_a_sample=LAUNCHES, kernel_sha256=sha256)
    run.set(limits=["empty launch", BYTES])
    run.results.notes.append(
        "`fork` is the file of settings.kernel_sha256; a version of sglang or vllm is "
        "the peer's."
    )
    scale = torch.rand(args.experts, device="cuda") + 0.5
    weight = torch.randn((args.experts, args.hidden), device="cuda") * 0.02

    cases = [(T, d, "normal") for d in args.dtypes for T in args.tokens]
    if "float32" in args.dtypes:
        cases += [(T, "float32", "all far") for T in args.tokens]
    for tokens, dtype, kind in run.cases(cases, "alone"):
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
        moved = logits.nbytes + scale.nbytes + tokens * args.topk * 8
        run.time({"tokens": tokens, "dtype": dtype, "logits": kind}, calls, moved)

    cases = [(T, d) for d in args.dtypes for T in PROJECTED_TOKENS]
    for tokens, dtype in run.cases(cases, "behind the projection"):
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
        run.time(case, calls, metric="time with projection")
