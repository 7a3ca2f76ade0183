"""The fused Gemma 4 router against a float64 oracle.

On CUDA where there is a GPU, else on CPU tensors in Triton's interpreter; only the
largest shapes and what a CPU does not have (graphs, the allocator) need a GPU.
"""

import importlib
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Set for this module alone: servers that other tests start must not inherit it.
INTERPRET = {} if CUDA else {"TRITON_INTERPRET": "1"}
with mock.patch.dict(os.environ, INTERPRET):
    from sglang.kernels.ops.moe import gemma4_routing as ops

    ops = importlib.reload(ops)

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))

from gemma4.checkpoint import SHAPES as SHAPES_OF_CHECKPOINTS  # noqa: E402
from tiny_gemma4 import OnCuda, ask_model, load_model  # noqa: E402

from sglang.test.ci.ci_register import (  # noqa: E402
    register_cpu_ci,
    register_cuda_ci,
)

register_cpu_ci(est_time=90, suite="stage-a-test-cpu")
register_cuda_ci(est_time=60, suite="stage-b-test-1-gpu-small")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BITS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 32}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
# Deselected by the marker where there is a conftest that does so, else skipped.
NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU"))


def needs_gpu(test):
    for mark in NEEDS_GPU:
        test = mark(test)
    return test


# tokens, experts, kept
SHAPES = [
    *((0, 128, 8), (1, 1, 1), (2, 2, 1), (33, 2, 2), (1, 3, 1), (31, 3, 2)),
    *((2, 96, 1), (31, 96, 8), (1, 96, 16), (2, 127, 2), (1, 127, 10), (1, 128, 1)),
    *((2, 128, 2), (1, 128, 5), (33, 128, 8), (2, 128, 10), (1, 128, 16)),
    *((2, 129, 5), (1, 129, 16), (1, 256, 8), (2, 256, 10), (2, 1000, 1)),
    *((1, 1000, 8), (2, 1000, 16), (1, 1024, 32)),
]
LONG_SHAPES = [
    *((1024, 128, 2, torch.bfloat16), (520, 128, 1, torch.float32)),
    (2049, 128, 1, torch.bfloat16),
    *(
        pytest.param(T, E, K, dtype, marks=NEEDS_GPU)
        for T, E, K in [(1024, 128, 8), (8191, 96, 5), (8191, 1000, 16)]
        for dtype in DTYPES
    ),
    *(pytest.param(250000, 128, 8, dtype, marks=NEEDS_GPU) for dtype in DTYPES),
]


@pytest.fixture(autouse=True, scope="module")
def _interpret():
    with mock.patch.dict(os.environ, INTERPRET):
        yield


def _oracle(logits: torch.Tensor, scale: torch.Tensor, topk: int):
    """Ids by a stable sort, weights in float64; the order among NaNs is arbitrary."""
    x = logits.double().cpu().numpy()
    rank = np.where(np.isnan(x), -np.inf, -x)
    # numpy's lexsort is stable, and its last key is the first to decide.
    ids = np.lexsort((rank, ~np.isnan(x)), axis=-1)[:, :topk]
    kept = np.take_along_axis(x, ids, axis=-1)
    with np.errstate(invalid="ignore"):
        gap = np.where(kept == kept[:, :1], 0.0, kept - kept[:, :1])
    weights = np.exp(gap)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights * scale.double().cpu().numpy()[ids], ids


def _check(logits: torch.Tensor, topk: int, scale_dtype=torch.float32):
    T, E = logits.shape
    scale = torch.rand(E, generator=torch.Generator().manual_seed(E)) + 0.5
    scale = scale.to(logits.device, scale_dtype)
    weights, ids = ops.gemma4_fused_routing(logits, scale, topk)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert weights.shape == ids.shape == (T, topk)

    expected_weights, expected_ids = _oracle(logits, scale, topk)
    weights, ids = weights.cpu().numpy(), ids.cpu().numpy()
    assert ((ids >= 0) & (ids < E)).all()
    assert (np.diff(np.sort(ids, axis=-1), axis=-1) > 0).all(), "an id is there twice"
    nan = np.isnan(logits.double().cpu().numpy())
    if nan.any():
        # NaNs come first; they are compared as a set.
        is_nan = np.take_along_axis(nan, ids, axis=-1)
        expected_nan = np.take_along_axis(nan, expected_ids, axis=-1)
        np.testing.assert_array_equal(is_nan, expected_nan)
        ids, expected_ids = np.where(is_nan, -1, ids), np.where(
            is_nan, -1, expected_ids
        )
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5, atol=1e-7)


