"""The fused q/k/v norm and rotary embedding of Gemma 4 against a float64 oracle.

On CUDA where there is a GPU, else on CPU tensors in Triton's interpreter.
"""

import importlib
import os
import sys
from types import SimpleNamespace
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
    from sglang.kernels.ops.attention import gemma4_qkv_norm_rope as ops

    ops = importlib.reload(ops)

from tiny_gemma4 import OnCuda, ask_model, load_model  # noqa: E402

from sglang.test.ci.ci_register import (  # noqa: E402
    register_cpu_ci,
    register_cuda_ci,
)

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")
register_cuda_ci(est_time=30, suite="stage-b-test-1-gpu-small")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-6
MAX_POSITION = 64
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
# Deselected by the marker where there is a conftest that does so, else skipped.
NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU"))


def needs_gpu(test):
    for mark in NEEDS_GPU:
        test = mark(test)
    return test


# tokens, q heads, kv heads, head size
SHAPES = [
    *((1, 16, 8, 256), (2, 16, 2, 512), (0, 4, 2, 64), (3, 4, 1, 64), (1, 1, 1, 2)),
    *((2, 3, 2, 96), (2, 5, 5, 34), (7, 2, 1, 128)),
]
LONG_SHAPES = [
    *((80, 16, 8, 256), (8192, 16, 8, 256), (8191, 16, 2, 512), (1000, 3, 1, 96)),
    *((5000, 5, 3, 80), (70000, 1, 1, 256)),
]


@pytest.fixture(autouse=True, scope="module")
def _interpret():
    with mock.patch.dict(os.environ, INTERPRET):
        yield


class Case:
    """A buffer of projected q, k and v, with what stands beside them."""

    def __init__(self, shape, dtype, kv=True, seed=0, scale=1.0):
        self.M, self.q_heads, self.kv_heads, self.D = shape
        self.dtype, self.kv = dtype, kv
        rng = np.random.default_rng(seed)

        def tensor(values, dtype=dtype):
            values = np.asarray(values)
            return torch.empty(values.shape, dtype=dtype, device=DEVICE).copy_(
                torch.from_numpy(values)
            )

        self.sizes = [h * self.D for h in (self.q_heads, self.kv_heads, self.kv_heads)]
        width = sum(self.sizes)
        # 3 columns before and 5 after, that must stay as they are.
        self.wide = tensor(scale * rng.standard_normal((self.M, width + 8)))
        self.q_weight = tensor(rng.standard_normal(self.D))
        self.k_weight = tensor(rng.standard_normal(self.D))
        self.positions = tensor(rng.integers(0, MAX_POSITION, self.M), torch.int64)
        angles = rng.uniform(0, 7, (MAX_POSITION, self.D // 2))
        self.cache = tensor(
            np.concatenate([np.cos(angles), np.sin(angles)], axis=1), torch.float32
        )

    def run(self, **kwargs) -> list:
        """Normalizes a copy in place; [q, k, v] as [M, heads, D] float64."""
        self.after = wide = self.wide.clone()
        q, k, v = wide[:, 3:-5].split(self.sizes, dim=-1)
        ops.gemma4_qkv_rmsnorm_rope(
            q,
            k if self.kv else None,
            v if self.kv else None,
            self.q_weight,
            self.k_weight,
            self.positions,
            self.cache,
            num_q_heads=self.q_heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.D,
            eps=EPS,
            **kwargs,
        )
        kept = [slice(0, 3), slice(-5, None)]
        if not self.kv:
            kept.append(slice(3 + self.sizes[0], None))
        for columns in kept:
            assert torch.equal(wide[:, columns], self.wide[:, columns])
        return self._heads(wide)[: 3 if self.kv else 1]

    def new_kv(self) -> list:
        """k and v of the last run, [M, kv_heads, D] each."""
        _, *kv = self.after[:, 3:-5].split(self.sizes, dim=-1)
        return [x.unflatten(-1, (self.kv_heads, self.D)) for x in kv]

    def _heads(self, wide) -> list:
        parts = wide[:, 3:-5].double().cpu().numpy()
        parts = np.split(parts, np.cumsum(self.sizes)[:-1], axis=1)
        return [x.reshape(self.M, x.shape[1] // self.D, self.D) for x in parts]

    def expected(self) -> list:
        """For q, k and v: (exact values, the error that rounding twice may leave)."""
        unit = torch.finfo(self.dtype).eps / 2
        if not CUDA and self.dtype == torch.bfloat16:
            unit *= 2  # the interpreter truncates
        cache = self.cache.double().cpu().numpy()[self.positions.cpu().numpy()]
        cos, sin = np.split(cache[:, None, :], 2, axis=-1)
        weights = [w.double().cpu().numpy() for w in (self.q_weight, self.k_weight)]
        found = []
        for x, weight in zip(self._heads(self.wide), [*weights, None]):
            y = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS)
            size = 0.0
            if weight is not None:
                y = y * weight
                a, b = np.split(y, 2, axis=-1)
                y = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
                a, b = abs(a), abs(b)
                size = [a * abs(cos) + b * abs(sin), b * abs(cos) + a * abs(sin)]
                size = np.concatenate(size, axis=-1)
            # The second term is the float32 arithmetic's.
            allowed = unit * (size + abs(y)) + 3e-6 * (size + abs(y))
            if self.dtype == torch.float16:
                allowed += 2.0**-24  # denormals
            found.append((y, allowed))
        return found

    def check(self, **kwargs):
        for got, (exact, allowed) in zip(self.run(**kwargs), self.expected()):
            assert got.shape == exact.shape
            assert (abs(got - exact) <= 1.02 * allowed).all(), (
                abs(got - exact) / allowed
            ).max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype):
    Case(shape, dtype).check()


@needs_gpu
@pytest.mark.parametrize("shape", LONG_SHAPES, ids=str)
def test_long_shapes(shape):
    Case(shape, torch.bfloat16).check()


@pytest.mark.parametrize("shape", [(2, 16, 8, 256), (2, 3, 2, 96)], ids=str)
def test_without_kv(shape):
    Case(shape, torch.bfloat16, kv=False).check()


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_any_shape(data):
    shape = (
        data.draw(st.integers(0, 4)),
        data.draw(st.integers(1, 9)),
        data.draw(st.integers(1, 5)),
        2 * data.draw(st.integers(1, 80)),
    )
    case = Case(
        shape,
        data.draw(st.sampled_from(DTYPES)),
        kv=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 2**32 - 1)),
        scale=data.draw(st.sampled_from([1e-3, 1.0, 1e3])),
    )
    case.check()


