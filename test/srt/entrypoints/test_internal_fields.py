"""A client cannot set what the server sets itself, nor embeddings of another size."""

import unittest
from types import SimpleNamespace

import torch

from sglang.srt.entrypoints import http_server
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")

# A value of each, as JSON may give it; what a class lacks, its parser drops.
INTERNAL = {
    "decision_layout": [0],
    "embed_overrides": [[[0.5]]],
    "positional_embed_overrides": {"embeds": [[0.5]], "positions": [0]},
    "multi_item_delimiter_indices": [0],
    "token_indices_to_pool": [0],
    "lora_id": "a",
    "http_worker_ipc": "a",
    "encoder_urls": ["a"],
    "num_items_assigned": {},
    "need_wait_for_mm_inputs": True,
}


class TestInternalFields(CustomTestCase):
    def test_refused(self):
        self.assertEqual(set(INTERNAL), set(http_server._INTERNAL_FIELDS))
        for cls in (GenerateReqInput, EmbeddingReqInput):
            http_server._refuse_internal_fields(cls(text="a"))
            for name, value in INTERNAL.items():
                if name not in cls.__dataclass_fields__:
                    continue
                with self.subTest(cls.__name__, name=name), self.assertRaisesRegex(
                    ValueError, name
                ):
                    http_server._refuse_internal_fields(cls(text="a", **{name: value}))


class TestEmbeds(CustomTestCase):
    def check(self, embeds):
        manager = object.__new__(TokenizerManager)
        manager.model_config = SimpleNamespace(hidden_size=4)
        manager._validate_embeds("embeds", embeds)

    def test_size(self):
        self.check([[0.5] * 4])
        self.check(torch.zeros(3, 4, dtype=torch.bfloat16))
        for embeds in ([[0.5] * 3], [[0.5] * 4, [0.5] * 5], [0.5] * 4, [["a"] * 4], 5):
            with self.subTest(embeds), self.assertRaisesRegex(ValueError, "embeds.*4"):
                self.check(embeds)

    def test_finite(self):
        for value in (float("nan"), float("inf"), 1e39):
            with self.subTest(value), self.assertRaisesRegex(ValueError, "finite"):
                self.check([[0.5, 0.5, 0.5, value]])

    def test_one_size_for_all(self):
        with self.assertRaisesRegex(ValueError, "shape"):
            PositionalEmbeds(embeds=[torch.zeros(4), torch.zeros(5)], positions=[0, 1])


if __name__ == "__main__":
    unittest.main()
