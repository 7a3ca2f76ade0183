"""`--kv-cache-dtype fp8_e4m3` with the torch_native attention backend, which needs no AMX:
all keys and values are read as the cache rounds and clips them."""

import unittest
from types import SimpleNamespace
from unittest import mock

import test_torch_native_swa as swa
import torch

from sglang.srt.mem_cache import kv_cache_configurator
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")

FP8 = torch.float8_e4m3fn


class TestTorchNativeKvFp8(swa.TestTorchNativeSWA):
    """The cases of test_torch_native_swa.py, whose oracle is in float64."""

    kv_dtype = FP8

    def as_stored(self, values):
        return values.clamp(-448, 448).to(FP8).float()

    def test_large_values_are_clipped(self):
        values = torch.tensor([447.0, 448, 449, 470, 1e4, 3e38, -449, -1e30] * 2)
        clipped = torch.tensor([448.0] * 6 + [-448.0] * 2).repeat(2)
        k = values.expand(2, swa.KV_HEADS, swa.HEAD_DIM)
        slots = torch.tensor([3, 5])
        for layer_id, layer in self.layers.items():
            self.pool.full_to_swa_index_mapping[slots] = slots
            self.backend.token_to_kv_pool.set_kv_buffer(
                layer, KVWriteLoc(slots, slots), k.clone(), -k
            )
            for buffer, sign in zip(self.pool.get_kv_buffer(layer_id), (1, -1)):
                for row in buffer[slots].flatten(0, 1).float():
                    self.assertEqual(row.tolist(), (sign * clipped).tolist())


class TestRefused(CustomTestCase):
    """What the pools' configuration says before it asks for memory."""

    class Passed(Exception):
        pass

    def configure(self, *backends):
        spec = SimpleNamespace(is_none=mock.Mock(side_effect=self.Passed))
        configurator = SimpleNamespace(
            kv_cache_dtype=FP8, use_mla_backend=False, spec_algorithm=spec
        )
        with mock.patch.multiple(
            kv_cache_configurator,
            attention_backends=lambda: backends,
            cpu_has_amx_support=lambda: False,
        ):
            kv_cache_configurator.KVCacheConfigurator.configure(
                configurator, pre_model_load_memory=0
            )

    def test_backends(self):
        with self.assertRaises(self.Passed):
            self.configure("torch_native", "torch_native")
        for backends in (
            ("intel_amx", "intel_amx"),
            ("torch_native", "intel_amx"),
            ("triton", "triton"),
        ):
            with self.subTest(backends), self.assertRaisesRegex(ValueError, "CPU FP8"):
                self.configure(*backends)


if __name__ == "__main__":
    unittest.main()
