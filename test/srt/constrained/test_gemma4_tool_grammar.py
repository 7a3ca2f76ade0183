"""A forced tool call of Gemma 4 comes in its own format, and its arguments validate.

The oracle: what follows from the grammar is read by the tool-call parser as calls alone,
and `jsonschema` validates their arguments.
"""

import unittest

from grammar_walk import accepts, ids_of, obj
from tool_call_grammar import (
    BACKENDS,
    INTEGER,
    STRING,
    Cases,
    Q,
    call,
    grammar_of,
    tool,
)

from sglang.srt.entrypoints.openai.protocol import ToolChoice
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=25, suite="stage-a-test-cpu")


class TestCases(Cases, CustomTestCase):
    CASES = [
        (
            obj({"query": STRING, "limit": INTEGER}, "query"),
            [f"{{query:{Q}red shoes{Q}}}", f"{{limit:5,query:{Q}a{Q}}}"],
            [
                "{}",
                "{query:red}",
                '{"query":"red"}',
                f"{{query:{Q}a{Q},limit:5}}",
                f"{{ query:{Q}a{Q}}}",
                f"{{query:{Q}a{Q},}}",
                f"{{query: {Q}a{Q}}}",
            ],
        ),
        (
            obj({"s": STRING}, "s"),
            [f'{{s:{Q}a "b" {{c}}, [d]: <e> <| é 😀\n<|"x{Q}}}', f"{{s:{Q}<{Q}}}"],
            [
                f"{{s:{Q}a{Q}b{Q}}}",
                f"{{s:{Q}<tool_call|>{Q}}}",
                f"{{s:{Q}<<|tool_call>{Q}}}",
            ],
        ),
        (
            obj({"e": {"enum": ["a b", 3, None, {"x": [1.5, True]}]}}, "e"),
            [f"{{e:{Q}a b{Q}}}", "{e:3}", "{e:null}", "{e:{x:[1.5,true]}}"],
            [f"{{e:{Q}a{Q}}}", "{e:4}", f"{{e:{Q}3{Q}}}"],
        ),
        (
            obj(
                {"a": {"type": "array", "items": INTEGER, "minItems": 1, "maxItems": 2}}
            ),
            ["{}", "{a:[1]}", "{a:[1,2]}"],
            ["{a:[]}", "{a:[1,2,3]}", "{a:[1 ,2]}", "{a:[1,]}"],
        ),
        ({}, ["{}", f"{{x:{Q}a{Q},y:[1,{{z:null}}]}}"], ["", "{x}"]),
    ]

    def test_choices(self):
        tools = [tool(obj({}), "f"), tool(obj({"n": INTEGER}, "n"), "g")]
        f, g = call("{}", "f"), call("{n:1}", "g")
        named = ToolChoice(function={"name": "g"})
        for choice, keywords, inside, outside in (
            ("required", {}, [f, g, f + g, g + g + f], ["", "a", "a" + f, f + "a"]),
            ("required", {"parallel_tool_calls": False}, [f, g], [f + g, ""]),
            (named, {"parallel_tool_calls": False}, [g], [f, g + g, ""]),
            (named, {}, [g, g + g], [f, g + f]),
            ("auto", {}, ["", "hi", "hi " + f, g + f], ["<|tool_call>call:h"]),
        ):
            for backend in BACKENDS:
                grammar = grammar_of(tools, choice, backend, **keywords)
                for texts, wanted in ((inside, True), (outside, False)):
                    for text in texts:
                        with self.subTest(text, choice=choice, backend=backend):
                            got = accepts(grammar.copy(), ids_of(text))
                            self.assertEqual(got, wanted)

    def test_thought_without_reasoning_parser(self):
        grammar = grammar_of([tool({})], thinking_mode=True)
        for text in ("<|channel>thought\nHm.<channel|>", ""):
            ids = ids_of(text + call("{}"))
            self.assertTrue(accepts(grammar.copy(), ids))
        self.assertFalse(
            accepts(grammar.copy(), ids_of("<|channel>thought\n<channel|>"))
        )

    def test_strict_refused_by_name(self):
        self.check_refused(
            (obj({"a": {"not": {}}}), "#/properties/a .*not would be ignored"),
            (
                obj({"a": {"type": "array", "uniqueItems": True}}),
                "#/properties/a .*uniqueItems",
            ),
            (obj({"a:b": INTEGER}), "a:b"),
            (obj({"a": {"enum": ["<|tool_call>"]}}), "marker"),
        )

    def test_loose_tool_takes_any_object(self):
        parameters = obj({"a": {"not": {}}})
        grammar = grammar_of([tool(parameters, strict=False)])
        self.assertTrue(accepts(grammar.copy(), ids_of(call("{a:1}"))))
        self.assertFalse(accepts(grammar.copy(), ids_of(call("{a:}"))))


if __name__ == "__main__":
    unittest.main()
