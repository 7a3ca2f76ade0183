"""A layer's experts for many rows: where Gluon's products are taken, and against float64.

Without a GPU the products are torch's, and Triton's interpreter runs what puts tokens
together again; the tests marked `gpu` run all of it.
"""

import importlib
import os
import sys
from unittest import mock

import pytest
import torch
from expert_inputs import A4B, KINDS, SHAPES, gelu_and_mul, layer, sort_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe
from sglang.srt.runtime_context import get_parallel
from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci
from sglang.test.test_utils import published_topology

CUDA = torch.cuda.is_available()
HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9
INTERPRET = {} if CUDA else {"TRITON_INTERPRET": "1"}
with mock.patch.dict(os.environ, INTERPRET):
    from sglang.kernels.ops.moe import expert_gemm

    importlib.reload(expert_gemm)

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")
register_cuda_ci(est_time=60, suite="stage-b-test-1-gpu-small")
ALIGN = "sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size"


@pytest.fixture(autouse=True, scope="module")
def _one_rank():
    with mock.patch.dict(os.environ, INTERPRET), published_topology(
        device="cuda" if CUDA else "cpu"
    ), get_parallel().override(tp_group=mock.Mock(world_size=1)):
        yield


def oracle(x, w1, w2, weights, ids):
    """The definition; nothing is rounded between."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for e in range(len(w1)):
        t, j = (ids == e).nonzero(as_tuple=True)
        h = gelu_and_mul(x[t].double() @ w1[e].double().T)
        out.index_add_(0, t, h @ w2[e].double().T * weights[t, j, None].double())
    return out


def product(a, b, out, sorting, counter, num_valid, topk, gated):
    """expert_product by torch."""
    assert out.isnan().all() and counter[0] == 0
    counter += 1
    rows, blocks, (end,) = sorting
    for p in (rows[:end] < num_valid).nonzero().view(-1):
        row = a[rows[p] // topk if gated else p]
        y = b[blocks[p // expert_gemm.BLOCK_M]] @ row
        out[p] = gelu_and_mul(y) if gated else y


@pytest.mark.skipif(CUDA, reason="computes on the CPU")
@settings(max_examples=settings().max_examples // 4)
@given(
    tokens=st.integers(1, 300),
    num_experts=st.integers(1, 5),
    topk=st.integers(1, 3),
    hidden=st.sampled_from((16, 1040)),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1 << 20),
)
def test_each_token_gets_its_experts(tokens, kind, seed, num_experts, topk, hidden):
    shape = dict(num_experts=num_experts, topk=min(topk, num_experts))
    inputs = layer(tokens, kind, seed, torch.float32, width=8, hidden=hidden, **shape)
    want = oracle(*inputs)
    x = inputs[0]
    with mock.patch.object(
        sys.modules[ALIGN], "moe_align_block_size", sort_rows
    ), mock.patch.object(expert_gemm, "_get_expert_product", lambda: product):
        torch.use_deterministic_algorithms(True)  # what nobody wrote is NaN
        try:
            assert expert_gemm.expert_gemm(*inputs, x) is x
        finally:
            torch.use_deterministic_algorithms(False)
    assert (x.double() - want).abs().max() < 1e-4 * want.abs().max()


def takes_it(inplace=False, activation="gelu_tanh", **changed):
    """Whether a layer of 26B-A4B with two experts takes it."""
    take = lambda name, default: changed.pop(name, default)
    tokens, width, hidden = take("tokens", 64), take("width", 704), take("hidden", 2816)
    dtype = take("dtype", torch.bfloat16)
    empty = lambda *size, dtype=dtype: torch.empty(size, dtype=dtype, device="meta")
    x, topk = empty(tokens, hidden), (tokens, 8)
    hopper, gluon = take("hopper", True), take("gluon", True)
    invariant = take("invariant", False)
    with mock.patch.multiple(
        expert_gemm,
        is_sm90_supported=lambda: hopper,
        _get_expert_product=lambda: gluon,
        is_batch_invariant_mode_enabled=lambda: invariant,
    ), mock.patch.multiple(
        fused_moe,
        _is_cuda=take("cuda", True),
        can_use_expert_gemm=expert_gemm.can_use_expert_gemm,
        expert_gemm=mock.DEFAULT,
        _prepare_fused_moe_run=lambda *_, **__: (None,) * 7,
        _fused_moe_kernel_sequence=mock.DEFAULT,
    ) as mocks:
        fused_moe.fused_experts_impl(
            x,
            empty(2, 2 * width, hidden),
            empty(2, hidden, width),
            empty(*topk, dtype=torch.float32),
            empty(*topk, dtype=torch.int32),
            inplace=inplace,
            activation=activation,
            filter_expert=take("filter_expert", False),
            **changed,
        )
    called = mocks["expert_gemm"].called
    assert called != mocks["_fused_moe_kernel_sequence"].called
    if called:
        assert (mocks["expert_gemm"].call_args.args[-1] is x) == inplace
    return called


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [{}, dict(width=64), dict(hidden=256, tokens=900)])
def test_where_it_is_taken(inplace, shape):
    assert takes_it(inplace, **shape)


@pytest.mark.parametrize(
    "changed",
    [
        dict(tokens=63),  # less than 256 rows an expert
        dict(width=352),  # two ranks
        dict(hidden=2944),
        dict(dtype=torch.float16),
        dict(activation="gelu"),
        dict(activation="silu"),
        dict(is_gated=False),
        dict(b1=torch.empty(0)),
        dict(b2=torch.empty(0)),
        dict(filter_expert=True),
        dict(no_combine=True),
        dict(defer_sum=True),
        dict(routed_scaling_factor=2.0),
        dict(apply_router_weight_on_input=True),
        dict(cuda=False),
        dict(hopper=False),
        dict(gluon=None),
        dict(invariant=True),
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_stays_with_the_triton_kernel(changed):
    assert not takes_it(**changed)


def test_without_gluon_one_line_says_so(monkeypatch, caplog):
    name = "sglang.kernels.ops.moe.expert_gemm_gluon"
    monkeypatch.setitem(sys.modules, name, None)  # as if its import failed
    expert_gemm._get_expert_product.cache_clear()
    assert not expert_gemm._get_expert_product()
    assert not expert_gemm._get_expert_product()
    expert_gemm._get_expert_product.cache_clear()
    assert len([r for r in caplog.records if "Experts take" in r.getMessage()]) == 1


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not HOPPER, reason="Hopper")(test))


def run(*inputs):
    return expert_gemm.expert_gemm(*inputs, torch.empty_like(inputs[0]))


def serve(x, w1, w2, weights, ids):
    return fused_moe.outplace_fused_experts(
        x, w1, w2, weights, ids, activation="gelu_tanh", filter_expert=False
    )


def error(got, want):
    """Of the worst row and of all, relative to the root mean square."""
    d = (got.double() - want).square().mean(-1).sqrt() / want.square().mean().sqrt()
    return torch.stack([d.max(), d.square().mean().sqrt()])


@gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens,shape", SHAPES)
def test_against_float64(tokens, kind, shape):
    """As near as the Triton kernel, and the same bits each time."""
    inputs = layer(tokens, kind, 0, torch.bfloat16, **shape)
    want = oracle(*inputs)
    outs = [run(*inputs) for _ in range(3)]
    assert all(torch.equal(outs[0], out) for out in outs)
    with mock.patch.object(fused_moe, "can_use_expert_gemm", lambda *_: False):
        triton_error = error(serve(*inputs), want)
    assert (error(outs[0], want) < 1.3 * triton_error + 3e-4).all()


@gpu
def test_in_a_graph_beside_another_stream_and_in_place():
    inputs, others = (layer(4096, kind, 1, torch.bfloat16, **A4B) for kind in KINDS[:2])
    want, want_others = run(*inputs), run(*others)
    assert torch.equal(serve(*inputs), want)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        out = run(*inputs)
    for _ in range(5):
        out.zero_()
        torch.cuda.synchronize()
        graph.replay()
        with torch.cuda.stream(stream):
            got_others = run(*others)
        torch.cuda.synchronize()
        assert torch.equal(out, want) and torch.equal(got_others, want_others)
    x = inputs[0]
    assert expert_gemm.expert_gemm(*inputs, x) is x and torch.equal(x, want)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
