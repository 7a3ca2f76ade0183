"""An answer says that its seed was not used, where the server samples without it."""

import asyncio
import unittest
from types import SimpleNamespace
from unittest import mock

from sglang.srt.entrypoints.openai import serving_completions
from sglang.srt.entrypoints.openai.protocol import CompletionRequest
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
from sglang.srt.managers import tokenizer_manager
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")


def warnings(obj, deterministic=False) -> list:
    config = SimpleNamespace(
        deterministic=SimpleNamespace(enable_deterministic_inference=deterministic)
    )
    with mock.patch.object(tokenizer_manager, "get_exec", lambda: config):
        return TokenizerManager._seed_warnings(obj)


class TestSeedSaid(CustomTestCase):
    def test_when(self):
        for params, deterministic, said in (
            ({"sampling_seed": 5}, False, True),
            ({"sampling_seed": 0, "temperature": 0.7, "top_k": 64}, False, True),
            ({"sampling_seed": 5}, True, False),
            ({"sampling_seed": None, "temperature": 0.7}, False, False),
            ({"sampling_seed": 5, "temperature": 0}, False, False),
            ({"sampling_seed": 5, "temperature": 1, "top_k": 1}, False, False),
            ({}, False, False),
        ):
            with self.subTest(params, deterministic=deterministic):
                obj = GenerateReqInput(text="a", sampling_params=params)
                got = warnings(obj, deterministic)
                self.assertEqual(len(got), said)
                for text in got:
                    self.assertIn("--enable-deterministic-inference", text)
        self.assertEqual(warnings(EmbeddingReqInput(text="a")), [])

    def test_in_a_completion(self):
        """The seed of a request reaches the engine, and what it says the client."""
        serving = object.__new__(OpenAIServingCompletion)
        serving.allowed_custom_labels = None
        serving.template_manager = SimpleNamespace(completion_template_name=None)

        async def generate(obj, _):
            yield {
                "text": "b",
                "meta_info": {
                    "id": "x",
                    "prompt_tokens": 1,
                    "completion_tokens": 1,
                    "weight_version": "default",
                    "finish_reason": None,
                    **({"warnings": found} if (found := warnings(obj)) else {}),
                },
            }

        serving.tokenizer_manager = SimpleNamespace(
            generate_request=generate,
            tokenizer=None,
            model_config=SimpleNamespace(get_default_sampling_params=lambda: {}),
        )
        config = SimpleNamespace(enable_cache_report=False)
        for seed in (None, 0, 7):
            request = CompletionRequest(model="m", prompt="a", seed=seed, temperature=1)
            adapted, _ = serving._convert_to_internal_request(request)
            with mock.patch.object(
                serving_completions, "get_serving", lambda: config
            ), self.subTest(seed=seed):
                response = asyncio.run(
                    serving._handle_non_streaming_request(adapted, request, None)
                )
                self.assertEqual("warnings" in response.metadata, seed is not None)


if __name__ == "__main__":
    unittest.main()
