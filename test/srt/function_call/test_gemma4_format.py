"""The scanner of Gemma 4's tool calls: what the chat template writes is read as it was,
and any text ends, wherever it is cut."""

import json
import sys
import unittest
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.function_call.gemma4_format import (
    ARGUMENTS,
    CALL,
    MAX_DEPTH,
    STRING_DELIM,
    TEXT,
    TOOL_CALL_END,
    TOOL_CALL_START,
    Gemma4ToolCallScanner,
)
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parent))
from gemma4_texts import (  # noqa: E402
    CUTS,
    KEYS,
    MANY,
    NAMES,
    PIECES,
    STARTS,
    TEXTS,
    VALUES,
    in_order,
    pieces,
    render_pairs,
    work,
)

register_cpu_ci(est_time=40, suite="stage-a-test-cpu")


def read(text, cuts=()) -> tuple:
    """Content, and the name and arguments of each call, of an answer in pieces; any name
    is a tool's."""
    scanner = Gemma4ToolCallScanner(lambda name: {})
    events = [event for piece in pieces(text, cuts) for event in scanner.feed(piece)]
    content, calls = "", []
    for kind, part in [*events, *scanner.finish()]:
        if kind == CALL:
            calls.append((part, ""))
        elif kind == ARGUMENTS:
            name, arguments = calls.pop()
            calls.append((name, arguments + part))
        else:
            assert kind == TEXT
            content += part
    return content, calls


class TestGemma4Format(CustomTestCase):
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
        """Ends; the arguments are JSON; cut anywhere it is the same."""
        whole = read(text)
        for _, arguments in whole[1]:
            self.assertIsInstance(json.loads(arguments), dict)
        self.assertEqual(read(text, cuts), whole)
        self.assertEqual(read(text, range(len(text))), whole)

    @given(st.lists(st.tuples(NAMES, st.dictionaries(KEYS, VALUES)), max_size=3), CUTS)
    def test_round_trip(self, calls, cuts):
        """What the chat template writes is read as it was."""
        text = "".join(
            f"{TOOL_CALL_START}call:{name}{{{render_pairs(arguments)}}}{TOOL_CALL_END}"
            for name, arguments in calls
        )
        content, found = read(text, cuts)
        self.assertEqual(content, "")
        found = [(name, json.loads(arguments)) for name, arguments in found]
        self.assertEqual(in_order(found), in_order(calls))


if __name__ == "__main__":
    unittest.main()
