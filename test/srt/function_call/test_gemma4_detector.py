"""Gemma 4's tool calls, whole and streamed: the calls of reported and of generated
answers, whatever the answer is and wherever the stream is cut."""

import json
import re
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
    Gemma4ToolCallScanner,
)
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parent))
from gemma4_answers import (  # noqa: E402
    ANSWERS,
    CHANNEL_END,
    CHANNEL_START,
    CUTS,
    MANY,
    MORE_ANSWERS,
    PIECES,
    STARTS,
    TEXTS,
    TOOLS,
    call,
    function_tool,
    loads,
    parse_calls,
    work,
)

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")

_WORDS = st.text(max_size=8) | st.sampled_from(
    [
        *(TOOL_CALL_START, TOOL_CALL_END, CHANNEL_START, CHANNEL_END, "<|turn>"),
        *("}" + TOOL_CALL_END, "]}", "{", "[", ",", ":", '"', "\\", "\\n", "call:f{"),
        *(
            "null",
            "true",
            "5",
            "-1e5",
            "a:1",
            " ",
            "\n",
            "<",
            "<|",
            '<|"',
            "<tool_call",
        ),
    ]
)
# Nothing escapes: a string that holds the delimiter is not one string, and a string that
# ends a call and starts another cannot be told from one whose delimiter was left out.
NEXT_CALL = re.compile(rf"{re.escape(TOOL_CALL_END)}\s*{re.escape(TOOL_CALL_START)}")
STRINGS = (
    st.lists(_WORDS, max_size=6)
    .map("".join)
    .filter(lambda s: STRING_DELIM not in s and not NEXT_CALL.search(s))
)
# Keys stand bare: what the format is written with cannot be part of one.
KEYS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.$ -]{0,10}(?<! )", fullmatch=True)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | STRINGS
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.:/-]{0,20}", fullmatch=True)


def render(value) -> str:
    """An argument as the chat template writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return STRING_DELIM + value + STRING_DELIM
    if isinstance(value, dict):
        return "{" + render_pairs(value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(render, value)) + "]"
    return str(value)


def render_pairs(arguments: dict) -> str:
    return ",".join(f"{key}:{render(arguments[key])}" for key in sorted(arguments))


def depth(value) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 0


def in_order(calls) -> str:
    """Calls with sorted keys, as the template sorts them."""
    return json.dumps(calls, sort_keys=True)


class TestGemma4Detector(CustomTestCase):
    def check(self, text, calls, content):
        whole = parse_calls(text)
        self.assertEqual((whole[0], loads(whole[1])), (content, calls))
        for cut in range(1, len(text)):
            self.assertEqual(parse_calls(text, [cut]), whole)
        self.assertEqual(parse_calls(text, range(len(text))), whole)

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

    def test_work_is_linear(self):
        """The work for a character grows neither with the text nor with what is open,
        whatever repeats."""

        def scanner():
            return Gemma4ToolCallScanner(lambda name: {})

        nested = f"{STARTS[1]}a:" + "{a:" * (MAX_DEPTH - 2)
        for start in [*STARTS, nested]:
            for piece in [*PIECES, "a,", "a:", "} ", f"a{STRING_DELIM}:"]:
                text = start + piece * (2000 // len(piece))
                for part in (text[: len(text) // 4], text):
                    with self.subTest(start=start, piece=piece, size=len(part)):
                        self.assertLess(work(scanner(), part, 1), 30)
                        self.assertLess(work(scanner(), part, len(part)), 15)

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