def test_zeros_infinities_and_nan_stay_in_their_heads():
    case = Case((2, 4, 2, 64), torch.bfloat16)
    case.wide[0, 3 : 3 + 64] = 0
    case.wide[0, 3 + 70] = float("nan")
    case.wide[1, 3 + 130] = float("inf")
    expected = case.expected()
    (q, *kv), (exact_q, allowed) = case.run(), expected[0]
    assert (q[0, 0] == 0).all()
    assert np.isnan(q[0, 1]).all()
    assert np.isnan(q[1, 2]).any()
    for token, head in [(0, 2), (0, 3), (1, 0), (1, 1), (1, 3)]:
        error = abs(q[token, head] - exact_q[token, head])
        assert (error <= 1.02 * allowed[token, head]).all()
    for got, (exact, allowed) in zip(kv, expected[1:]):
        assert (abs(got - exact) <= 1.02 * allowed).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_positions_of_both_integer_types(dtype):
    case = Case((5, 2, 1, 64), torch.bfloat16)
    case.positions = case.positions.to(dtype)
    case.check()


@needs_gpu
@pytest.mark.parametrize("shape", [(1, 16, 8, 256), (80, 16, 2, 512)], ids=str)
def test_equals_norm_then_rotary_embedding(shape):
    """What the model computed with two launches, but for single roundings."""
    from sglang.kernels.ops.attention.rope import apply_rope_with_cos_sin_cache_inplace
    from sglang.kernels.ops.layernorm.gemma4_fused_ops import gemma_qkv_rmsnorm

    case = Case(shape, torch.bfloat16)
    fused = case.run()
    q, k, v = (x.clone() for x in case.wide[:, 3:-5].split(case.sizes, dim=-1))
    heads = (case.q_heads, case.kv_heads, case.D, EPS)
    gemma_qkv_rmsnorm(q, k, v, case.q_weight, case.k_weight, *heads)
    q, k, v = (x.unflatten(-1, (-1, case.D)) for x in (q, k, v))
    apply_rope_with_cos_sin_cache_inplace(
        positions=case.positions, q=q, k=k, cos_sin_cache=case.cache, is_neox=True
    )
    for got, expected in zip(fused, (q, k, v)):
        expected = expected.double().cpu().numpy()
        # The compilers contract the float32 products differently.
        assert (got != expected).mean() < 1e-3
        # Beside the larger of the two numbers whose difference it is.
        np.testing.assert_allclose(got, expected, rtol=2**-6, atol=2**-8)


