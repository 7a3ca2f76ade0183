"""The verify kernel of the Triton backend against a float64 oracle.

On CUDA where there is a GPU, else on CPU tensors in Triton's interpreter.
"""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from verify_case import (  # noqa: F401
    CUDA,
    Case,
    _interpret,
)

from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci

register_cpu_ci(est_time=15, suite="stage-a-test-cpu")
register_cuda_ci(est_time=30, suite="stage-b-test-1-gpu-small")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


SMALL = {
    "a chain": dict(lens=[5, 0, 200], num_draft=4, heads=4, kv_heads=2, head_dim=32),
    "one token": dict(lens=[0], num_draft=1, heads=1, kv_heads=1, head_dim=64),
    "more rows than a tile": dict(
        lens=[90, 0], num_draft=16, heads=16, kv_heads=1, head_dim=32
    ),
    "a window, v narrower": dict(
        lens=[200, 63, 64, 65, 3],
        num_draft=5,
        heads=6,
        kv_heads=3,
        head_dim=64,
        v_head_dim=32,
        window=64,
    ),
    "a window narrower than the draft": dict(
        lens=[40, 2], num_draft=8, heads=2, kv_heads=1, head_dim=32, window=3
    ),
    "views of one projection": dict(
        lens=[70, 1, 200],
        num_draft=4,
        heads=4,
        kv_heads=2,
        head_dim=64,
        v_head_dim=32,
        window=64,
        fused=True,
    ),
    "full layers of Gemma 4": dict(
        lens=[130, 33], num_draft=4, heads=16, kv_heads=2, head_dim=512
    ),
    "not a power of two": dict(
        lens=[100], num_draft=3, heads=3, kv_heads=1, head_dim=80
    ),
    "everything else": dict(
        lens=[100, 7],
        num_draft=4,
        heads=4,
        kv_heads=2,
        head_dim=32,
        window=50,
        sinks=1,
        logit_cap=5.0,
        sm_scale=0.3,
    ),
    "two scales": dict(
        lens=[200, 3],
        num_draft=4,
        heads=4,
        kv_heads=2,
        head_dim=64,
        k_scale=0.5,
        v_scale=1.5,
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_small(name):
    Case(**SMALL[name], dtype=torch.bfloat16 if CUDA else torch.float32).check()


@settings(max_examples=40 if CUDA else 10, deadline=None)
@given(st.data())
def test_any_shape(data):
    draw = data.draw
    window = draw(st.sampled_from([-1, -1, 1, 17, 64]))
    Case(
        lens=draw(st.lists(st.integers(0, 150), min_size=1, max_size=4)),
        num_draft=draw(st.integers(1, 9)),
        kv_heads=draw(st.integers(1, 2)),
        heads=2 * draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([16, 32, 48, 64])),
        window=window,
        sinks=draw(st.booleans()),
        dtype=torch.float16 if CUDA else torch.float32,
        seed=draw(st.integers(0, 99)),
    ).check()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
