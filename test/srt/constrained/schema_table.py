"""The keywords of a JSON schema, each with texts that tell a kept one from a dropped one."""

from grammar_walk import obj
from schema_cases import NEITHER, TAGGED, I, S, errs, integers

# (what, schema, texts): the texts are valid and invalid ones that tell a kept keyword
# from a dropped one, in the order of the properties.
TABLE = [
    ("`type`", {"type": ["integer", "null"]}, ["1", "null", '"a"', "1.5"]),
    ("`enum`, `const`", {"enum": [1, "a", {"x": [1]}]}, ["1", '"a"', '{"x":[1]}', "2"]),
    (
        "`enum`, `const` of an integer above 2^53",
        {"enum": [2**53 + 1, [-(2**53) - 1]]},
        [str(2**53 + 1), str(2**53), str([-(2**53) - 1]), str([-(2**53)])],
    ),
    (
        "`enum`, `const` of an integer above 2^63",
        {"const": 2**64 - 1},
        [str(2**64 - 1), str(2**64)],
    ),
    ("`enum` with other types than `type`", integers(enum=[1, "a"]), ["1", '"a"']),
    ("`enum`, `const` beside others", {"enum": [1, 2], "minimum": 2}, ["1", "2"]),
    (
        "`properties`, `required`, `additionalProperties`",
        obj({"a": I, "b": S}, "a", additionalProperties=False),
        ['{"a":1}', '{"a":1,"b":"x"}', '{"b":"x"}', '{"a":1,"c":1}', '{"a":"x"}'],
    ),
    (
        "`additionalProperties` with a schema",
        obj({"a": I}, additionalProperties=S),
        ["{}", '{"a":1,"b":"x"}', '{"a":1,"b":1}'],
    ),
    (
        "a required name without a property",
        obj({"a": I}, "z"),
        ['{"a":1}', '{"z":1}', '{"a":1,"z":1}'],
    ),
    (
        "`patternProperties`",
        obj({"a": S}, patternProperties={"^x": I}, additionalProperties=False),
        ['{"a":"s","xy":1}', '{"xy":"s"}', '{"b":1}'],
    ),
    (
        "`propertyNames` without `properties`",
        {"type": "object", "propertyNames": {"pattern": "^[a-c]+$"}},
        ['{"ab":1}', '{"x":1}'],
    ),
    (
        "`propertyNames` beside `properties`",
        obj({"x": I}, propertyNames={"pattern": "^[a-c]+$"}),
        ['{"x":1}', "{}"],
    ),
    (
        "`minProperties`, `maxProperties` of any names",
        {
            "type": "object",
            "additionalProperties": I,
            "minProperties": 1,
            "maxProperties": 2,
        },
        ["{}", '{"a":1}', '{"a":1,"b":1}', '{"a":1,"b":1,"c":1}'],
    ),
    (
        "`minProperties`, `maxProperties` of optional properties",
        obj(
            {"a": I, "b": I, "c": I},
            minProperties=1,
            maxProperties=2,
            additionalProperties=False,
        ),
        ["{}", '{"a":1}', '{"a":1,"b":1}', '{"a":1,"b":1,"c":1}'],
    ),
    (
        "`minProperties` above the required names and one more",
        {"type": "object", "minProperties": 2},
        ['{"a":1}', '{"a":1,"a":1}', '{"a":1,"b":1}'],
    ),
    (
        "`unevaluatedProperties`",
        obj({"a": I}, unevaluatedProperties=False),
        ['{"a":1}', '{"b":1}'],
    ),
    (
        "`items`, `minItems`, `maxItems`",
        {"type": "array", "items": I, "minItems": 1, "maxItems": 2},
        ["[]", "[1]", "[1,2]", "[1,2,3]", '["a"]'],
    ),
    (
        "`prefixItems`",
        {"type": "array", "prefixItems": [I, S], "items": False},
        ["[]", "[1]", '[1,"a"]', '["a"]', '[1,"a",1]'],
    ),
    (
        "`maxItems` below the `prefixItems`",
        {"type": "array", "prefixItems": [I, S], "maxItems": 1},
        ["[1]", '[1,"a"]'],
    ),
    ("`uniqueItems`", {"type": "array", "uniqueItems": True}, ["[1]", "[1,1]"]),
    (
        "`unevaluatedItems`",
        {"type": "array", "prefixItems": [I], "unevaluatedItems": False},
        ["[1]", "[1,2]"],
    ),
    (
        "whole bounds of an integer",
        integers(minimum=-3, exclusiveMaximum=2**40),
        ["-3", "-4", str(2**40 - 1), str(2**40)],
    ),
    ("fractional bounds of an integer", integers(minimum=0.5), ["0", "1"]),
    (
        "bounds of an integer above 2^53",
        integers(maximum=2**63 - 2),
        [str(2**63 - 2), str(2**63 - 1)],
    ),
    ("bounds above 2^63", integers(maximum=2**64 - 1), [str(2**64 - 1), str(2**64)]),
    (
        "bounds of a number",
        {"type": "number", "minimum": 0.5, "exclusiveMaximum": 3},
        ["0.5", "0.4", "2.99", "3", "3.0"],
    ),
    ("bounds of more than six decimals", {"type": "number", "minimum": 1e-7}, None),
    ("`multipleOf` of an integer up to 1024", integers(multipleOf=7), ["7", "8", "0"]),
    (
        "`multipleOf` of an integer beside bounds",
        integers(multipleOf=7, minimum=10),
        ["7", "14", "15"],
    ),
    (
        "`multipleOf` of a number",
        {"type": "number", "multipleOf": 0.5},
        ["0.5", "0.4", "3"],
    ),
    ("`multipleOf` of more than 10,000", integers(multipleOf=100003), None),
    (
        "`minLength`, `maxLength`",
        {"type": "string", "minLength": 2, "maxLength": 3},
        ['"a"', '"ab"', '"abc"', '"abcd"', '"éé"'],
    ),
    (
        "a `pattern` between ^ and $",
        {"type": "string", "pattern": "^(a|b)[0-9]{2,}$"},
        ['"a12"', '"b123"', '"a1"', '"ca12"'],
    ),
    (
        "a `pattern` not between ^ and $",
        {"type": "string", "pattern": "^a"},
        ['"a"', '"ab"', '"b"'],
    ),
    (
        "a `pattern` that looks around or back",
        {"type": "string", "pattern": "^(?!a)[a-c]$"},
        ['"a"', '"b"'],
    ),
    (
        "`pattern`, `format` and lengths together",
        {"type": "string", "pattern": "^[a-c]+$", "maxLength": 2},
        ['"ab"', '"abc"'],
    ),
    (
        "`format`: `time`, `duration`, `email`, `hostname`, `ipv6`, `uri`, `uuid`",
        {"type": "string", "format": "uuid"},
        ['"123e4567-e89b-12d3-a456-426614174000"', '"123e4567"'],
    ),
    (
        "`format`: `date`, `date-time`, `ipv4`",
        {"type": "string", "format": "date"},
        ['"2024-02-29"', '"2023-02-31"'],
    ),
    (
        "`format`: `uri-reference`, `uri-template`, `json-pointer`, "
        "`relative-json-pointer`",
        {"type": "string", "format": "uri-reference"},
        ['"a/b"'],
    ),
    ("any other `format` of a string", {"type": "string", "format": "regex"}, ['"("']),
    ("`anyOf`", {"anyOf": [I, S]}, ["1", '"a"', "null"]),
    (
        "`anyOf`, `allOf` or `$ref` beside others",
        obj({"a": I, "b": I}, anyOf=[{"required": ["a"]}, {"required": ["b"]}]),
        ["{}", '{"a":1}', '{"b":1}', '{"a":1,"b":1}'],
    ),
    ("`oneOf` of disjoint branches", {"oneOf": TAGGED}, ['{"t":"a","v":1}', '{"v":1}']),
    ("`allOf` of one", {"allOf": [integers(minimum=2)]}, ["1", "2"]),
    (
        "`allOf` of several",
        {"allOf": [integers(minimum=2), {"maximum": 4}]},
        ["1", "3", "5"],
    ),
    (
        "`$ref` into the schema, recursive too",
        {
            "$ref": "#/$defs/tree",
            "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
        },
        ["[]", "[[],[[]]]", "[1]"],
    ),
    (
        "`$ref` with an escape (`~1`)",
        {"$ref": "#/$defs/a~1b", "$defs": {"a/b": I}},
        ["1", '"a"'],
    ),
    ("a keyword without its `type`", {"minimum": 3}, ["2", "3", '"a"']),
    (
        "`properties` or `items` without `type`",
        {"properties": {"a": I}},
        ['{"a":1}', '{"a":"x"}'],
    ),
    *NEITHER,
]


class Gaps:
    """A subclass names a backend and what tells its gaps, and is a test."""

    backend: str

    def test_gaps_are_the_backends_own(self):
        """A gap is named exactly where the backend alone errs on the row's texts."""
        for what, schema, texts in TABLE:
            with self.subTest(what):
                gap, erring = self.gap_of(schema), errs(self.backend, schema, texts)
                if erring is not None:
                    self.assertEqual(gap is not None, erring, gap)
