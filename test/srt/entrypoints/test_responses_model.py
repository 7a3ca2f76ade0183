"""/v1/responses answers a request that names no model with the one that is served."""

import asyncio
import json
import sys
import unittest
from pathlib import Path

from sglang.srt.entrypoints.openai.protocol import ResponsesRequest
from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parent))
from gemma4_serving import TokenizerManager, settings, template_manager  # noqa: E402

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")


class TestResponsesModel(CustomTestCase):
    def setUp(self):
        self.addCleanup(settings().close)

    def ask(self, **fields):
        manager = TokenizerManager(False, "It is 5.", (), "stop")
        serving = OpenAIServingResponses(manager, template_manager())
        request = ResponsesRequest(input="How much?", **fields)

        async def collect():
            answer = await serving.create_responses(request, None)
            return [event async for event in answer] if request.stream else answer

        return asyncio.run(collect())

    def test_no_model(self):
        answer = self.ask()
        self.assertEqual(answer.model, "gemma")
        self.assertEqual(answer.output[0].content[0].text, "It is 5.")

    def test_no_model_streamed(self):
        data = [line for e in self.ask(stream=True) for line in e.splitlines()]
        events = [json.loads(d[6:]) for d in data if d.startswith("data: {")]
        response = events[-1]["response"]
        self.assertEqual(response["model"], "gemma")
        self.assertEqual(response["output"][0]["content"][0]["text"], "It is 5.")

    def test_another_model(self):
        self.assertEqual(self.ask(model="another").status_code, 404)


if __name__ == "__main__":
    unittest.main()
