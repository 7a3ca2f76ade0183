"""The experts' products: their own code on numpy, with its warps in random order."""

import os
from unittest import mock

import pytest
import torch
from expert_inputs import KINDS, Products, layer
from gluon_machine import INTERPRET, on_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

with mock.patch.dict(os.environ, INTERPRET):
    from sglang.kernels.ops.moe import expert_gemm_gluon


@pytest.mark.skipif(torch.cuda.is_available(), reason="computes on the CPU")
@settings(max_examples=settings().max_examples // 8)
@given(
    tokens=st.integers(1, 300),
    num_experts=st.integers(1, 5),
    topk=st.integers(1, 3),
    width=st.sampled_from((64, 128, 192)),
    hidden=st.sampled_from((256, 512)),
    kind=st.sampled_from(KINDS),
    programs=st.integers(1, 3),
    seed=st.integers(0, 1 << 20),
)
def test_against_float64(tokens, kind, seed, programs, num_experts, topk, **shape):
    shape.update(num_experts=num_experts, topk=min(topk, num_experts))
    products = Products(
        *layer(tokens, kind, seed, torch.float32, **shape),
        expert_gemm_gluon.BLOCK_M.value,
    )
    with on_numpy(expert_gemm_gluon, "expert_gemm_kernel", seed), mock.patch.object(
        expert_gemm_gluon, "_num_programs", lambda device: programs
    ):
        found = products.call(expert_gemm_gluon.expert_product)
    for got, want in zip(found, (products.gated, products.down)):
        assert (got - want).abs().max() < 1e-4 * want.abs().max()
