#!/usr/bin/env bash
# llguidance 1.9.1: an integer above 2^53 in `const`, `enum`, `minimum` or `maximum` of a
# JSON schema is rounded to a double, without a word. A `const` of 2^53 + 1 then refuses
# that number and lets 2^53 through: identifiers of 64 bits come out as their neighbours.
# A `maximum` of 2^53 + 1 refuses 2^53 + 1, and a `minimum` of it takes 2^53.
# A `const` of 2^53 itself, and one in a string, are kept.
#
# Seen on 2026-11-30 with llguidance 1.9.1, 2^53 = 9007199254740992:
#   const 9007199254740993     takes ...992, not ...993
#   enum [9007199254740993]    takes ...992, not ...993
#   maximum 9007199254740993   takes ...992, not ...993
#   minimum 9007199254740993   takes ...992 and ...993
#   const "9007199254740993"   takes that alone
#
# Exits with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet install llguidance==1.9.1
cat >"$folder/integers.py" <<'PYTHON'
import importlib.metadata
import json

from llguidance import LLMatcher, LLTokenizer

TOKENIZER = LLTokenizer("byte")
EXACT, NEXT = 2**53, 2**53 + 1


def takes(schema, value):
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    matcher = LLMatcher(TOKENIZER, grammar, log_level=0)
    assert not matcher.get_error(), matcher.get_error()
    tokens = TOKENIZER.tokenize_str(json.dumps(value))
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


print("llguidance", importlib.metadata.version("llguidance"))
WRONG = {
    "const": ({"const": NEXT}, [EXACT]),
    "enum": ({"enum": [NEXT]}, [EXACT]),
    "maximum": ({"type": "integer", "minimum": EXACT, "maximum": NEXT}, [EXACT]),
    "minimum": ({"type": "integer", "minimum": NEXT, "maximum": NEXT + 1}, None),
}
for name, (schema, seen) in WRONG.items():
    taken = [value for value in (EXACT, NEXT) if takes(schema, value)]
    print(f"{json.dumps(schema)} takes {taken}")
    assert taken == (seen or [EXACT, NEXT]), f"{name} is read in another way now"
assert takes({"const": EXACT}, EXACT)
assert takes({"const": str(NEXT)}, str(NEXT))
assert not takes({"const": str(NEXT)}, str(EXACT))
PYTHON
"$folder/venv/bin/python" "$folder/integers.py"
