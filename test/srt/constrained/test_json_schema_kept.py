"""A JSON schema goes to a grammar backend that keeps all of it, or is refused by name.

The oracle is `jsonschema`: what a grammar lets through validates, and what validates, in
the grammar's order, is let through.
"""

import json
import random
import unittest
from pathlib import Path

import torch
from grammar_walk import accepts, compile_key, error_of, ids_of, obj, sample, tokenizer
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from schema_cases import I, S, integers, valid
from schema_table import TABLE

from sglang.srt.constrained.json_schema_support import llguidance_gap, xgrammar_gap
from sglang.srt.constrained.llguidance_backend import GuidanceGrammar
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")

PAGE = Path(__file__).parents[3] / "docs" / "grammars.md"
GAPS = {"xgrammar": xgrammar_gap, "llguidance": llguidance_gap}
CLASSES = {"xgrammar": XGrammarGrammar, "llguidance": GuidanceGrammar}


def keeper(grammar) -> str | None:
    for name, cls in CLASSES.items():
        if isinstance(grammar, cls):
            return name
    return None


class TestTable(CustomTestCase):
    def test_chosen(self):
        for what, schema, texts in TABLE:
            kept = [name for name, gap_of in GAPS.items() if gap_of(schema) is None]
            for configured in GAPS:
                with self.subTest(what, configured=configured):
                    grammar = compile_key(configured, "json", json.dumps(schema))
                    wanted = configured if configured in kept else (kept or [None])[0]
                    self.assertEqual(keeper(grammar), wanted, error_of(grammar))
                    if wanted is None:
                        self.assertIn("no grammar backend keeps", error_of(grammar))
                        gap = GAPS[configured](schema)
                        self.assertIn(f"{gap.pointer}: {gap.reason}", error_of(grammar))
                        continue
                    for text in texts:
                        self.assertEqual(
                            accepts(grammar.copy(), ids_of(text)),
                            valid(schema, text),
                            text,
                        )

    def test_page(self):
        rows = ["| schema | xgrammar | llguidance |", "| --- | --- | --- |"]
        for what, schema, _ in TABLE:
            marks = ["–" if gap_of(schema) else "kept" for gap_of in GAPS.values()]
            rows.append(f"| {what} | {marks[0]} | {marks[1]} |")
        self.assertIn("\n".join(rows), PAGE.read_text())

    def test_named_in_its_place(self):
        schema = obj({"a/b": {"type": "array", "items": obj({"c": {"not": S}})}})
        for configured in GAPS:
            error = error_of(compile_key(configured, "json", json.dumps(schema)))
            self.assertIn("#/properties/a~1b/items/properties/c: not", error)

    def test_said_in_the_log(self):
        with self.assertLogs("sglang.srt.constrained.schema_dispatch", "INFO") as log:
            compile_key("xgrammar", "json", json.dumps(obj({}, "z")))
        self.assertRegex(log.output[0], "GuidanceBackend.*required 'z'")


class TestStructuralTags(CustomTestCase):
    def tag(self, schema, **keywords):
        return json.dumps(
            {
                "structures": [{"begin": "[f]", "schema": schema, "end": "[/f]"}],
                "triggers": ["[f]"],
                **keywords,
            }
        )

    def test_goes_where_its_schemas_are_kept(self):
        for configured in GAPS:
            grammar = compile_key(configured, "structural_tag", self.tag(obj({}, "z")))
            self.assertEqual(keeper(grammar), "llguidance")
            self.assertTrue(accepts(grammar.copy(), ids_of('x[f]{"z":1}[/f]')))
            self.assertFalse(accepts(grammar.copy(), ids_of("[f]{}[/f]")))

    def test_at_least_one_call(self):
        """llguidance has no such tags: xgrammar gets them."""
        for configured in GAPS:
            grammar = compile_key(
                configured, "structural_tag", self.tag(I, at_least_one=True)
            )
            self.assertEqual(keeper(grammar), "xgrammar")
            self.assertFalse(accepts(grammar.copy(), ids_of("x")))
            self.assertTrue(accepts(grammar.copy(), ids_of("[f]3[/f]")))

    def test_refused_by_place(self):
        schema = obj({"a": {"not": S}})
        new = {
            "type": "structural_tag",
            "format": {
                "type": "tag",
                "begin": "<f>",
                "content": {"type": "json_schema", "json_schema": schema},
                "end": "</f>",
            },
        }
        for tag, place in (
            (self.tag(schema), "#/structures/0/schema/properties/a: not"),
            (json.dumps(new), "#/format/content/json_schema/properties/a: not"),
        ):
            error = error_of(compile_key("xgrammar", "structural_tag", tag))
            self.assertIn(place, error)


