"""Decode attention with many KV splits against a float64 oracle, and how many splits
its backend takes.

On CUDA where there is a GPU, else on CPU tensors in Triton's interpreter.
"""

import importlib

import numpy as np
import pytest
import torch
import window_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from window_layer import CUDA, DEVICE, WindowLayer

from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")
register_cuda_ci(est_time=30, suite="stage-b-test-1-gpu-small")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True, scope="module")
def _one_process():
    with window_layer.one_process():
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
    ops = importlib.import_module(window_layer.ATTENTION[0])
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


# What the buffers of a graph are besides those of splits.
WITHOUT = dict(
    dllm_attention=None,
    lean_total_programs=1,
    lean_block_m=1,
    is_draft_runner=False,
    max_context_len=16,
    num_draft_tokens=0,
    verify_reads_mask=False,
    use_sliding_window_kv_pool=False,
)


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
        **WITHOUT,
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


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("lengths", [[200], [1], [190, 40], [200, 1, 65]])
def test_a_step_of_the_backend(lengths, graph, monkeypatch):
    """Each request's one token attends to all of its keys, whatever number of splits
    the batch got."""
    window, rows = 1000, 3
    layer = WindowLayer(window, rows, 200)
    # Of an H200, in the interpreter too: 64 splits for one token, 32 for two.
    monkeypatch.setattr(layer.backend, "scale_kv_splits", True)
    monkeypatch.setattr(layer.backend, "device_core_count", 132)
    generator = torch.Generator().manual_seed(sum(lengths))

    def draw(heads, count):
        values = torch.randn(count, heads, layer.DIM, generator=generator)
        return values.to(DEVICE)

    batch = layer.decode(lengths)
    if graph:
        layer.backend.init_cuda_graph_state(rows, rows)
        fill = layer.decode([1] * len(lengths))
        layer.backend.init_forward_metadata_out_graph(fill, in_capture=True)
        layer.backend.init_forward_metadata_out_graph(batch)
    else:
        layer.backend.init_forward_metadata(batch)
    splits = layer.backend.forward_metadata.attn_logits.shape[2]
    assert splits == {1: 64, 2: 32, 3: 16}[len(lengths)]

    keys = [draw(1, length) for length in lengths]
    values = [draw(1, length) for length in lengths]
    pool = layer.runner.token_to_kv_pool
    for slots, k, v in zip(layer.slots, keys, values):
        slots = slots[: len(k)].to(DEVICE)
        pool.get_key_buffer(0)[slots] = k
        pool.get_value_buffer(0)[slots] = v
    q = draw(layer.HEADS, len(lengths))
    out = layer.backend.forward_decode(
        q.flatten(1), None, None, layer.layer, batch, save_kv_cache=False
    )
    out = out.view(-1, layer.HEADS, layer.DIM).double().cpu()
    for i, (k, v) in enumerate(zip(keys, values)):
        logits = torch.einsum("hd,kd->hk", q[i].double(), k[:, 0].double()).cpu()
        exact = logits.softmax(-1) @ v[:, 0].double().cpu()
        torch.testing.assert_close(out[i], exact, rtol=0, atol=0.02 if CUDA else 1e-5)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
