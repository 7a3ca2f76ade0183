"""How the verify kernel splits the prefixes of a batch, against a float64 oracle.

On CUDA where there is a GPU, else on CPU tensors in Triton's interpreter; the large
shapes and CUDA graphs need a GPU.
"""

import sys

import pytest
import torch
from verify_case import (  # noqa: F401
    CUDA,
    DEVICE,
    TOLERANCE,
    Case,
    _interpret,
    ops,
)

from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci

register_cpu_ci(est_time=15, suite="stage-a-test-cpu")
register_cuda_ci(est_time=120, suite="stage-b-test-1-gpu-small")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def needs_gpu(test):
    test = pytest.mark.skipif(not CUDA, reason="needs a GPU")(test)
    return pytest.mark.gpu(test)


def test_parts_of_the_requests_do_not_overlap():
    """Lengths at which a prefix ends just where a split does, or one before or after."""
    unit = ops._MIN_SPLIT_LEN
    lens = [0, 1, unit - 1, unit, unit + 1, 0, 2 * unit, 5 * unit - 1, 0]
    dtype = torch.float16 if CUDA else torch.float32
    Case(lens, 2, 2, 1, 16, dtype=dtype, seed=3).check()
    Case([unit] * 5, 2, 2, 1, 16, dtype=dtype, seed=4).check()


@pytest.mark.parametrize("programs_per_core, share", [(1, 0.9), (2, 0.8)])
def test_splits(programs_per_core, share):
    """That share of what can run at once does, with the fewest splits."""
    for cores in (1, 6, 132):
        for tiles in (1, 2, 16, 64, 160, 640, 5000):
            splits = ops._get_splits_per_seq(tiles, cores, programs_per_core)
            at_once = cores * programs_per_core
            for n in range(1, splits + 1):
                rounds = -(-tiles * n // at_once)
                busy = tiles * n >= share * rounds * at_once
                assert busy == (n == splits), (cores, tiles, n)


LARGE = [
    dict(lens=[100] * 128, num_draft=1, heads=8, kv_heads=8, head_dim=64),
    dict(lens=[0, 1, 7, 70000, 333], num_draft=4, heads=16, kv_heads=2, head_dim=512),
    dict(lens=[9000] * 3, num_draft=4, heads=16, kv_heads=8, head_dim=256, window=1023),
    dict(
        lens=[5000, 0, 64, 1022, 1023, 1024],
        num_draft=4,
        heads=16,
        kv_heads=8,
        head_dim=256,
        window=1023,
    ),
    dict(
        lens=list(range(0, 2560, 20)),
        num_draft=4,
        heads=16,
        kv_heads=8,
        head_dim=256,
        window=1023,
    ),
    dict(lens=[900, 0, 17], num_draft=16, heads=16, kv_heads=1, head_dim=128),
    dict(lens=[300, 4000], num_draft=16, heads=16, kv_heads=2, head_dim=512),
    dict(lens=[300, 4000], num_draft=8, heads=32, kv_heads=2, head_dim=256),
    dict(
        lens=[900, 40], num_draft=3, heads=8, kv_heads=8, head_dim=192, v_head_dim=128
    ),
    dict(lens=[900, 40], num_draft=7, heads=8, kv_heads=2, head_dim=80),
    dict(lens=[31, 2000], num_draft=4, heads=32, kv_heads=8, head_dim=128, sinks=1),
    dict(
        lens=[900, 3000],
        num_draft=4,
        heads=16,
        kv_heads=8,
        head_dim=256,
        window=1023,
        fused=True,
    ),
    dict(lens=[900], num_draft=4, heads=16, kv_heads=2, head_dim=512, fused=True),
]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("i", range(len(LARGE)))
def test_large(i, dtype):
    Case(**LARGE[i], dtype=dtype).check()


@needs_gpu
@pytest.mark.parametrize("i", [1, 3, 10])
@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_kv(i, kv_dtype):
    case = {**LARGE[i], "kv_dtype": kv_dtype, "k_scale": 0.7, "v_scale": 1.3}
    Case(**case, dtype=torch.bfloat16).check()


@needs_gpu
@pytest.mark.parametrize("window", [-1, 255])
def test_cuda_graph(window):
    """A graph that was captured at one set of lengths serves others."""
    shape = dict(num_draft=4, heads=16, kv_heads=8, head_dim=256, window=window)
    shape["dtype"] = torch.bfloat16
    case = Case([1] * 6, **shape)
    room = torch.zeros(60000, dtype=case.slots.dtype, device=DEVICE)
    room[: len(case.slots)] = case.slots
    k, v = (
        torch.zeros(60000, *b.shape[1:]).to(b) for b in (case.k_buffer, case.v_buffer)
    )
    case.slots, case.k_buffer, case.v_buffer = room, k, v
    case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run()
    for lens in ([0] * 6, [3000, 0, 1, 40000, 255, 256], [1000] * 6):
        other = Case(lens, **shape, seed=len(lens))
        for name in ("q", "k_draft", "v_draft", "kv_indptr"):
            getattr(case, name).copy_(getattr(other, name))
        room[: len(other.slots)] = other.slots
        k[: len(other.k_buffer)], v[: len(other.v_buffer)] = (
            other.k_buffer,
            other.v_buffer,
        )
        graph.replay()
        assert (out - other.expected()).abs().max() <= TOLERANCE[torch.bfloat16]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
