"""What is behind the layers of Gemma 4's vision tower is computed in float32, as in
transformers, whatever the dtype of the weights.

Soft tokens are an average times the root of the hidden size, from which a bias of the
same size is taken. In 16 bits each step rounds away what the next one needs. The layers
themselves are left out on both sides.
"""

import os
import unittest
from types import SimpleNamespace

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import torch
from torch import nn
from transformers import Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

from sglang.srt.models.gemma4_vision import Gemma4VisionEncoder
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, published_topology

register_cpu_ci(est_time=15, suite="stage-a-test-cpu")

GRIDS = ((6, 9), (9, 3), (3, 3))
ROOM = 90


class States(nn.Module):
    """In place of the layers: the same states in both libraries."""

    def __init__(self, states: torch.Tensor):
        super().__init__()
        self.states = states

    def forward(self, inputs_embeds, **kwargs):
        return self.states


class TestVisionFloat32(CustomTestCase):
    def setUp(self):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.rand(len(GRIDS), ROOM, 3 * 16 * 16, generator=generator)
        self.positions = torch.full((len(GRIDS), ROOM, 2), -1)
        for i, (height, width) in enumerate(GRIDS):
            for patch in range(height * width):
                self.positions[i, patch] = torch.tensor([patch % width, patch // width])

    @torch.inference_mode()
    def check(self, dtype, scale, **config):
        config = Gemma4VisionConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            position_embedding_size=16,
            **config,
        )
        torch.manual_seed(0)
        with published_topology(device="cpu"):
            tower = Gemma4VisionEncoder(config)
        oracle = Gemma4VisionModel(config)
        weights = {
            "patch_embedder.input_proj.weight": torch.randn(64, 768) * scale,
            "patch_embedder.position_embedding_table": torch.randn(2, 16, 64) * scale,
        }
        if config.standardize:
            # As large as what it is taken from.
            weights["std_bias"] = torch.randn(64) * 8 * scale
            weights["std_scale"] = torch.rand(64) + 0.5
        real = (self.positions != -1).all(dim=-1)
        states = torch.randn(*real.shape, 64, dtype=dtype) * scale
        oracle.encoder = States(SimpleNamespace(last_hidden_state=states))
        tower.encoder = States(states[real][None])
        for model in (tower, oracle):
            model.load_state_dict(weights)
            model.to(dtype)
        expected = oracle(self.pixels, self.positions).last_hidden_state
        pooled, mask = tower(self.pixels, self.positions)
        self.assertEqual(pooled.dtype, dtype)
        self.assertTrue(expected.isfinite().all())
        # Of the average, which both round, and of the result.
        once = dict(rtol=torch.finfo(dtype).eps, atol=1e-6)
        torch.testing.assert_close(pooled[mask], expected, **once)

    def test_bfloat16(self):
        for standardize in (False, True):
            with self.subTest(standardize=standardize):
                self.check(torch.bfloat16, 0.05, standardize=standardize)

    def test_float16(self):
        for standardize in (False, True):
            with self.subTest(standardize=standardize):
                self.check(torch.float16, 0.05, standardize=standardize)

    def test_float16_beyond_its_range(self):
        """Before the bias and the scale bring them back."""
        self.check(torch.float16, 100.0, standardize=True)


if __name__ == "__main__":
    unittest.main()
