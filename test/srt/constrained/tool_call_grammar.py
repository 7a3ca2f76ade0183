"""Grammars of Gemma 4's tool calls, as a request gets them, and what their texts mean."""

import json
from datetime import datetime, time
from decimal import Decimal

from grammar_walk import accepts, compile_key, error_of, ids_of
from jsonschema import Draft202012Validator, FormatChecker

from sglang.srt.constrained.json_schema_validation import UnsupportedJSONSchemaFeature
from sglang.srt.entrypoints.openai.protocol import Function, Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser

BACKENDS = ("xgrammar", "llguidance")
Q = '<|"|>'
INTEGER, STRING = {"type": "integer"}, {"type": "string"}


def tool(parameters, name="f", strict=True) -> Tool:
    return Tool(function=Function(name=name, parameters=parameters, strict=strict))


def grammar_of(tools, choice="required", backend="xgrammar", **keywords):
    """The grammar object of a request, from the parser's constraint on."""
    parser = FunctionCallParser(tools, "gemma4")
    kind, tag = parser.get_structure_constraint(choice, **keywords)
    key = json.dumps(tag.model_dump(by_alias=True))
    grammar = compile_key(backend, kind, key)
    assert error_of(grammar) is None, error_of(grammar)
    return grammar


def call(arguments, name="f"):
    return f"<|tool_call>call:{name}{arguments}<tool_call|>"


# jsonschema's checkers of this draft, and Python's for two that it leaves out.
FORMATS = FormatChecker(Draft202012Validator.FORMAT_CHECKER.checkers)
for name, kind in ("time", time), ("date-time", datetime):
    FORMATS.checks(name, ValueError)(
        lambda value, kind=kind: not isinstance(value, str)
        or kind.fromisoformat(value) is not None
    )


def valid(schema, value) -> bool:
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    validator = Draft202012Validator(exact, format_checker=FORMATS)
    return validator.is_valid(value)


def parsed(tools, text):
    """Calls as (name, arguments); nothing else may stand in the text."""
    parser = FunctionCallParser(tools, "gemma4")
    assert parser.owns_tool_format()
    rest, calls = parser.parse_non_stream(text)
    assert rest == "", rest
    return [(c.name, json.loads(c.parameters, parse_float=Decimal)) for c in calls]


class Cases:
    """A subclass has the cases, and is a test."""

    # (parameters, arguments that follow, arguments that do not)
    CASES: list

    def test_follows_or_not(self):
        for parameters, inside, outside in self.CASES:
            tools = [tool(parameters)]
            for backend in BACKENDS:
                grammar = grammar_of(tools, backend=backend)
                for arguments in inside:
                    with self.subTest(arguments, backend=backend):
                        text = call(arguments)
                        self.assertTrue(accepts(grammar.copy(), ids_of(text)))
                        [(name, value)] = parsed(tools, text)
                        self.assertEqual(name, "f")
                        self.assertTrue(valid(parameters, value), value)
                for arguments in outside:
                    with self.subTest(arguments, backend=backend):
                        ids = ids_of(call(arguments))
                        self.assertFalse(accepts(grammar.copy(), ids))

    def check_refused(self, *cases):
        """`cases`: parameters, and what the refusal says of them."""
        for parameters, place in cases:
            with self.subTest(place):
                with self.assertRaisesRegex(UnsupportedJSONSchemaFeature, place) as e:
                    grammar_of([tool(parameters)])
                self.assertIsInstance(e.exception, ValueError)
                self.assertIn("'f'", str(e.exception))
