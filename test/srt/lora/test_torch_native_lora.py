"""The torch_native backend of LoRA on a CPU: each token gets its own adapter's product."""

import unittest
from types import SimpleNamespace

import torch

from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABackend
from sglang.srt.lora.layers import QKVParallelLinearWithLoRA, RowParallelLinearWithLoRA
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")

RANKS, SCALES, MAX_RANK = [0, 2, 4, 3], [0.0, 0.5, 2.0, 1.0], 4
HIDDEN, SIZES = 16, (12, 8, 8)


def batch(lengths):
    """A batch of prompts of these lengths, or of decoded tokens if all are None."""
    decode = lengths[0] is None
    lengths = [1 if n is None else n for n in lengths]
    return SimpleNamespace(
        batch_size=len(lengths),
        forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
        extend_seq_lens=torch.tensor(lengths, dtype=torch.int32),
        extend_seq_lens_cpu=lengths,
    )


class TestTorchNativeLoRA(CustomTestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.backend = TorchNativeLoRABackend(len(RANKS), torch.device("cpu"))

    def prepare(self, lengths, adapters):
        self.backend.prepare_lora_batch(batch(lengths), adapters, RANKS, SCALES, False)
        tokens = [a for n, a in zip(lengths, adapters) for _ in range(n or 1)]
        return tokens, torch.randn(len(tokens), HIDDEN)

    def check(self, layer, a, b, sizes, tokens, x):
        """Compare with the products, token by token and slice by slice."""
        base = torch.randn(len(tokens), sum(sizes))
        got = layer.apply_lora(base.clone(), x)
        expected = base.clone()
        for row, adapter in enumerate(tokens):
            rank, start = RANKS[adapter], 0
            for i, size in enumerate(sizes):
                a_slice = a[adapter, i * rank : (i + 1) * rank]
                b_slice = b[adapter, start : start + size, :rank]
                delta = b_slice @ (a_slice @ x[row])
                expected[row, start : start + size] += SCALES[adapter] * delta
                start += size
        torch.testing.assert_close(got, expected)

    def test_layers(self):
        base = SimpleNamespace(
            q_proj_shard_size=SIZES[0], kv_proj_shard_size=SIZES[1], tp_size=1
        )
        linear = torch.nn.Linear(HIDDEN, sum(SIZES), bias=False)
        for name, value in vars(base).items():
            setattr(linear, name, value)
        linear.output_size = linear.output_size_per_partition = sum(SIZES)
        linear.output_partition_sizes = list(SIZES)
        for lengths in ([3, 1, 5, 2, 4], [None] * 5):
            for adapters in ([0, 1, 2, 3, 1], [0] * 5, [2] * 5, [1, 1, 0, 0, 3]):
                with self.subTest(lengths=lengths, adapters=adapters):
                    tokens, x = self.prepare(lengths, adapters)
                    qkv = QKVParallelLinearWithLoRA(linear, self.backend)
                    a = torch.randn(len(RANKS), 3 * MAX_RANK, HIDDEN)
                    b = torch.randn(len(RANKS), sum(SIZES), MAX_RANK)
                    qkv.set_lora_info(a, b)
                    self.check(qkv, a, b, SIZES, tokens, x)

                    row = RowParallelLinearWithLoRA(linear, self.backend)
                    a, b = a[:, :MAX_RANK].contiguous(), b
                    row.set_lora_info(a, b)
                    self.check(row, a, b, [sum(SIZES)], tokens, x)


if __name__ == "__main__":
    unittest.main()
