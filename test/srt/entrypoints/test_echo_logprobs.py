"""Completions that echo the prompt give the prompt's logprobs whenever logprobs are
asked for, none of the alternatives (`logprobs: 0`) included."""

import asyncio
import json
import unittest
from types import SimpleNamespace
from unittest import mock

from sglang.srt.entrypoints.openai import serving_completions
from sglang.srt.entrypoints.openai.protocol import CompletionRequest
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")

PROMPT = [(None, 7, "a"), (-1.0, 8, "b")]
OUTPUT = [(-2.0, 9, "c"), (-3.0, 10, "d")]


class Engine:
    """Answers any prompt with OUTPUT, token by token if streamed; gives logprobs from
    where it is asked to, and alternatives if it is asked for some, as the engine does.
    """

    def __init__(self):
        self.tokenizer = SimpleNamespace(decode=lambda ids, **_: "ab")
        self.model_config = SimpleNamespace(get_default_sampling_params=lambda: {})

    def config_value(self, name):
        return None

    def content(self, request, upto: int) -> dict:
        meta = {
            "id": "x",
            "prompt_tokens": len(PROMPT),
            "completion_tokens": upto,
            "weight_version": "default",
            "finish_reason": {"type": "length", "length": 2} if upto == 2 else None,
        }
        if request.return_logprob:
            prompt = PROMPT if request.logprob_start_len == 0 else []
            meta["input_token_logprobs"] = prompt
            meta["output_token_logprobs"] = OUTPUT[:upto]
            meta["output_token_logprobs_length"] = upto
            if request.top_logprobs_num > 0:
                meta["input_top_logprobs"] = [
                    None if t[0] is None else [t] for t in prompt
                ]
                meta["output_top_logprobs"] = [[t] for t in OUTPUT[:upto]]
        return {
            "text": "cd"[:upto],
            "output_ids": [9, 10][:upto],
            "meta_info": meta,
            "index": 0,
        }

    async def generate_request(self, request, _):
        for upto in (1, 2) if request.stream else (2,):
            yield self.content(request, upto)


def complete(stream: bool, **fields):
    """Text, tokens and their logprobs of one choice, put together if streamed."""
    serving = object.__new__(OpenAIServingCompletion)
    serving.tokenizer_manager = Engine()
    serving.allowed_custom_labels = None
    serving.template_manager = SimpleNamespace(completion_template_name=None)
    request = CompletionRequest(model="m", stream=stream, max_tokens=2, **fields)
    adapted, _ = serving._convert_to_internal_request(request)

    async def run():
        if not stream:
            response = await serving._handle_non_streaming_request(
                adapted, request, None
            )
            return [json.loads(response.model_dump_json())]
        return [
            json.loads(line.removeprefix("data: "))
            async for line in serving._generate_completion_stream(
                adapted, request, None
            )
            if "[DONE]" not in line
        ]

    config = SimpleNamespace(
        incremental_streaming_output=False,
        stream_response_default_include_usage=False,
        enable_cache_report=False,
    )
    with mock.patch.object(serving_completions, "get_serving", lambda: config):
        choices = [c for answer in asyncio.run(run()) for c in answer["choices"]]
    logprobs = [c["logprobs"] for c in choices if c["logprobs"] is not None]
    return (
        "".join(c["text"] for c in choices),
        [t for one in logprobs for t in one["tokens"]],
        [v for one in logprobs for v in one["token_logprobs"]],
    )


class TestEchoLogprobs(CustomTestCase):
    def test_tokens(self):
        for prompt in ("ab", [7, 8]):
            for stream in (False, True):
                for echo in (False, True):
                    for logprobs in (None, 0, 1):
                        with self.subTest(
                            prompt=prompt, stream=stream, echo=echo, logprobs=logprobs
                        ):
                            text, tokens, values = complete(
                                stream, prompt=prompt, echo=echo, logprobs=logprobs
                            )
                            self.assertEqual(text, "abcd" if echo else "cd")
                            expected = [] if logprobs is None else OUTPUT
                            if expected and echo:
                                expected = PROMPT + OUTPUT
                            self.assertEqual(tokens, [t for _, _, t in expected])
                            self.assertEqual(values, [v for v, _, _ in expected])


if __name__ == "__main__":
    unittest.main()
