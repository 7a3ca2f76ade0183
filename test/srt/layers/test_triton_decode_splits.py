"""Decode attention with many KV splits against a float64 oracle, and how many splits
its backend takes.

On CUDA where there is a GPU, else on CPU tensors in Triton's interpreter.
"""

import importlib
import os
import sys
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
    import sglang.srt.layers.attention.triton_ops.decode_attention as ops

    ops = importlib.reload(ops)

from sglang.srt.layers.attention.triton_backend import TritonAttnBackend  # noqa: E402
from sglang.test.ci.ci_register import (  # noqa: E402
    register_cpu_ci,
    register_cuda_ci,
)

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")
register_cuda_ci(est_time=30, suite="stage-b-test-1-gpu-small")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True, scope="module")
def _interpret():
    with mock.patch.dict(os.environ, INTERPRET):
        yield


def _check(
    lengths,
    heads,
    kv_heads,
    size,
    splits,
    most,
    dtype=torch.float32,
    sinks=False,
    logit_cap=0.0,
    v_scale=1.0,
    seed=0,
):
    """`splits` of each request, of at most `most`; keys in random slots."""
    rng = np.random.default_rng(seed)
    total, requests = sum(lengths), len(lengths)

    def tensor(*shape, dtype=dtype):
        values = torch.from_numpy(rng.standard_normal(shape))
        return torch.empty(shape, dtype=dtype, device=DEVICE).copy_(values)

    q = tensor(requests, heads, size)
    k, v = tensor(total + 5, kv_heads, size), tensor(total + 5, kv_heads, size)
    sink = tensor(heads, dtype=torch.float32) if sinks else None
    slots = rng.permutation(total + 5)[:total]
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    out = torch.full_like(q, float("nan"))
    # What unused splits leave must not be read.
    parts = torch.full((requests, heads, most, size), float("nan"), device=DEVICE)
    logs = torch.full((requests, heads, most), float("nan"), device=DEVICE)
    scale = size**-0.5
    ops.decode_attention_fwd(
        *(q, k, v, out),
        torch.from_numpy(indptr).to(DEVICE, torch.int32),
        torch.from_numpy(slots).to(DEVICE),
        *(parts, logs, torch.tensor(splits, dtype=torch.int32, device=DEVICE), most),
        *(scale, 1.0, v_scale),
        logit_cap=logit_cap,
        sinks=sink,
    )

    q, k, v, out = (x.double().cpu().numpy() for x in (q, k, v, out))
    for i in range(requests):
        rows = slots[indptr[i] : indptr[i + 1]]
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            logits = k[rows, kv_head] @ q[i, head] * scale
            if logit_cap:
                logits = logit_cap * np.tanh(logits / logit_cap)
            if sinks:
                logits = np.append(logits, sink[head].item())
            weights = np.exp(logits - logits.max())
            weights = (weights / weights.sum())[: len(rows)]
            exact = weights @ v[rows, kv_head] * v_scale
            # Tensor cores take float32 as tf32, and p is rounded to v's dtype.
            rtol = 2e-5 if not CUDA and dtype == torch.float32 else 2e-2
            allowed = rtol * (weights @ abs(v[rows, kv_head])) * v_scale
            assert (abs(out[i, head] - exact) <= allowed + 1e-7).all()


@pytest.mark.parametrize("most", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("heads, kv_heads", [(4, 1), (2, 2)])
def test_splits(most, heads, kv_heads):
    _check(
        [1, 33, 100, 64], heads, kv_heads, 16, [most, 1, most, 2][:4], most=max(most, 2)
    )


def test_more_splits_than_blocks_of_keys():
    _check([1, 31, 32, 33], 4, 2, 32, [64] * 4, most=64)


@pytest.mark.parametrize("size", [24, 64, 80])
def test_head_sizes(size):
    _check([70, 200], 4, 2, size, [3, 7], most=8)


def test_sinks_caps_and_scales():
    _check([5, 90], 4, 2, 32, [2, 3], most=16, sinks=True)
    _check([5, 90], 4, 2, 32, [2, 3], most=16, logit_cap=3.0)
    _check([5, 90], 2, 2, 32, [2, 3], most=16, sinks=True, v_scale=0.25)


@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_any_batch(data):
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=3))
    most = data.draw(st.integers(1, 70))
    group, kv_heads = data.draw(st.sampled_from([(1, 2), (2, 1), (3, 2), (8, 1)]))
    _check(
        lengths,
        group * kv_heads,
        kv_heads,
        data.draw(st.sampled_from([16, 40])),
        [data.draw(st.integers(1, most)) for _ in lengths],
        most,
        seed=data.draw(st.integers(0, 2**32 - 1)),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("heads, kv_heads, size", [(16, 8, 256), (16, 2, 512)])
@pytest.mark.parametrize("most", [8, 16, 64])
def test_gemma4_on_a_gpu(heads, kv_heads, size, most):
    lengths = [1, 1500, 33, 8500]
    for splits in ([most] * 4, [1, most, 2, most // 2]):
        _check(lengths, heads, kv_heads, size, splits, most, torch.bfloat16)


def _backend(heads, kv_heads, cores=132, most=8, scale=True):
    """The backend's own methods, without the model runner that they do not ask."""
    backend = object.__new__(TritonAttnBackend)
    vars(backend).update(
        num_head=heads,
        num_kv_head=kv_heads,
        device_core_count=cores,
        max_kv_splits=most,
        scale_kv_splits=scale,
    )
    return backend


def test_few_tokens_take_more_splits():
    # Gemma-4-26B-A4B on an H200: two programs a split.
    gemma = _backend(16, 2)
    splits = [gemma.get_max_kv_splits(n) for n in (0, 1, 2, 3, 4, 8, 9, 16, 17, 80)]
    assert splits == [32, 32, 16, 8, 8, 8, 8, 8, 8, 8]
    assert _backend(32, 32).get_max_kv_splits(1) == 8
    assert _backend(32, 8).get_max_kv_splits(1) == 8
    assert _backend(8, 1).get_max_kv_splits(1) == 64
    assert _backend(16, 2, most=128).get_max_kv_splits(1) == 128
    assert _backend(16, 2, scale=False).get_max_kv_splits(1) == 8


@pytest.mark.parametrize("heads, kv_heads", [(16, 2), (32, 8), (8, 8), (1, 1)])
@pytest.mark.parametrize("tokens", [1, 7, 16, 33, 256])
def test_graph_buffers_hold_every_batch_and_are_no_larger(heads, kv_heads, tokens):
    backend = _backend(heads, kv_heads)
    vars(backend).update(
        device="cpu",
        v_head_dim=4,
        swa_v_head_dim=2,
        req_to_token=torch.zeros((tokens, 16), dtype=torch.int32),
        skip_prefill=True,
        sliding_window_size=None,
    )
    backend.init_cuda_graph_state(tokens, tokens)
    buffers = (
        backend.cuda_graph_attn_logits,
        backend.cuda_graph_swa_attn_logits,
        backend.cuda_graph_attn_lse,
    )
    for n in range(1, tokens + 1):
        shape = (n, heads, backend.get_max_kv_splits(n))
        for buffer, size in zip(buffers, ([4], [2], [])):
            assert backend._view_splits(buffer, n).shape == (*shape, *size)
    assert backend._view_splits(None, 1) is None
    programs = heads // min(16, heads // kv_heads)
    if tokens * programs >= 8:
        assert buffers[0].shape[0] <= tokens * 8


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
