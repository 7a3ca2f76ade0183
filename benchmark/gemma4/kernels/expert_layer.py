"""Times the experts of a layer: SGLang's Triton kernel beside the products for Hopper.

    python -m gemma4 kernel expert-layer --name expert-layer-h200

A sample is one replay of a CUDA graph of whole layers, from the routing to the sum, in
Gemma-4-26B-A4B's shape; the arms take turns, replay by replay. `fork` is the product in
Gluon, also below the number of rows from which it is taken. Each arm is compared with
float64 first. `bytes` is what must be read and written at the rate of a large copy. A card
that lowers its clock at its power limit does so for both arms: look at the least sample,
too.
"""

from dataclasses import asdict
from functools import partial
from typing import Callable
from unittest import mock

import torch
from gemma4.arguments import positive
from gemma4.errors import UserError
from gemma4.kernels.launches import (
    ROUTINGS,
    layer_calls,
    random_weights,
    start_layers,
)
from gemma4.kernels.runner import Run, agree
from gemma4.kernels.tiles import DOWN, GATE_UP, Layer

TITLE, SAMPLES = "A layer's experts at prefill sizes", 21
TOKENS = (1024, 2048, 4096, 6144, 8192, 16384)
A4B = Layer(128, 704, 2816, 8, "bfloat16", "gelu_tanh")
CALLS = 4  # of a graph


def arguments(parser) -> None:
    parser.add("--tokens", "The tokens of a layer.", TOKENS, type=positive, nargs="+")


def measure(run: Run) -> None:
    start_layers()
    run.set(**asdict(A4B))
    run.against = ["Triton"]
    weights = [random_weights(A4B, projection) for projection in (GATE_UP, DOWN)]
    cases = [(tokens, kind) for tokens in run.args.tokens for kind in ROUTINGS]
    for tokens, kind in run.cases(cases, "whole layers"):
        call = layer_calls(A4B, weights, tokens, kind)[0]
        states, w1, w2, (topk_weights, ids, _), _ = call.args
        check(states, w1, w2, ids)
        exact = oracle(states, w1, w2, topk_weights, ids)
        arms = {"Triton": partial(layer_of, False, call)}
        arms["fork"] = partial(layer_of, True, call)
        for name, arm in arms.items():
            agree(f"{name} at {tokens} tokens, {kind},", arm(), exact)
        used = len(ids.unique()) * (w1[0].nbytes + w2[0].nbytes)
        moved = used + 2 * states.nbytes + topk_weights.nbytes + ids.nbytes
        calls = {name: [arm] * CALLS for name, arm in arms.items()}
        run.time({"tokens": tokens, "routing": kind}, calls, moved)


def check(*inputs) -> None:
    """Raises UserError where the fork's products cannot be taken for any number of rows."""
    from sglang.kernels.ops.moe import expert_gemm

    with mock.patch.object(expert_gemm, "MIN_ROWS_PER_EXPERT", 0):
        if not expert_gemm.can_use_expert_gemm(*inputs, A4B.activation):
            raise UserError(
                "The fork's products are not taken here: they need a Hopper GPU, and a "
                "Triton whose Gluon has what they use."
            )


def layer_of(fork: bool, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Calls a layer with the fork's products, however few the rows are, or without."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    with mock.patch.object(fused_moe, "can_use_expert_gemm", lambda *_: fork):
        return call()


def oracle(states, w1, w2, topk_weights, ids) -> torch.Tensor:
    """The definition in float64; nothing is rounded between."""
    out = torch.zeros(states.shape, dtype=torch.float64, device=states.device)
    for e in ids.unique().tolist():
        token, slot = (ids == e).nonzero(as_tuple=True)
        gate, up = (states[token].double() @ w1[e].double().T).chunk(2, -1)
        h = torch.nn.functional.gelu(gate, approximate="tanh") * up
        weight = topk_weights[token, slot, None].double()
        out.index_add_(0, token, h @ w2[e].double().T * weight)
    return out
