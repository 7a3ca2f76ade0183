"""JSON schemas, what `jsonschema` says of texts, and what a grammar backend alone lets
through."""

import json
from decimal import Decimal

from grammar_walk import accepts, backend, error_of, ids_of, obj
from jsonschema import Draft202012Validator, FormatChecker


def integers(**keywords):
    return {"type": "integer", **keywords}


I, S = {"type": "integer"}, {"type": "string"}
TAGGED = [obj({"t": {"const": tag}, "v": I}, "t") for tag in "ab"]


def valid(schema, text) -> bool:
    """`jsonschema`'s word, with decimals read as written."""
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    value = json.loads(text, parse_float=Decimal)
    validator = Draft202012Validator(exact, format_checker=FormatChecker())
    return validator.is_valid(value)


def alone(name, schema):
    """The grammar of the one backend, whatever it drops; its error otherwise."""
    made = backend(name)
    if name == "xgrammar":
        made = made.grammar_compiler
        try:
            ctx = made.compile_json_schema(json.dumps(schema))
        except RuntimeError as e:
            return None, str(e)
        return backend(name)._from_context(ctx, "", None), None
    grammar = made.dispatch_json(json.dumps(schema))
    return (None, error_of(grammar)) if error_of(grammar) else (grammar, None)


def told_apart(name, schema, texts) -> bool:
    """Whether the backend alone lets through the valid texts and no other."""
    grammar, error = alone(name, schema)
    if error is not None:
        return False
    return all(accepts(grammar.copy(), ids_of(t)) == valid(schema, t) for t in texts)


def errs(name, schema, texts) -> bool | None:
    """Whether the backend alone errs on the texts; None where they cannot tell."""
    if texts is None or not any(valid(schema, text) for text in texts):
        return None
    return not told_apart(name, schema, texts)


# What neither backend keeps: (what, schema, texts): the texts are valid and invalid ones that tell a kept keyword
# from a dropped one, in the order of the properties.
NEITHER = [
    (
        "`dependentRequired`, `dependentSchemas`, `dependencies`",
        obj({"a": I, "b": I}, dependentRequired={"a": ["b"]}),
        ['{"a":1}', '{"a":1,"b":1}'],
    ),
    (
        "`contains`, `minContains`, `maxContains`",
        {"type": "array", "items": I, "contains": {"const": 3}},
        ["[1]", "[3]"],
    ),
    ("`oneOf` of others", {"oneOf": [integers(maximum=3), I]}, ["2", "5"]),
    ("`$ref` to an anchor or elsewhere", {"$ref": "#x", "$defs": {"x": I}}, None),
    ("`not`", {"not": S}, ["1", '"a"']),
    ("`if`, `then`, `else`", {"if": I, "then": {"minimum": 3}}, ["2", "3", '"a"']),
]
