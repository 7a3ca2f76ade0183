"""Numbers, strings and any schemas in the grammar of Gemma 4's tool calls.

The oracle: what follows from the grammar is read by the tool-call parser as calls alone,
and `jsonschema` validates their arguments.
"""

import random
import unittest

from grammar_walk import obj, sample, tokenizer
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from tool_call_grammar import INTEGER, Cases, Q, grammar_of, parsed, tool, valid

from sglang.srt.constrained.json_schema_validation import UnsupportedJSONSchemaFeature
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=50, suite="stage-a-test-cpu")


class TestBounds(Cases, CustomTestCase):
    CASES = [
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
            obj({"p": {"type": "string", "pattern": "^[A-Z]{2}[^a]\\d+$"}}, "p"),
            [f"{{p:{Q}ABx12{Q}}}"],
            [f"{{p:{Q}ABa12{Q}}}", f"{{p:{Q}ABx{Q}}}"],
        ),
        (
            obj({"p": {"type": "string", "minLength": 2, "maxLength": 3}}, "p"),
            [f"{{p:{Q}é{Q[0:0]}b{Q}}}", f"{{p:{Q}abc{Q}}}"],
            [f"{{p:{Q}a{Q}}}", f"{{p:{Q}abcd{Q}}}"],
        ),
    ]

    def test_strict_refused_by_name(self):
        self.check_refused(
            (obj({"a": {"type": "string", "pattern": "(?=a)b"}}), "pattern"),
            (obj({"a": {"type": "string", "format": "x"}}), "format 'x'"),
        )


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
