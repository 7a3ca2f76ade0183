"""What is wrong with a request is said with 400 also where an endpoint's own code meets it."""

import unittest
from types import SimpleNamespace

from fastapi.testclient import TestClient
from pydantic import ValidationError

from sglang.srt.entrypoints import http_server
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.entrypoints.openai.utils import convert_embeds_to_tensors
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")


class TestRequestErrors(CustomTestCase):
    def test_a_value_error_that_no_endpoint_catches(self):
        async def handle(*_):
            raise ValueError("what is wrong")

        http_server.app.state.ollama_serving = SimpleNamespace(
            handle_chat=handle, handle_generate=handle
        )
        client = TestClient(http_server.app, raise_server_exceptions=False)
        for path, body in {
            "/api/chat": {"model": "m", "messages": []},
            "/api/generate": {"model": "m", "prompt": "a"},
        }.items():
            with self.subTest(path):
                response = client.post(path, json=body)
                self.assertEqual(response.status_code, 400, response.text)
                self.assertIn("what is wrong", response.text)

    def test_bodies_of_another_type(self):
        message = {"role": "user", "content": "a"}
        for body in (
            *([], "a", 5, None),
            {"messages": [message], "response_format": "json"},
            {"messages": [message], "response_format": []},
        ):
            with self.subTest(body), self.assertRaises(ValidationError):
                ChatCompletionRequest.model_validate(body)

    def test_embeddings_for_some_inputs(self):
        """An input without any says so with null, or an empty list."""
        given = [[], [[0.5, 1.0]], None, [[0.5], [1.0]]]
        found = convert_embeds_to_tensors(given)
        self.assertEqual(
            [None if e is None else [t.tolist() for t in e] for e in found],
            [None, *given[1:]],
        )
        self.assertEqual(convert_embeds_to_tensors([[], None]), [None, None])
        [vectors] = convert_embeds_to_tensors([[0.5], [1.0]])
        self.assertEqual([t.tolist() for t in vectors], [[0.5], [1.0]])

    def test_schemas_beside_the_format(self):
        for schema in ({"properties": ["strict"]}, {"properties": {"strict": None}}):
            request = ChatCompletionRequest.model_validate(
                {
                    "messages": [{"role": "user", "content": "a"}],
                    "response_format": {"type": "json_schema", "schema": schema},
                }
            )
            self.assertFalse(request.response_format.json_schema.strict)


if __name__ == "__main__":
    unittest.main()
