"""Gemma 4's router multiplies by its scale on every path of its norm.

The scale is folded into the weight of a norm that is built without one. The oracle is
transformers' router in float64.
"""

import os
import unittest
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import torch
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

from sglang.srt.layers import layernorm
from sglang.srt.models.gemma4_causal import Gemma4Router
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="stage-a-test-cpu")

TOKENS = 6


def _rmsnorm(x, weight, eps):
    """What the kernels of CUDA, MUSA and XPU compute, whose norm always has a weight."""
    x32 = x.float()
    return (x32 * (x32.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x)


def _gemma4_rmsnorm_cpu(x, weight, eps, scale_shift, with_scale):
    """The op of sgl_kernel's CPU build."""
    weight = weight + scale_shift if with_scale else torch.ones_like(weight)
    return _rmsnorm(x, weight, eps)


class TestGemma4RouterScale(CustomTestCase):
    def setUp(self):
        torch.manual_seed(0)
        config = Gemma4TextConfig(
            hidden_size=64, num_experts=8, top_k_experts=2, enable_moe_block=True
        )
        with torch.no_grad():
            oracle = Gemma4TextRouter(config)
            oracle.scale.uniform_(0.5, 1.5)
            oracle.proj.weight.normal_()
            self.router = Gemma4Router(config)
            self.router.scale.copy_(oracle.scale)
            self.router.proj.weight.copy_(oracle.proj.weight)
        self.x = torch.randn(TOKENS, 64)
        logits = []
        oracle = oracle.double()
        oracle.proj.register_forward_hook(lambda *args: logits.append(args[-1]))
        with torch.no_grad():
            oracle(self.x.double())
        (self.expected,) = logits

    def check(self, router):
        # Once before the scale is folded, and once after.
        for _ in range(2):
            with torch.no_grad():
                got = router(self.x)
            torch.testing.assert_close(
                got.double(), self.expected, rtol=1e-4, atol=1e-4
            )

    def through(self, name):
        """Send the norm through one of its forwards."""
        self.router.norm._forward_method = getattr(self.router.norm, name)
        self.check(self.router)

    def test_as_dispatched(self):
        self.check(self.router)

    def test_native(self):
        self.through("forward_native")

    def test_cpu(self):
        self.through("forward_cpu")

    def test_cpu_with_amx(self):
        ops = SimpleNamespace(gemma4_rmsnorm_cpu=_gemma4_rmsnorm_cpu)
        with (
            mock.patch.object(layernorm, "_is_cpu_amx_available", True),
            mock.patch.object(torch.ops, "sgl_kernel", ops, create=True),
        ):
            self.through("forward_cpu")

    def test_hip(self):
        self.through("forward_hip")

    def test_kernels_that_always_multiply(self):
        with mock.patch.object(layernorm, "rmsnorm", _rmsnorm, create=True):
            self.through("forward_cuda")
            self.through("forward_xpu")
            self.through("forward_musa")

    def test_enter_torch_compile(self):
        """As --enable-torch-compile switches, on whatever device."""
        with mock.patch.object(layernorm, "rmsnorm", _rmsnorm, create=True):
            self.through("forward_cuda")
        self.router.norm.enter_torch_compile(num_tokens=TOKENS)
        self.check(self.router)
        self.check(torch.compile(self.router, backend="eager"))
        self.router.norm.leave_torch_compile()

    def test_compiled_before_the_scale_is_folded(self):
        self.router.norm.enter_torch_compile(num_tokens=TOKENS)
        self.check(torch.compile(self.router, backend="eager"))


if __name__ == "__main__":
    unittest.main()