def _randn(T: int, E: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(1000 * T + E)
    return torch.randn((T, E), generator=generator, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, E, K", SHAPES)
def test_shapes(T, E, K, dtype):
    _check(_randn(T, E, dtype), K)


@pytest.mark.parametrize("T, E, K, dtype", LONG_SHAPES)
def test_long_shapes(T, E, K, dtype):
    _check(_randn(T, E, dtype), K)


def _special_rows(dtype: torch.dtype, E: int) -> torch.Tensor:
    inf, info = float("inf"), torch.finfo(dtype)
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, (E,), generator=generator) * 2.0 - 1
    ramp = torch.arange(E, dtype=torch.float64)
    normal = torch.randn(E, generator=generator, dtype=torch.float64)
    one = torch.full((E,), -inf, dtype=torch.float64)
    one[E // 2] = -1.0
    # Neighbours in the dtype: 1 + a few units in the last place.
    near = 1 + info.eps * torch.randint(0, 40, (E,), generator=generator)
    rows = [
        torch.zeros(E),
        sign * 0.0,
        ramp // 5,
        -(ramp // 5),
        ramp,
        -ramp,
        near,
        -near,
        normal - 3,
        normal.round(),
        normal * info.smallest_normal / 8,  # denormals, both signs
        sign * info.smallest_normal * info.eps,  # the smallest there are
        torch.where(ramp % 3 == 0, sign * info.max, normal),
        torch.full((E,), info.min),
        torch.full((E,), -inf),
        one,
        torch.where(ramp % 20 == 7, normal, -inf),
        torch.where(ramp == 11, inf, normal),
        torch.where(ramp % 50 == 9, inf, normal),
        torch.where(ramp % 2 == 0, inf, -inf),
    ]
    return torch.stack([row.double() for row in rows]).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E, K", [(128, 8), (100, 16)])
def test_ties_infinities_denormals_extremes(E, K, dtype):
    _check(_special_rows(dtype, E), K)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan(dtype):
    integer = torch.int16 if BITS[dtype] == 16 else torch.int32
    quiet = torch.tensor(float("nan"), dtype=dtype).view(integer).item()
    first = torch.tensor(float("inf"), dtype=dtype).view(integer).item() + 1
    lowest = -(2 ** (BITS[dtype] - 1))
    rows = _randn(7, 128, dtype).view(integer)
    for row, bits in enumerate([quiet, first, quiet + lowest, first + lowest]):
        rows[row, 77] = bits
    rows[4] = first
    rows[5, ::2] = -1
    rows[6, 3] = quiet
    rows = rows.view(dtype)
    rows[6, 90:] = float("inf")
    _check(rows, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None)
@given(data=st.data())
def test_arbitrary_bits(dtype, data):
    E, K = data.draw(st.sampled_from([(5, 3), (128, 8)]))
    integer, numpy_integer = (
        (torch.int16, np.int16) if BITS[dtype] == 16 else (torch.int32, np.int32)
    )
    low, high = np.iinfo(numpy_integer).min, np.iinfo(numpy_integer).max
    # Few distinct patterns make ties, many make none.
    patterns = data.draw(st.lists(st.integers(low, high), min_size=1, max_size=2 * E))
    seed = data.draw(st.integers(0, 2**32 - 1))
    picked = np.random.default_rng(seed).choice(patterns, (1, E)).astype(numpy_integer)
    _check(torch.from_numpy(picked).view(integer).view(dtype).to(DEVICE), K)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", ["columns", "rows", "transposed", "repeated", "odd"])
def test_strides(view, dtype):
    wide = _randn(6, 300, dtype)
    logits = {
        "columns": wide[:, 7:135],
        "rows": wide[::3, :128],
        "transposed": _randn(128, 3, dtype).t(),
        "repeated": wide[:1, :128].expand(3, -1),
        "odd": wide.flatten()[1 : 1 + 2 * 129].view(2, 129)[:, :128],
    }[view]
    _check(logits, 8)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scale_dtypes(dtype, scale_dtype):
    _check(_randn(3, 128, dtype), 8, scale_dtype)


@pytest.mark.parametrize("experts, topk", [(1025, 8), (8, 9), (64, 33)])
def test_more_than_it_was_built_for(experts, topk):
    logits = torch.zeros(2, experts, device=DEVICE)
    with pytest.raises(AssertionError, match="topk|E<=1024"):
        ops.gemma4_fused_routing(logits, torch.ones(experts, device=DEVICE), topk)


@needs_gpu
def test_more_than_two_to_the_31_logits():
    T = 2**31 // 128 + 5000
    logits = torch.empty((T, 128), dtype=torch.bfloat16, device=DEVICE).normal_()
    scale = torch.ones(128, device=DEVICE)
    weights, ids = ops.gemma4_fused_routing(logits, scale, 8)
    for part in (slice(0, 5000), slice(T - 6000, T)):
        expected_weights, expected_ids = _oracle(logits[part], scale, 8)
        np.testing.assert_array_equal(ids[part].cpu().numpy(), expected_ids)
        np.testing.assert_allclose(
            weights[part].cpu().numpy(), expected_weights, rtol=1e-5, atol=1e-7
        )


@needs_gpu
@pytest.mark.parametrize("T", [1, 1024, 8192])
def test_graph_without_sync_and_two_allocations(T):
    logits = _randn(T, 128, torch.bfloat16)
    scale = torch.ones(128, device=DEVICE)
    ops.gemma4_fused_routing(logits, scale, 8)
    torch.cuda.synchronize()

    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept = ops.gemma4_fused_routing(logits, scale, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 2
    del kept

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, ids = ops.gemma4_fused_routing(logits, scale, 8)
    for seed in range(3):
        logits.copy_(_randn(T + seed + 1, 128, torch.bfloat16)[1 + seed :])
        graph.replay()
        expected_weights, expected_ids = _oracle(logits, scale, 8)
        np.testing.assert_array_equal(ids.cpu().numpy(), expected_ids)
        np.testing.assert_allclose(
            weights.cpu().numpy(), expected_weights, rtol=1e-5, atol=1e-7
        )


@needs_gpu
def test_compiles_once_a_shape_class():
    scale = torch.ones(128, device=DEVICE)
    kernel = ops._gemma4_routing_kernel
    kernel.device_caches.clear()
    for T in (1, 2, 16, 17, 100, 512, 513, 1024, 2048, 2049, 4096, 10000):
        ops.gemma4_fused_routing(_randn(T, 128, torch.bfloat16), scale, 8)
    assert sum(len(cache[0]) for cache in kernel.device_caches.values()) == 3


def _moe_outputs(folder: str, port: int) -> list:
    """Each MoE layer of a checkpoint, routed by the kernel and by torch, on the CPU."""
    from sglang.srt.models import gemma4_causal

    model, config = load_model(folder, port)

    torch.manual_seed(0)
    layers = []
    for layer in model.model.layers:
        outputs = {}
        hidden_states = torch.randn(37, config.hidden_size)
        routing = gemma4_causal.gemma4_fused_routing
        fused = mock.Mock(
            side_effect=lambda logits, *rest: routing(
                logits.as_subclass(torch.Tensor), *rest
            )
        )
        for name in ("fused", "torch"):
            with mock.patch.multiple(
                gemma4_causal, gemma4_fused_routing=fused
            ), torch.no_grad():
                router_logits = layer.router(hidden_states)
                if name == "fused":
                    # The interpreter stands in for the GPU that they are not on.
                    router_logits = router_logits.as_subclass(OnCuda)
                topk_weights, topk_ids, _ = layer.moe.topk(hidden_states, router_logits)
                output = layer.moe(hidden_states, router_logits)
            outputs[name] = [t.numpy() for t in (topk_weights, topk_ids, output)]
        outputs["calls"] = fused.call_count
        layers.append(outputs)
    return layers


def test_moe_layers_as_with_torch(tmp_path):
    layers = ask_model(_moe_outputs, tmp_path / "tiny")

    assert len(layers) == SHAPES_OF_CHECKPOINTS["tiny"].text["num_hidden_layers"]
    for outputs in layers:
        assert outputs["calls"] == 2
        (weights, ids, output), expected = outputs["fused"], outputs["torch"]
        np.testing.assert_array_equal(ids, expected[1])
        np.testing.assert_allclose(weights, expected[0], rtol=2e-6)
        scale = np.abs(expected[2]).max()
        assert scale > 0
        np.testing.assert_allclose(output, expected[2], rtol=1e-5, atol=1e-6 * scale)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
