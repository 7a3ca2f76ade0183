"""Texts of Gemma 4's format and near it, generated, and ways to cut and to time them."""

import json
import re
import sys

from hypothesis import settings
from hypothesis import strategies as st

from sglang.srt.function_call.gemma4_format import (
    STRING_DELIM,
    TOOL_CALL_END,
    TOOL_CALL_START,
)

# A nightly run reads 100,000 texts.
NIGHTLY = settings.default.max_examples >= 1000
MANY = settings(max_examples=100_000 if NIGHTLY else 300)

CHANNEL_START = "<|channel>"
CHANNEL_END = "<channel|>"


def pieces(text: str, cuts) -> list:
    """`text` cut at the places `cuts`, in any order."""
    cuts = sorted({min(cut, len(text)) for cut in cuts})
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]


def work(scanner, text: str, size: int) -> float:
    """Function calls, Python's and C's, that a scanner makes for a character of `text`
    in pieces of `size`."""
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    parts = pieces(text, range(0, len(text), size))
    sys.setprofile(count)
    try:
        for part in parts:
            scanner.feed(part)
        scanner.finish()
    finally:
        sys.setprofile(None)
    return calls / len(text)


# Texts of the grammar's pieces, mostly inside a call, and of any characters.
PIECES = [
    *(TOOL_CALL_START, TOOL_CALL_END, STRING_DELIM, CHANNEL_START, CHANNEL_END),
    *("thought\n", "call:", "web_search", "get_weather", "NAME", "{", "}", "[", "]"),
    *(",", ":", '"', "\\", "\\n", "\\u00e9", "\\ud83d", "\\ude00", "query", "limit:"),
    *("null", "true", "None", "5", "-1.5e3", "01", " ", "\n", "a", "b c", "é", "😀"),
    *("<", "|", ">", "<|", "|>", "//", "'", ";", "call:web_search{"),
    *(f"{TOOL_CALL_START}call:web_search{{", f"query:{STRING_DELIM}", "}<tool_call|>"),
    f"{CHANNEL_START}thought\n",
]
STARTS = ["", f"{TOOL_CALL_START}call:web_search{{", f"{CHANNEL_START}thought\n"]
STARTS += [f"{STARTS[1]}query:{STRING_DELIM}", f'{STARTS[1]}query:"']
TEXTS = st.builds(
    lambda start, parts: start + "".join(parts),
    st.sampled_from(STARTS),
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=25),
)
CUTS = st.lists(st.integers(0, 200), max_size=6)

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
