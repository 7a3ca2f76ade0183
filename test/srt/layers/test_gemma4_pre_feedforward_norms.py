"""What stands between attention and the feedforward branches of a Gemma 4 MoE layer,
fused, against a float64 oracle.

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
    import sglang.kernels.ops.layernorm.gemma4_pre_feedforward as ops

    ops = importlib.reload(ops)

from tiny_gemma4 import OnCuda, ask_model, load_model  # noqa: E402

from sglang.test.ci.ci_register import (  # noqa: E402
    register_cpu_ci,
    register_cuda_ci,
)

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")
register_cuda_ci(est_time=30, suite="stage-b-test-1-gpu-small")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = (1e-6, 2e-6, 3e-6, 4e-6)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
# Deselected by the marker where there is a conftest that does so, else skipped.
NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU"))


@pytest.fixture(autouse=True, scope="module")
def _interpret():
    with mock.patch.dict(os.environ, INTERPRET):
        yield


def _inputs(M, N, dtype, seed=0, scale=1.0):
    """x and residual, each a part of wider rows, and the four weights."""
    rng = np.random.default_rng(seed)

    def tensor(*shape):
        values = torch.from_numpy(rng.standard_normal(shape) * scale)
        return torch.empty(shape, dtype=dtype, device=DEVICE).copy_(values)

    x, residual = tensor(M, N + 3)[:, 1:-2], tensor(M, N + 5)[:, 4:-1]
    return x, residual, [tensor(N) for _ in range(4)]


def _norm(x, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def _check(x, residual, weights):
    """Compares step by step, each from what the kernel itself stored before it, so
    that every output may differ by the rounding of its own steps alone."""
    dtype = x.dtype
    unit = torch.finfo(dtype).eps / 2
    if not CUDA and dtype == torch.bfloat16:
        unit *= 2  # the interpreter truncates
    before_x, before = x.clone(), residual.clone()
    outputs = ops.gemma4_pre_feedforward_rmsnorms(x, residual, *weights, *EPS)
    assert torch.equal(x, before_x)
    for output in outputs:
        assert (output.dtype, output.shape) == (dtype, x.shape)
        assert output.is_contiguous()

    def double(tensor):
        return tensor.double().cpu().numpy()

    post, mlp, router, moe = map(double, weights)
    exact = _norm(double(x), EPS[0]) * post
    summed = double(before) + exact
    sizes = unit * abs(exact) + 3e-6 * (abs(exact) + abs(double(before)))
    # 3e-6 is the float32 arithmetic's; tiny is what denormals may lose.
    tiny = 2.0**-24 if dtype == torch.float16 else 1e-30
    got = double(residual)
    allowed = sizes + unit * abs(summed) + tiny
    assert (abs(got - summed) <= 1.02 * allowed).all()

    # The MLP's norm reads the sum before it is rounded, the others after.
    for output, weight, eps, source, roundings in [
        (outputs[0], mlp, EPS[1], summed, 2),
        (outputs[1], router, EPS[2], got, 1),
        (outputs[2], moe, EPS[3], got, 1),
    ]:
        exact = _norm(source, eps) * weight
        allowed = (roundings * unit + 6e-6) * abs(exact) + 2 * tiny
        if output is outputs[0]:
            rms = np.sqrt((source**2).mean(axis=-1, keepdims=True) + eps)
            allowed += (sizes + tiny) * abs(weight) / rms
        assert (abs(double(output) - exact) <= 1.05 * allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, N", [(0, 64), (1, 2816), (3, 2816), (2, 2048), (5, 1), (4, 130)]
)
def test_shapes(M, N, dtype):
    _check(*_inputs(M, N, dtype))


@pytest.mark.parametrize(
    "M, N",
    [
        pytest.param(M, N, marks=NEEDS_GPU)
        for M, N in [(80, 2816), (8192, 2816), (1000, 5376), (70000, 2816)]
    ],
)
def test_long_shapes(M, N):
    _check(*_inputs(M, N, torch.bfloat16))


@settings(deadline=None, max_examples=15)
@given(
    M=st.integers(0, 4),
    N=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-3, 1.0, 1e2]),
)
def test_any_shape(M, N, dtype, seed, scale):
    _check(*_inputs(M, N, dtype, seed, scale))


def test_rows_do_not_mix():
    x, residual, weights = _inputs(4, 100, torch.float32)
    x[1] = float("nan")
    residual[2, 7] = float("inf")
    outputs = ops.gemma4_pre_feedforward_rmsnorms(x, residual, *weights, *EPS)
    for output in (residual, *outputs):
        finite = torch.isfinite(output).all(dim=-1)
        assert finite.tolist() == [True, False, False, True]


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("M", [1, 8, 80, 8192])
def test_as_separate_kernels(M):
    """Equal to what the layer launched before, but for single roundings."""
    from sgl_kernel import fused_add_rmsnorm, rmsnorm

    x, residual, weights = _inputs(M, 2816, torch.bfloat16)
    # A row of a wider one is contiguous, but its first byte is not aligned.
    x, residual = x.clone(), residual.clone()
    post, mlp, router, moe = weights
    summed = residual.clone()
    hidden = rmsnorm(x, post, EPS[0])
    fused_add_rmsnorm(hidden, summed, mlp, EPS[1])
    expected = [
        *(summed, hidden, rmsnorm(summed, router, EPS[2])),
        rmsnorm(summed, moe, EPS[3]),
    ]
    outputs = ops.gemma4_pre_feedforward_rmsnorms(x, residual, *weights, *EPS)
    for got, want in zip((residual, *outputs), expected):
        assert (got != want).float().mean() < 0.01
        # Of numbers near 1 that nearly cancel, a rounding is what is left.
        torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-7)


def _inputs_of_branches(folder: str, port: int) -> list:
    """What each layer of a checkpoint has where its feedforward stage has a norm, and
    what that makes: with the CPU's norms, and fused."""
    from sglang.srt.layers import gemma4_pre_feedforward as module

    model, config = load_model(folder, port)

    torch.manual_seed(0)
    layers = []
    for layer in model.model.layers:
        norms = layer._pre_feedforward_norms(config)
        attended = torch.randn(7, config.hidden_size)
        before = torch.randn(7, config.hidden_size)
        found = {"norms": type(norms).__name__}
        for name, kind in [("torch", torch.Tensor), ("fused", OnCuda)]:
            fused = mock.Mock(wraps=module.gemma4_pre_feedforward_rmsnorms)
            with mock.patch.object(
                module, "gemma4_pre_feedforward_rmsnorms", fused
            ), torch.no_grad():
                inputs, residual = norms(
                    attended.clone().as_subclass(kind), before.clone()
                )
            found[name] = [
                x.as_subclass(torch.Tensor).numpy() for x in (*inputs, residual)
            ]
            found[name, "calls"] = fused.call_count
        layers.append(found)
    return layers


def test_layers_as_with_torch(tmp_path):
    layers = ask_model(_inputs_of_branches, tmp_path / "tiny")

    for layer in layers:
        assert layer["norms"] == "Gemma4PreFeedforwardNorms"
        assert (layer["torch", "calls"], layer["fused", "calls"]) == (0, 1)
        for found, expected in zip(layer["fused"], layer["torch"], strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