class TestBatch(CustomTestCase):
    def test_one_mask_for_both(self):
        """Grammars of both backends fill rows of one mask, in either order."""
        schemas = [json.dumps(integers(maximum=5)), json.dumps(obj({}, "z"))]
        for order in (schemas, schemas[::-1]):
            grammars = [compile_key("xgrammar", "json", schema) for schema in order]
            self.assertEqual(len({keeper(g) for g in grammars}), 2)
            info = object.__new__(SamplingBatchInfo)
            info.grammars, info.device = grammars, "cpu"
            info.vocab_size = len(tokenizer())
            info.temperatures = torch.ones(2, 1)
            info.update_regex_vocab_mask()
            logits = torch.zeros(2, len(tokenizer()))
            info.grammar_mask.apply(logits)
            for row, schema in zip(logits, order):
                open_brace, digit = (row[ids_of(text)[0]] == 0 for text in ("{", "3"))
                self.assertEqual(bool(open_brace), "object" in schema)
                self.assertEqual(bool(digit), "object" not in schema)


# Schemas of hypothesis. Names and texts are of a small alphabet, so that keywords meet.
NAMES = st.sampled_from(["a", "b", "c", "ab"])
TEXTS = st.text("abc", max_size=4)
SMALL = st.integers(-20, 20)
SCALARS = st.one_of(
    SMALL, TEXTS, st.none(), st.booleans(), st.sampled_from([0.5, -1.25])
)
PATTERNS = st.sampled_from(["^a", "b", "^[a-b]+$", "c$", "^(a|bc)$", "^$", "a|^b"])


def optional(**keywords):
    return st.fixed_dictionaries({}, optional=keywords)


STRINGS = optional(
    minLength=st.integers(0, 2), maxLength=st.integers(1, 4), pattern=PATTERNS
).map(lambda k: {"type": "string", **k})
NUMBERS = st.tuples(
    st.sampled_from(["integer", "number"]),
    optional(
        minimum=SMALL,
        maximum=SMALL,
        exclusiveMinimum=st.sampled_from([0, -2.5, 0.125]),
        exclusiveMaximum=st.sampled_from([9, 12.5]),
        multipleOf=st.sampled_from([1, 3, 0.5]),
    ),
).map(lambda pair: {"type": pair[0], **pair[1]})
LEAVES = st.one_of(
    STRINGS,
    NUMBERS,
    st.sampled_from(
        [{}, {"type": "null"}, {"type": "boolean"}, {"type": ["string", "null"]}]
    ),
    SCALARS.map(lambda value: {"const": value}),
    st.lists(SCALARS, min_size=1, max_size=3).map(lambda values: {"enum": values}),
)


def composed(children):
    objects = st.tuples(
        st.dictionaries(NAMES, children, max_size=3),
        optional(
            required=st.lists(NAMES, max_size=2, unique=True),
            additionalProperties=st.one_of(st.booleans(), children),
            patternProperties=st.dictionaries(PATTERNS, children, max_size=1),
            minProperties=st.integers(0, 2),
            maxProperties=st.integers(1, 3),
        ),
    ).map(lambda pair: {"type": "object", "properties": pair[0], **pair[1]})
    arrays = optional(
        items=children,
        prefixItems=st.lists(children, min_size=1, max_size=2),
        minItems=st.integers(0, 2),
        maxItems=st.integers(1, 3),
    ).map(lambda k: {"type": "array", **k})
    many = st.lists(children, min_size=1, max_size=2)
    groups = st.tuples(
        st.sampled_from(["anyOf", "oneOf", "allOf"]),
        many,
        st.one_of(st.just({}), children),
    ).map(lambda parts: {**parts[2], parts[0]: parts[1]})
    untyped = st.one_of(objects, STRINGS, NUMBERS).map(
        lambda schema: {k: v for k, v in schema.items() if k != "type"}
    )
    refs = st.tuples(children, st.one_of(st.just({}), NUMBERS)).map(
        lambda pair: {"$defs": {"d": pair[0]}, **pair[1], "$ref": "#/$defs/d"}
    )
    return st.one_of(objects, objects, arrays, groups, untyped, refs)


