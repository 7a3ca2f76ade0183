"""The layers of Gemma 4 differ, and so do their LoRA buffers, on each tensor-parallel
rank; what no adapter may change is refused by name."""

import unittest
from types import SimpleNamespace
from unittest import mock

from sglang.srt.layers import linear as linear_layers
from sglang.srt.lora.mem_pool import LoRAMemoryPool
from sglang.srt.models.gemma4_lora import Gemma4LoRAMixin
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")

HIDDEN, WIDTH = 64, 32


class Model(Gemma4LoRAMixin):
    """Two sliding layers and two full ones, the last of each with KV of the first."""

    lora_prefix = "language_model."

    def __init__(self, **fields):
        text = SimpleNamespace(
            hidden_size=HIDDEN,
            intermediate_size=WIDTH,
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            num_attention_heads=16,
            num_key_value_heads=2,
            head_dim=8,
            swa_num_attention_heads=16,
            swa_num_key_value_heads=8,
            swa_head_dim=4,
            **fields,
        )
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.text = text

    def named_modules(self):
        return []


class TestShapes(CustomTestCase):
    def test_every_rank(self):
        """Against the linear layers that the model makes."""
        model = Model()
        for tp_size in (1, 2, 4, 8, 16):
            pool = object.__new__(LoRAMemoryPool)
            pool.base_hf_config = model.text
            pool.max_loras_per_batch, pool.tp_size = 3, tp_size
            pool.attn_tp_size = pool.moe_tp_size = tp_size
            for layer, kind in enumerate(model.text.layer_types):
                full = kind == "full_attention"
                with self.subTest(tp_size=tp_size, layer=layer):
                    heads = (8, 16, 2) if full else (4, 16, 8)
                    # As on the first of these ranks.
                    with mock.patch.multiple(
                        linear_layers,
                        _resolve_linear_group=lambda _: None,
                        get_group_rank_size=lambda _, n=tp_size: (0, n),
                    ):
                        linear = linear_layers.QKVParallelLinear(
                            HIDDEN, *heads, bias=False
                        )
                    a = pool.get_lora_A_shape("qkv_proj", model, 5, layer)
                    b = pool.get_lora_B_shape("qkv_proj", model, 5, layer)
                    self.assertEqual(a, (3, 15, HIDDEN))
                    rows = linear.q_proj_shard_size + 2 * linear.kv_proj_shard_size
                    self.assertEqual(b, (3, rows, 5))
                    a = pool.get_lora_A_shape("o_proj", model, 5, layer)
                    self.assertEqual(a, (3, 5, linear.q_proj_shard_size))
                    b = pool.get_lora_B_shape("o_proj", model, 5, layer)
                    self.assertEqual(b, (3, HIDDEN, 5))

    def test_double_wide(self):
        model = Model(num_kv_shared_layers=2, use_double_wide_mlp=True)
        for layer in range(4):
            width = WIDTH * (2 if layer >= 2 else 1)
            self.assertEqual(
                model.get_hidden_dim("gate_up_proj", layer), (HIDDEN, 2 * width)
            )
            self.assertEqual(model.get_hidden_dim("down_proj", layer), (width, HIDDEN))

    def test_modules(self):
        model = Model()
        layer = "language_model.layers.3"
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj"):
            self.assertTrue(model.should_apply_lora(f"{layer}.{name}"))
        for name in (
            f"{layer}.moe.experts",
            f"{layer}.router.proj",
            f"{layer}.per_layer_projection",
            "vision_tower.encoder.layers.3.self_attn.qkv_proj",
            "vision_tower.encoder.layers.3.mlp.down_proj",
        ):
            self.assertFalse(model.should_apply_lora(name), name)


class TestRefused(CustomTestCase):
    def test_names(self):
        model = Model(attention_k_eq_v=True)
        layer = "base_model.model.model.language_model.layers"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"):
            model.check_lora_weight(f"{layer}.1.{name}.lora_A.weight")
        for name in ("self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            model.check_lora_weight(f"{layer}.2.{name}.lora_B.weight")
        model.check_lora_weight(
            "base_model.model.model.layers.0.mlp.down_proj.lora_A.x"
        )
        for name in (
            f"{layer}.1.self_attn.v_proj.lora_A.weight",
            f"{layer}.1.experts.lora_A.weight",
            f"{layer}.1.experts.7.gate_proj.lora_A.weight",
            f"{layer}.1.router.proj.lora_A.weight",
            f"{layer}.1.per_layer_input_gate.lora_B.weight",
            "base_model.model.model.language_model.embed_tokens.lora_embedding_A",
            "base_model.model.model.vision_tower.encoder.layers.1.self_attn.q_proj"
            ".linear.lora_A.weight",
            "base_model.model.model.audio_tower.layers.1.self_attn.q_proj.lora_A.weight",
        ):
            with self.subTest(name), self.assertRaisesRegex(ValueError, name):
                model.check_lora_weight(name)


if __name__ == "__main__":
    unittest.main()
