"""A forced tool call of Gemma 4 comes in its own format, and its arguments validate.

The oracle: what follows from the grammar is read by the tool-call parser as calls alone,
and `jsonschema` validates their arguments.
"""

import json
import random
import unittest
from datetime import datetime, time
from decimal import Decimal

from grammar_walk import accepts, compile_key, error_of, ids_of, sample, tokenizer
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, FormatChecker

from sglang.srt.constrained.json_schema_validation import UnsupportedJSONSchemaFeature
from sglang.srt.entrypoints.openai.protocol import Function, Tool, ToolChoice
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=50, suite="stage-a-test-cpu")

BACKENDS = ("xgrammar", "llguidance")
Q = '<|"|>'
INTEGER, STRING = {"type": "integer"}, {"type": "string"}


def tool(parameters, name="f", strict=True) -> Tool:
    return Tool(function=Function(name=name, parameters=parameters, strict=strict))


def obj(properties, *required, **keywords):
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        **keywords,
    }


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


class TestCases(CustomTestCase):
    # (parameters, arguments that follow, arguments that do not)
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
            obj({"n": {"type": "integer", "minimum": -3, "maximum": 120}}, "n"),
            ["{n:-3}", "{n:0}", "{n:99}", "{n:120}"],
            ["{n:-4}", "{n:121}", "{n:1.5}", "{n:007}", "{n:}"],
        ),
        (
            obj({"n": {"type": "number", "minimum": 0, "exclusiveMaximum": 1}}, "n"),
            ["{n:0}", "{n:0.25}", "{n:0.99}"],
            ["{n:1}", "{n:1.00}", "{n:-0.25}"],
        ),
        (
            obj({"u": {"anyOf": [STRING, {"type": "null"}]}, "b": {"type": "boolean"}}),
            ["{}", "{b:true}", "{b:false,u:null}", f"{{u:{Q}x{Q}}}"],
            ["{b:null}", "{b:True}", "{u:x}"],
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
        (
            obj({"p": {"type": "string", "pattern": "^[A-Z]{2}[^a]\\d+$"}}, "p"),
            [f"{{p:{Q}ABx12{Q}}}"],
            [f"{{p:{Q}ABa12{Q}}}", f"{{p:{Q}ABx{Q}}}"],
        ),
        (
            obj({"p": {"type": "string", "minLength": 2, "maxLength": 3}}, "p"),
            [f"{{p:{Q}é{Q[0:0]}b{Q}}}", f"{{p:{Q}abc{Q}}}"],
            [f"{{p:{Q}a{Q}}}", f"{{p:{Q}abcd{Q}}}"],
        ),
        (
            obj({"ab": INTEGER, "ac": INTEGER}, additionalProperties=STRING),
            [f"{{ab:1,x:{Q}y{Q}}}", f"{{abc:{Q}y{Q},a:{Q}z{Q}}}", "{ab:1,ac:2}"],
            ["{x:1}", f"{{ab:1,ac:{Q}y{Q}}}", "{abc:1}"],
        ),
        (
            {
                "type": "object",
                "properties": {"t": {"$ref": "#/$defs/tree"}},
                "required": ["t"],
                "$defs": {
                    "tree": obj(
                        {
                            "v": INTEGER,
                            "kids": {
                                "type": "array",
                                "items": {"$ref": "#/$defs/tree"},
                            },
                        },
                        "v",
                    )
                },
            },
            ["{t:{v:1}}", "{t:{kids:[{v:1},{kids:[],v:2}],v:3}}"],
            ["{t:{}}", "{t:{kids:[1],v:1}}"],
        ),
        (
            obj(
                {"a": INTEGER, "b": INTEGER},
                anyOf=[{"required": ["a"]}, {"required": ["b"]}],
            ),
            ["{a:1}", "{b:1}", "{a:1,b:2}"],
            ["{}"],
        ),
        ({}, ["{}", f"{{x:{Q}a{Q},y:[1,{{z:null}}]}}"], ["", "{x}"]),
    ]

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
        for parameters, place in (
            (obj({"a": {"not": {}}}), "#/properties/a .*not would be ignored"),
            (
                obj({"a": {"type": "array", "uniqueItems": True}}),
                "#/properties/a .*uniqueItems",
            ),
            (obj({"a:b": INTEGER}), "a:b"),
            (obj({"a": {"enum": ["<|tool_call>"]}}), "marker"),
            (obj({"a": {"type": "string", "pattern": "(?=a)b"}}), "pattern"),
            (obj({"a": {"type": "string", "format": "x"}}), "format 'x'"),
        ):
            with self.subTest(place):
                with self.assertRaisesRegex(UnsupportedJSONSchemaFeature, place) as e:
                    grammar_of([tool(parameters)])
                self.assertIsInstance(e.exception, ValueError)
                self.assertIn("'f'", str(e.exception))

    def test_loose_tool_takes_any_object(self):
        parameters = obj({"a": {"not": {}}})
        grammar = grammar_of([tool(parameters, strict=False)])
        self.assertTrue(accepts(grammar.copy(), ids_of(call("{a:1}"))))
        self.assertFalse(accepts(grammar.copy(), ids_of(call("{a:}"))))


