"""Gemma 4's fused ops under torch.compile, which piecewise CUDA graphs of a prefill use.

Text-only checkpoints are served with these graphs by default, for which Dynamo takes
the model as one graph or fails. On a GPU, compiled and eager results are compared;
without one, Dynamo traces each op, in a process where a stub stands for the driver
that Triton asks for the GPU.
"""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import pytest
import torch

from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci

register_cpu_ci(est_time=40, suite="stage-a-test-cpu")
register_cuda_ci(est_time=30, suite="stage-b-test-1-gpu-small")

CUDA = torch.cuda.is_available()


def _randn(*shape: int, device: str) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


def _routing(T: int, device: str):
    from sglang.srt.layers.gemma4_fused_ops import gemma4_fused_routing

    arguments = _randn(T, 128, device=device), _randn(128, device=device)
    return lambda logits, scale: gemma4_fused_routing(logits, scale, 8), arguments


def _pre_feedforward(T: int, device: str):
    from sglang.srt.layers.gemma4_fused_ops import gemma_pre_feedforward_rmsnorms

    def op(x, residual, weight):
        residual = residual.clone()
        norms = gemma_pre_feedforward_rmsnorms(x, residual, *[weight] * 4)
        return residual, *norms

    return op, tuple(_randn(*s, device=device) for s in ((T, 256), (T, 256), (256,)))


def _qkv_norm(T: int, device: str):
    from sglang.srt.layers.gemma4_fused_ops import gemma_qkv_rmsnorm

    def op(qkv, weight, positions, cos_sin_cache):
        qkv = qkv.clone()
        q, k, v = qkv.split([4 * 64, 2 * 64, 2 * 64], dim=-1)
        gemma_qkv_rmsnorm(
            q, k, v, weight, weight, 4, 2, 64, 1e-6, positions, cos_sin_cache
        )
        return (qkv,)

    positions = torch.arange(T, device=device)
    cos_sin_cache = torch.randn(T, 64, device=device)
    qkv, weight = _randn(T, 8 * 64, device=device), _randn(64, device=device)
    return op, (qkv, weight, positions, cos_sin_cache)


OPS = [_routing, _pre_feedforward, _qkv_norm]


class _Driver:
    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def _traced(make) -> list:
    """The kernels' launches in each graph that Dynamo makes of an op."""
    import torch.utils._triton
    from triton.runtime import driver

    driver.set_active(_Driver())
    graphs = []

    def backend(graph, inputs):
        graphs.append(
            [getattr(node.target, "__name__", "") for node in graph.graph.nodes]
        )
        raise NotImplementedError("A CPU cannot run it.")

    with mock.patch("torch.utils._triton.has_triton", lambda: True):
        op, arguments = make(64, "cpu")
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
            torch.compile(op, fullgraph=True, dynamic=True, backend=backend)(*arguments)
    return [graph.count("triton_kernel_wrapper_mutation") for graph in graphs]


def test_traced_into_one_graph():
    compiling = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    spawn = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, compiling, clear=True), ProcessPoolExecutor(
        1, mp_context=spawn
    ) as pool:
        assert list(pool.map(_traced, OPS)) == [[1]] * len(OPS)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("make", OPS)
def test_compiled_as_eager(make):
    op, _ = make(1, "cuda")
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="eager")
    for T in (2, 37, 600, 3000):
        _, arguments = make(T, "cuda")
        for got, expected in zip(compiled(*arguments), op(*arguments)):
            assert torch.equal(got, expected)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v"]))
