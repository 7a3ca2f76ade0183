"""A request whose lists do not fit together is refused with a sentence, before anything
is kept for it."""

import asyncio
import unittest
from types import SimpleNamespace

import torch

from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")

# One value of every field that a batch may give a list of.
VALUES = {
    "sampling_params": {},
    "return_logprob": True,
    "logprob_start_len": 0,
    "top_logprobs_num": 1,
    "return_sampling_mask": False,
    "sampling_logprobs_mode": None,
    "return_hidden_states": False,
    "lora_path": "a",
    "custom_logit_processor": "a",
    "bootstrap_host": "a",
    "bootstrap_port": 1,
    "bootstrap_room": 1,
    "bootstrap_pair_key": "a",
    "decode_tp_size": 1,
}


class TestGenerate(CustomTestCase):
    def refused(self, *parts, **fields):
        with self.assertRaises(ValueError) as refused:
            GenerateReqInput(**fields).normalize_batch_and_arguments()
        for part in parts:
            self.assertIn(str(part), str(refused.exception))

    def accepted(self, **fields):
        obj = GenerateReqInput(**fields)
        obj.normalize_batch_and_arguments()
        return obj

    def test_every_field_is_tried(self):
        self.assertEqual(set(VALUES), set(io_struct._PER_REQUEST_FIELDS))

    def test_a_list_for_a_single_request(self):
        for name, value in {"rid": "a", **VALUES}.items():
            with self.subTest(name):
                self.refused(name, text="a", **{name: [value]})
                self.accepted(text="a", **{name: value})

    def test_a_list_of_another_length(self):
        lists = {"token_ids_logprob": [1], "video_data": "v", "audio_data": "a"}
        lists["modalities"] = "image"
        for name, value in {**VALUES, **lists}.items():
            for length in (1, 3):
                with self.subTest(name, length=length):
                    self.refused(name, text=["a", "b"], **{name: [value] * length})
            with self.subTest(name, length=2):
                obj = self.accepted(text=["a", "b"], **{name: [value] * 2})
                self.assertEqual(getattr(obj[1], name), value)

    def test_parallel_samples(self):
        most = io_struct.MAX_PARALLEL_SAMPLES
        for n in (0, -1, most + 1, 2**80, 1.5, "2"):
            with self.subTest(n=n):
                self.refused("n", n, text="a", sampling_params={"n": n})
        self.refused("n", most, text=["a", "b"], sampling_params={"n": most // 2 + 1})
        for params in ({}, {"n": None}, {"n": 1}):
            self.assertTrue(self.accepted(text="a", sampling_params=params).is_single)
        self.assertEqual(len(self.accepted(text="a", sampling_params={"n": 2}).text), 2)

    def test_ids_beside_texts(self):
        """A list of ids a text, or one for a single text; with `n` too."""
        for ids in ([], [5, 6], [[5]], [[5], [6], [7]], [[5], 6]):
            with self.subTest(ids):
                self.refused("input_ids", 2, text=["a", "b"], input_ids=ids)
        self.refused("input_ids", text="a", input_ids=[[5]])
        for n in (1, 2):
            params = {"n": n}
            obj = self.accepted(
                text=["a", "b"], input_ids=[[5], [6, 7]], sampling_params=params
            )
            self.assertEqual(obj[2 * n - 1].input_ids, [6, 7])
        obj = self.accepted(text="a", input_ids=[5], sampling_params=params)
        self.assertEqual([obj[i].input_ids for i in range(n)], [[5]] * n)

    def test_empty(self):
        self.refused("text", text=[])
        self.refused("input_ids", input_ids=[])
        self.refused("input_embeds", input_embeds=[])
        self.refused("input_embeds", input_embeds=[[]])
        self.refused("sampling_params", text=["a"], sampling_params=[])


class TestEmbedding(CustomTestCase):
    def test_embeddings_for_another_number_of_inputs(self):
        vector = torch.zeros(4)
        for text, entries in (
            (["a", "b"], [[vector]]),
            (["a"], []),
            ("a", [[vector], None]),
            ("a", []),
        ):
            obj = EmbeddingReqInput(text=text, embed_overrides=entries)
            with self.assertRaisesRegex(ValueError, "embed_overrides"):
                obj.normalize_batch_and_arguments()

    def test_embeddings_for_each_input(self):
        vector = torch.zeros(4)
        obj = EmbeddingReqInput(text=["a", "b"], embed_overrides=[None, [vector]])
        obj.normalize_batch_and_arguments()
        self.assertEqual([obj[i].embed_overrides for i in range(2)], [None, [vector]])
        for entries in ([[vector]], [vector]):  # of the API; of Python
            obj = EmbeddingReqInput(text="a", embed_overrides=entries)
            obj.normalize_batch_and_arguments()
            self.assertEqual(obj.embed_overrides, [vector])

    def test_empty(self):
        for fields in ({"text": []}, {"input_ids": []}):
            with self.subTest(fields), self.assertRaisesRegex(ValueError, "empty"):
                EmbeddingReqInput(**fields).normalize_batch_and_arguments()


class TestTokenizerManager(CustomTestCase):
    def create(self, **fields):
        manager = object.__new__(TokenizerManager)
        manager.model_config = SimpleNamespace(vocab_size=100)
        manager.preferred_sampling_params = None
        manager.sampling_params_class = SamplingParams
        manager.tokenizer = None
        obj = GenerateReqInput(text="a", **fields)
        obj.normalize_batch_and_arguments()
        manager._create_tokenized_object(obj, "a", [1])

    def test_sampling_params(self):
        for params in ({"unknown": 1}, {"temperature": "hot"}, {"top_p": [1]}):
            with self.subTest(params), self.assertRaisesRegex(
                ValueError, "sampling_params"
            ):
                self.create(sampling_params=params)

    def test_session_params(self):
        from sglang.srt.managers.tokenizer_manager import _parse_session_params

        for params in ({"unknown": 1}, {"id": 1}, {"id": "a", "offset": "b"}):
            with self.subTest(params), self.assertRaisesRegex(
                ValueError, "session_params"
            ):
                _parse_session_params(params)
        self.assertEqual(_parse_session_params({"id": "a", "offset": 2}).offset, 2)

    def test_prompt_without_tokens(self):
        manager = object.__new__(TokenizerManager)
        manager.model_config = SimpleNamespace(
            vocab_size=100, hf_config=SimpleNamespace(architectures=[])
        )
        manager.mm_processor = None
        obj = GenerateReqInput(input_ids=[[], [1]])
        obj.normalize_batch_and_arguments()
        with self.assertRaisesRegex(ValueError, "no tokens"):
            asyncio.run(manager._tokenize_one_request(obj[0]))

    def test_stop_regex(self):
        """What does not parse, and what parses and does not compile."""
        for pattern in ("(", "(?<=a+)b", "a{9,1}"):
            params = SamplingParams(stop_regex=pattern)
            with self.subTest(pattern), self.assertRaisesRegex(
                ValueError, "stop_regex"
            ):
                params.normalize(SimpleNamespace(encode=lambda *_, **__: []))


if __name__ == "__main__":
    unittest.main()