NAMES = st.sampled_from(["a", "b", "ab", "name", "Zip"])
TEXTS = st.text(st.sampled_from('ab,:{}[]<|"> \n'), max_size=6)
SMALL = st.integers(-30, 30)
TENTHS = st.integers(-300, 300).map(lambda n: n / 10)


def optional(**keywords):
    return st.fixed_dictionaries({}, optional=keywords)


LEAVES = st.one_of(
    optional(minLength=st.integers(0, 3), maxLength=st.integers(3, 5)).map(
        lambda k: {"type": "string", **k}
    ),
    st.sampled_from(
        ["^a+$", "b", "^[^x]{1,3}", "[a-c]\\d$", "^(ab|c*?)$", "^\\S\\s\\w$", "^.?$"]
    ).map(lambda pattern: {"type": "string", "pattern": pattern}),
    st.sampled_from(
        ["date", "time", "date-time", "uuid", "ipv4", "hostname", "email", "uri"]
    ).map(lambda name: {"type": "string", "format": name}),
    optional(minimum=SMALL, maximum=SMALL, exclusiveMinimum=TENTHS).map(
        lambda k: {"type": "integer", **k}
    ),
    optional(minimum=TENTHS, maximum=TENTHS, exclusiveMaximum=TENTHS).map(
        lambda k: {"type": "number", **k}
    ),
    st.sampled_from(
        [{}, {"type": "boolean"}, {"type": ["integer", "null"]}, {"type": "null"}]
    ),
    st.lists(
        st.one_of(TEXTS, SMALL, TENTHS, st.none(), st.booleans()),
        min_size=1,
        max_size=3,
    ).map(lambda values: {"enum": values}),
)


def objects(children):
    return st.tuples(
        st.dictionaries(NAMES, children, max_size=3),
        st.lists(NAMES, max_size=2, unique=True),
        optional(additionalProperties=st.one_of(st.booleans(), children)),
    ).map(lambda parts: obj(parts[0], *parts[1], **parts[2]))


def composed(children):
    return st.one_of(
        objects(children),
        optional(
            items=children,
            prefixItems=st.lists(children, min_size=1, max_size=2),
            minItems=st.integers(0, 2),
            maxItems=st.integers(1, 3),
        ).map(lambda k: {"type": "array", **k}),
        st.lists(children, min_size=1, max_size=2).map(lambda s: {"anyOf": s}),
        st.tuples(objects(children), objects(children)).map(
            lambda pair: {**pair[0], "allOf": [pair[1]]}
        ),
    )


PARAMETERS = objects(st.recursive(LEAVES, composed, max_leaves=5))


class TestGrammar(CustomTestCase):
    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(PARAMETERS, st.integers())
    def test_arguments_validate(self, parameters, seed):
        tools = [tool(parameters), tool(obj({"n": INTEGER}, "n"), "g")]
        try:
            grammar = grammar_of(tools)
        except UnsupportedJSONSchemaFeature:
            return
        rng = random.Random(seed)
        for _ in range(2):
            ids = sample(grammar.copy(), rng, limit=150)
            if ids is None:
                continue
            text = tokenizer().decode(ids)
            note(text)
            calls = parsed(tools, text)
            self.assertTrue(calls)
            for name, arguments in calls:
                schema = {t.function.name: t.function.parameters for t in tools}[name]
                self.assertTrue(valid(schema, arguments), arguments)


if __name__ == "__main__":
    unittest.main()