@needs_gpu
@pytest.mark.parametrize("M", [1, 8192])
def test_graph_without_sync_and_allocations(M):
    case = Case((M, 16, 8, 256), torch.bfloat16)
    case.check()
    wide = case.wide.clone()
    q, k, v = wide[:, 3:-5].split(case.sizes, dim=-1)
    rest = (case.q_weight, case.k_weight, case.positions, case.cache)
    rest += (case.q_heads, case.kv_heads, case.D, EPS)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.gemma4_qkv_rmsnorm_rope(q, k, v, *rest)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.gemma4_qkv_rmsnorm_rope(q, k, v, *rest)
    for seed in (1, 2):
        other = Case((M, 16, 8, 256), torch.bfloat16, seed=seed)
        wide.copy_(other.wide)
        case.wide = other.wide
        graph.replay()
        for got, (exact, allowed) in zip(case._heads(wide), case.expected()):
            assert (abs(got - exact) <= 1.02 * allowed).all()


def attend(attention, hidden_states, on_cuda, forward_batch=None, backend=None):
    """The tensors that a layer hands to attention, and whether that is to store them."""
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor.forward_context import (
        ForwardContext,
        forward_context,
    )

    project = attention.qkv_proj.forward

    class Seen(Exception):
        pass

    def seen(q, k, v, forward_batch, save_kv_cache):
        raise Seen([q, k, v], save_kv_cache)

    def forward(x):
        qkv, bias = project(x)
        return (qkv.as_subclass(OnCuda) if on_cuda else qkv), bias

    positions = torch.arange(3, 3 + len(hidden_states))
    with mock.patch.object(attention.qkv_proj, "forward", forward), mock.patch.object(
        attention.attn, "forward", seen
    ), torch.no_grad(), forward_context(
        ForwardContext(backend or AttentionBackend())
    ), pytest.raises(
        Seen
    ) as error:
        attention(positions, hidden_states, forward_batch=forward_batch)
    tensors, save_kv_cache = error.value.args
    return [
        x if x is None else x.as_subclass(torch.Tensor) for x in tensors
    ], save_kv_cache


def _attention_inputs(folder: str, port: int) -> list:
    """q, k and v as each layer of a checkpoint hands them to attention, with the launch
    and in torch."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.models import gemma4_causal

    model, config = load_model(folder, port)
    torch.manual_seed(0)
    batch = SimpleNamespace(forward_mode=ForwardMode.DECODE)
    layers = []
    for layer in model.model.layers:
        attention = layer.self_attn
        hidden_states = torch.randn(7, config.hidden_size)
        fused = mock.Mock(wraps=gemma4_causal.gemma4_qkv_rmsnorm_rope)
        rotate = mock.Mock(wraps=attention.rotary_emb.forward)
        found = {"can fuse": attention.can_fuse_rope}
        for name, on_cuda in [("torch", False), ("fused", True)]:
            fused.reset_mock()
            rotate.reset_mock()
            with mock.patch.object(
                attention.rotary_emb, "forward", rotate
            ), mock.patch.multiple(gemma4_causal, gemma4_qkv_rmsnorm_rope=fused):
                tensors, _ = attend(attention, hidden_states, on_cuda, batch)
            calls = fused.call_count, rotate.call_count
            found[name] = (
                [x.numpy().reshape(7, -1, attention.head_dim) for x in tensors],
                calls,
            )
        layers.append(found)
    return layers


def test_attention_inputs_as_with_torch(tmp_path):
    layers = ask_model(_attention_inputs, tmp_path / "tiny")

    head_sizes = {layer["torch"][0][0].shape[-1] for layer in layers}
    assert len(head_sizes) == 2
    for layer in layers:
        assert layer["can fuse"]
        expected, calls = layer["torch"]
        assert calls == (0, 1)
        tensors, calls = layer["fused"]
        assert calls == (1, 0)
        for got, want in zip(tensors, expected):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
