"""Gemma 4's tool calls, whole and streamed: the calls of reported and of generated
answers, whatever the answer is and wherever the stream is cut."""

import sys
import unittest
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.environ import envs
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.function_call.gemma4_format import (
    MAX_DEPTH,
    STRING_DELIM,
    TOOL_CALL_END,
    TOOL_CALL_START,
)
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parent))
from gemma4_answers import (  # noqa: E402
    ANSWERS,
    MORE_ANSWERS,
    TOOLS,
    Parsed,
    call,
    function_tool,
    loads,
    parse_calls,
)
from gemma4_texts import (  # noqa: E402
    CUTS,
    KEYS,
    MANY,
    NAMES,
    TEXTS,
    VALUES,
    depth,
    in_order,
    render_pairs,
)

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")


class TestGemma4Detector(Parsed, CustomTestCase):
    def test_answers(self):
        for name, text, calls, content in ANSWERS + MORE_ANSWERS:
            with self.subTest(name):
                self.check(text, calls, content)

    def test_unknown_tools_as_for_other_models(self):
        text = call("a:1", "unknown")
        self.check(text, [], text)
        with envs.SGLANG_FORWARD_UNKNOWN_TOOLS.override(True):
            self.check(text, [("unknown", {"a": 1})], "")

    def test_index_counts_calls(self):
        """Also where the second tool is called first."""
        text = call("limit:1") + call("city:|Oslo|", "get_weather") + call("limit:2")
        parser = FunctionCallParser(TOOLS, "gemma4")
        items = parser.parse_stream_chunk(text)[1]
        self.assertEqual([item.tool_index for item in items], [0, 0, 1, 1, 2, 2])

    def test_strings_stream(self):
        """A client need not wait for the end of a long string."""
        parser = FunctionCallParser(TOOLS, "gemma4")
        parser.parse_stream_chunk(f"{TOOL_CALL_START}call:web_search{{query:")
        parser.parse_stream_chunk(STRING_DELIM)
        for word in ("one ", "two ", "three "):
            _, (item,) = parser.parse_stream_chunk(word)
            self.assertIn(item.parameters.strip(), word)

    def test_depth_is_bounded(self):
        """JSON's own parsers do not read any depth."""
        for opened in ("[", "{a:", "[{a:"):
            _, calls = parse_calls(call("query:" + opened * 100_000))
            ((_, arguments),) = loads(calls)
            self.assertEqual(depth(arguments), MAX_DEPTH)

    @MANY
    @given(TEXTS, CUTS)
    def test_any_text(self, text, cuts):
        """Ends; the arguments are JSON; streamed is whole."""
        whole = parse_calls(text)
        loads(whole[1])
        self.assertEqual(parse_calls(text, cuts), whole)
        self.assertEqual(parse_calls(text, range(0, len(text), 2)), whole)

    @given(TEXTS)
    def test_text_without_calls_is_content(self, text):
        text = text.replace("call:", "")
        if parse_calls(text)[1] == [] and TOOL_CALL_START not in text:
            self.assertEqual(parse_calls(text)[0], text)

    @given(st.lists(st.tuples(NAMES, st.dictionaries(KEYS, VALUES)), max_size=3), CUTS)
    def test_round_trip(self, calls, cuts):
        """What the chat template writes is read as it was."""
        tools = [function_tool(name) for name, _ in calls]
        text = "".join(
            f"{TOOL_CALL_START}call:{name}{{{render_pairs(arguments)}}}{TOOL_CALL_END}"
            for name, arguments in calls
        )
        for parsed in (parse_calls(text, None, tools), parse_calls(text, cuts, tools)):
            content, parsed_calls = parsed
            self.assertEqual(content, "")
            self.assertEqual(in_order(loads(parsed_calls)), in_order(calls))


if __name__ == "__main__":
    unittest.main()
