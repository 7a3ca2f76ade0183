"""A chat history may hold a tool call without arguments."""

import unittest

from sglang.srt.entrypoints.openai.serving_chat import (
    normalize_assistant_tool_call_arguments,
    parse_tool_call_arguments,
)
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")


class TestToolCallHistory(CustomTestCase):
    def test_no_arguments(self):
        for arguments in ("", " ", "\n", "{}"):
            with self.subTest(arguments):
                self.assertEqual(parse_tool_call_arguments(arguments), {})
                call = {"function": {"name": "f", "arguments": arguments}}
                message = {"role": "assistant", "tool_calls": [call]}
                normalize_assistant_tool_call_arguments(message)
                self.assertEqual(call["function"]["arguments"], {})

    def test_what_is_no_object_is_refused(self):
        for arguments in ("[]", "null", "5", "{", "x"):
            with self.subTest(arguments), self.assertRaises(ValueError):
                parse_tool_call_arguments(arguments)


if __name__ == "__main__":
    unittest.main()
