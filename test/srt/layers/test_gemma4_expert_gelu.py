"""On CUDA Gemma 4's experts have the tanh form of GELU, by the name that Triton's runner
has for it. What torch.compile takes in its place knows the name too."""

import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tiny_gemma4 import ask_model, load_model

from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=40, suite="stage-a-test-cpu")


def gated(x: torch.Tensor, form: str) -> torch.Tensor:
    gate, up = x.double().chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate=form) * up


def _on_a_gpu(folder: str, port: int) -> list:
    """Each layer's name of the activation, and how far what it computes is from each
    form, where they differ by a tenth."""
    from sglang.srt.layers.moe import fused_moe_native
    from sglang.srt.models import gemma4_causal

    with mock.patch.object(gemma4_causal, "is_cuda", lambda: True):
        model, _ = load_model(folder, port)
    found = []
    for moe in model.modules():
        if not isinstance(moe, gemma4_causal.Gemma4MoE):
            continue
        experts = moe.experts
        width = experts.w2_weight.shape[2]
        hidden = experts.w2_weight.shape[1]
        experts.w13_weight.data.zero_()
        experts.w13_weight.data[:, :width, 0] = -3.0
        experts.w13_weight.data[:, width:, 1] = 1000.0
        x = torch.zeros(5, hidden)
        x[:, :2] = 1
        topk = (torch.full((5, 2), 0.5), torch.arange(10).view(5, 2) % 4, None)
        config = experts.moe_runner_config
        gates = torch.cat([torch.full((width,), -3.0), torch.full((width,), 1000.0)])
        got = [
            fused_moe_native.moe_forward_native(experts, x, topk, config),
            fused_moe_native.fused_moe_forward_native(
                experts, SimpleNamespace(hidden_states=x, topk_output=topk)
            ).hidden_states,
        ]
        experts_used = experts.w2_weight.double()[topk[1]].mean(1)
        far = [
            [
                (
                    (g.double() - experts_used @ gated(gates, form)).abs().max()
                    / g.abs().max()
                ).item()
                for form in ("tanh", "none")
            ]
            for g in got
        ]
        found.append((config.activation, far))
    return found


def test_the_experts_activation(tmp_path):
    layers = ask_model(_on_a_gpu, tmp_path)
    assert layers
    for activation, ways in layers:
        assert activation == "gelu_tanh"
        for tanh, exact in ways:
            assert tanh < 1e-4 < 0.05 < exact


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