def rooted(schema):
    """Move the definitions of inner schemas to the root, where pointers find them."""
    definitions = {}

    def lift(node):
        if isinstance(node, list):
            return [lift(child) for child in node]
        if not isinstance(node, dict):
            return node
        node = {key: lift(child) for key, child in node.items()}
        if isinstance(node.get("$ref"), str):
            name = f"d{len(definitions)}"
            definitions[name] = node.pop("$defs")["d"]
            node["$ref"] = f"#/$defs/{name}"
        return node

    lifted = lift(schema)
    return {**lifted, "$defs": definitions} if definitions else lifted


SCHEMAS = st.recursive(LEAVES, composed, max_leaves=6).map(rooted)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=4,
)


WORDS = st.text("abcXYZ 0-9", max_size=5)


@st.composite
def ordinary(draw, depth=2):
    """A schema as people write them, and an instance of it in the grammar's order."""
    kinds = ["integer", "number", "string", "enum", "boolean", "nullable"]
    kind = draw(st.sampled_from(kinds + ["object", "object", "array"] * (depth > 0)))
    if kind in ("integer", "number"):
        value = draw(SMALL)
        span = draw(st.integers(0, 9))
        if kind == "number" and draw(st.booleans()):
            value += 0.5
        bounds = {"minimum": value - span, "maximum": value + draw(st.integers(1, 9))}
        return {"type": kind, **draw(st.sampled_from([{}, bounds]))}, value
    if kind == "string":
        value = draw(WORDS)
        lengths = {"minLength": max(0, len(value) - 1), "maxLength": len(value) + 1}
        keywords = draw(st.sampled_from([{}, lengths, {"pattern": "^[ -~]*$"}]))
        return {"type": "string", **keywords}, value
    if kind == "enum":
        values = draw(st.lists(WORDS, min_size=1, max_size=3, unique=True))
        return {"type": "string", "enum": values}, draw(st.sampled_from(values))
    if kind == "boolean":
        return {"type": "boolean"}, draw(st.booleans())
    if kind == "nullable":
        schema, value = draw(ordinary(depth=0))
        branches = {"anyOf": [schema, {"type": "null"}]}
        return branches, draw(st.sampled_from([value, None]))
    if kind == "array":
        schema, value = draw(ordinary(depth=depth - 1))
        count = draw(st.integers(0, 2))
        return {"type": "array", "items": schema, "minItems": count}, [value] * count
    names = draw(st.lists(NAMES, max_size=4, unique=True))
    pairs = {name: draw(ordinary(depth=depth - 1)) for name in names}
    required = [name for name in names if draw(st.booleans())]
    present = [name for name in names if name in required or draw(st.booleans())]
    closed = draw(st.sampled_from([{}, {"additionalProperties": False}]))
    schema = obj({name: pairs[name][0] for name in names}, *required, **closed)
    return schema, {name: pairs[name][1] for name in present}


class TestSchemas(CustomTestCase):
    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        SCHEMAS,
        st.sampled_from(list(GAPS)),
        st.integers(),
        st.lists(VALUES, max_size=4),
    )
    def test_what_follows_validates(self, schema, configured, seed, values):
        grammar = compile_key(configured, "json", json.dumps(schema))
        if error_of(grammar) is not None:
            return
        note(f"{keeper(grammar)}: {json.dumps(schema)}")
        rng = random.Random(seed)
        for _ in range(2):
            ids = sample(grammar.copy(), rng, limit=100)
            if ids is not None:
                text = tokenizer().decode(ids)
                note(text)
                self.assertTrue(valid(schema, text), text)
        for value in values:
            text = json.dumps(value, separators=(",", ":"))
            if accepts(grammar.copy(), ids_of(text)):
                self.assertTrue(valid(schema, text), text)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(ordinary(), st.sampled_from(list(GAPS)), st.data())
    def test_ordinary_instances_are_let_through(self, pair, configured, data):
        schema, value = pair
        grammar = compile_key(configured, "json", json.dumps(schema))
        self.assertIsNotNone(keeper(grammar), error_of(grammar))
        for separators in ((",", ":"), (", ", ": ")):
            text = json.dumps(value, separators=separators)
            self.assertTrue(valid(schema, text))
            self.assertTrue(accepts(grammar.copy(), ids_of(text)), text)
        # Of a broken text: what is let through is still valid JSON of the schema.
        at = data.draw(st.integers(0, len(text) - 1))
        broken = text[:at] + data.draw(st.sampled_from('0a"{}[],')) + text[at + 1 :]
        if accepts(grammar.copy(), ids_of(broken)):
            self.assertTrue(valid(schema, broken), broken)


if __name__ == "__main__":
    unittest.main()
