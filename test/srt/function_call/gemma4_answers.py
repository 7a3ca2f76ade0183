"""Answers as Gemma 4 writes them, right and wrong, with what the API must say of them."""

import json
import sys

from hypothesis import settings
from hypothesis import strategies as st

from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
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


def function_tool(name: str, **properties) -> Tool:
    """A tool with the JSON schemas of its parameters."""
    parameters = {"type": "object", "properties": properties}
    return Tool(type="function", function={"name": name, "parameters": parameters})


TOOLS = [
    function_tool(
        "get_weather", city={"type": "string"}, unit={"type": ["string", "null"]}
    ),
    function_tool(
        "web_search",
        query={"type": "string"},
        limit={"type": "integer"},
        tags={"type": "array", "items": {"type": "string"}},
    ),
    function_tool("run"),
]


def call(arguments: str, name: str = "web_search") -> str:
    """A call as the model writes it, with `|` for the string delimiter."""
    arguments = arguments.replace("|", STRING_DELIM)
    return f"{TOOL_CALL_START}call:{name}{{{arguments}}}{TOOL_CALL_END}"


def _searches(*arguments: dict) -> list:
    return [("web_search", one) for one in arguments]


# Name, text, calls (name and arguments), content.
ANSWERS = [
    (
        "two calls of the second tool",
        call("query:|a|") + call("query:|b|"),
        _searches({"query": "a"}, {"query": "b"}),
        "",
    ),
    (
        "opening delimiter left out",
        call("query:Paris, France|,limit:5"),
        _searches({"query": "Paris, France", "limit": 5}),
        "",
    ),
    (
        "null",
        call("city:|Oslo|,unit:null", "get_weather"),
        [("get_weather", {"city": "Oslo", "unit": None})],
        "",
    ),
    (
        "JSON quotes inside an array",
        call('query:|x|,tags:["ds_1","b"]'),
        _searches({"query": "x", "tags": ["ds_1", "b"]}),
        "",
    ),
    (
        "the end marker inside a string",
        call("query:|what is !END ?|").replace("!END", TOOL_CALL_END),
        _searches({"query": f"what is {TOOL_CALL_END} ?"}),
        "",
    ),
    (
        "one closing marker too many",
        call("query:|x|") + TOOL_CALL_END,
        _searches({"query": "x"}),
        "",
    ),
    ("prose that ends in the first character of a marker", "if a <", [], "if a <"),
]

MORE_ANSWERS = [
    (
        "text around calls",
        f"One moment.{call('query:|x|')}\n{call('limit:2')}\nThat is all.",
        _searches({"query": "x"}, {"limit": 2}),
        "One moment.\nThat is all.",
    ),
    (
        "prose about the markers",
        f"{TOOL_CALL_START} opens a call, {TOOL_CALL_END} ends it: "
        f"{call('key:|value|', 'NAME')}; {STRING_DELIM} and call:web_search{{}} too.",
        [],
        f"{TOOL_CALL_START} opens a call, {TOOL_CALL_END} ends it: "
        f"{call('key:|value|', 'NAME')}; {STRING_DELIM} and call:web_search{{}} too.",
    ),
    (
        "one opening marker too many",
        TOOL_CALL_START + call("query:|x|"),
        _searches({"query": "x"}),
        "",
    ),
    (
        "no last brace",
        f"{TOOL_CALL_START}call:web_search{{query:{STRING_DELIM}x{STRING_DELIM}"
        f"{TOOL_CALL_END}ok",
        _searches({"query": "x"}),
        "ok",
    ),
    (
        "neither brace nor end marker, then a second call",
        f"{TOOL_CALL_START}call:web_search{{tags:[1{call('limit:2')}",
        _searches({"tags": ["1"]}, {"limit": 2}),
        "",
    ),
    (
        "two calls between one pair of markers",
        call("query:|x|}call:web_search{limit:1"),
        _searches({"query": "x"}, {"limit": 1}),
        "",
    ),
    ("no arguments", call(""), _searches({}), ""),
    ("a brace too many", call("query:|x|}"), _searches({"query": "x"}), ""),
    (
        "a brace too many before the next pair",
        call("a:{b:1}},limit:2"),
        _searches({"a": {"b": 1}, "limit": 2}),
        "",
    ),
    (
        "a bracket left open",
        call("a:{b:[1,{c:2}},limit:3"),
        _searches({"a": {"b": [1, {"c": 2}]}, "limit": 3}),
        "",
    ),
    (
        "brackets inside strings of arrays",
        call('tags:[|]|,|}|,"[",|{x:[|],limit:1'),
        _searches({"tags": ["]", "}", "[", "{x:["], "limit": 1}),
        "",
    ),
    (
        "brackets inside a string without its opening delimiter",
        call("query:f(x[1]) {y}|,limit:5"),
        _searches({"query": "f(x[1]) {y}", "limit": 5}),
        "",
    ),
    (
        "closing delimiter left out",
        call("limit:1,query:|x") + call("query:|y|"),
        _searches({"limit": 1, "query": "x"}, {"query": "y"}),
        "",
    ),
    (
        "closing JSON quote left out",
        call('limit:1,query:"x') + call('query:"y"'),
        _searches({"limit": 1, "query": "x"}, {"query": "y"}),
        "",
    ),
    (
        "no delimiters",
        call("query:red shoes, size 9,limit:5"),
        _searches({"query": "red shoes, size 9", "limit": 5}),
        "",
    ),
    (
        "no delimiters, and the schema says string",
        call("query:90210,tags:[1,true],limit:7"),
        _searches({"query": "90210", "tags": ["1", "true"], "limit": 7}),
        "",
    ),
    (
        "no delimiters, and what looks like a key is none of the tool's",
        call("query:note: see, page: 5,limit:5"),
        _searches({"query": "note: see, page: 5", "limit": 5}),
        "",
    ),
    (
        "delimiters where the schema says integer",
        call("limit:5|,tags:[1|,2]"),
        _searches({"limit": "5", "tags": ["1", "2"]}),
        "",
    ),
    (
        "the end marker inside a JSON string",
        call('query:"what is !END ?",limit:1').replace("!END", TOOL_CALL_END),
        _searches({"query": f"what is {TOOL_CALL_END} ?", "limit": 1}),
        "",
    ),
    (
        "the last string left open",
        call("limit:1,tags:[|a|,|b]") + "ok",
        _searches({"limit": 1, "tags": ["a", "b"]}),
        "ok",
    ),
    (
        "a delimiter inside a string",
        call("query:|the | token|,limit:5"),
        _searches({"query": f"the {STRING_DELIM} token", "limit": 5}),
        "",
    ),
    (
        "a comma left out",
        call("query:|x| limit:5,tags:[|a| |b|]"),
        _searches({"query": "x", "limit": 5, "tags": ["a", "b"]}),
        "",
    ),
    (
        "JSON",
        call('"query": "say \\"hi\\"\\n\\ud83d\\ude00", "limit": 5, "a": {"b": null}'),
        _searches({"query": 'say "hi"\n\U0001f600', "limit": 5, "a": {"b": None}}),
        "",
    ),
    (
        "escaped quotes before what would end a string or a key",
        call('a:"x\\",limit:5","b\\"":"\\"}"'),
        _searches({"a": 'x",limit:5', 'b"': '"}'}),
        "",
    ),
    (
        "Python's constants",
        call("a:True,b:False,c:None"),
        _searches({"a": True, "b": False, "c": None}),
        "",
    ),
    (
        "what only looks like a number",
        call("a:01,b:1.,c:--1,d:1e999,e:inf,f:1_0,g:0x1", "run"),
        [
            (
                "run",
                dict(zip("abcdefg", ("01", "1.", "--1", "1e999", "inf", "1_0", "0x1"))),
            )
        ],
        "",
    ),
    (
        "no value",
        call("query:,tags:[,],limit:"),
        _searches({"query": "", "tags": [], "limit": ""}),
        "",
    ),
    (
        "cut in a string",
        TOOL_CALL_START + "call:web_search{query:" + STRING_DELIM + "x}",
        _searches({"query": "x}"}),
        "",
    ),
    (
        "cut in the name",
        TOOL_CALL_START + "call:web_sea",
        [],
        TOOL_CALL_START + "call:web_sea",
    ),
]


_THOUGHT = f"{CHANNEL_START}thought\nHm.{CHANNEL_END}"

# Name, text, whether the prompt ends in an open thought, reasoning, calls, content.
THOUGHTS = [
    (
        "a call before the thought is closed",
        f"{CHANNEL_START}thought\nLet me look.{call('query:|x|')}",
        False,
        "Let me look.",
        _searches({"query": "x"}),
        "",
    ),
    (
        "thinking on, a call at once",
        call("query:|x|"),
        False,
        "",
        _searches({"query": "x"}),
        "",
    ),
    ("thinking on, an answer at once", "It is 5.", False, "", [], "It is 5."),
    (
        "the prompt ends in an open thought",
        f"I look at it{CHANNEL_END}It is 5.",
        True,
        "I look at it",
        [],
        "It is 5.",
    ),
]

MORE_THOUGHTS = [
    (
        "a thought, an answer",
        f"{CHANNEL_START}thought\nHm.{CHANNEL_END}It is 5.",
        False,
        "Hm.",
        [],
        "It is 5.",
    ),
    (
        "a second thought",
        f"{CHANNEL_START}thought\na{CHANNEL_END}b{CHANNEL_START}thought\nc{CHANNEL_END}d",
        False,
        "ac",
        [],
        "bd",
    ),
    (
        "a second thought after the prompt's",
        f"a{CHANNEL_END}b{CHANNEL_START}thought\nc{CHANNEL_END}{call('limit:1')}",
        True,
        "ac",
        _searches({"limit": 1}),
        "b",
    ),
    (
        "an empty thought",
        f"{CHANNEL_START}thought\n{CHANNEL_END}It is 5.",
        False,
        "",
        [],
        "It is 5.",
    ),
    (
        "an empty thought without a new line",
        f"{CHANNEL_START}thought{CHANNEL_END}It is 5.",
        False,
        "",
        [],
        "It is 5.",
    ),
    (
        "the thought closed twice",
        f"{CHANNEL_START}thought\nHm.{CHANNEL_END}{CHANNEL_END}It is 5.",
        False,
        "Hm.",
        [],
        "It is 5.",
    ),
    (
        "the thought opened twice",
        f"{CHANNEL_START}thought\nHm.{CHANNEL_END}It is 5.",
        True,
        "Hm.",
        [],
        "It is 5.",
    ),
    (
        "the thought closed behind the call",
        f"{CHANNEL_START}thought\nHm.{call('limit:1')}{CHANNEL_END}Done.",
        False,
        "Hm.",
        _searches({"limit": 1}),
        "Done.",
    ),
    (
        "the thought's markers inside a string of a call",
        call("query:|!THOUGHT|").replace("!THOUGHT", _THOUGHT),
        False,
        "",
        _searches({"query": _THOUGHT}),
        "",
    ),
    (
        "prose about the markers",
        f"{CHANNEL_START} opens a channel, {CHANNEL_END} closes it.",
        False,
        "",
        [],
        f"{CHANNEL_START} opens a channel, {CHANNEL_END} closes it.",
    ),
    (
        "a thought about the markers",
        f"{CHANNEL_START}thought\n{TOOL_CALL_START} calls{CHANNEL_END}ok",
        False,
        f"{TOOL_CALL_START} calls",
        [],
        "ok",
    ),
    ("cut in the opening marker", f"{CHANNEL_START}thou", False, "", [], ""),
    (
        "cut in the closing marker",
        f"{CHANNEL_START}thought\nHm.<chan",
        False,
        "Hm.<chan",
        [],
        "",
    ),
]


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


def add_calls(calls: list, items: list) -> None:
    """Add streamed items to `calls`, which holds a list [name, arguments] for each call."""
    for item in items:
        if item.name is not None:
            assert item.tool_index == len(calls)
            calls.append([item.name, item.parameters])
        else:
            assert item.tool_index == len(calls) - 1
            calls[-1][1] += item.parameters


def parse_calls(text: str, cuts=None, tools=TOOLS) -> tuple:
    """Content and calls, as (name, JSON), of an answer: streamed if `cuts` are given."""
    parser = FunctionCallParser(tools, "gemma4")
    if cuts is None:
        content, items = parser.parse_non_stream(text)
        assert [item.tool_index for item in items] == list(range(len(items)))
        return content, [(item.name, item.parameters) for item in items]
    content, calls = "", []
    results = [parser.parse_stream_chunk(piece) for piece in pieces(text, cuts)]
    for part, items in [*results, parser.parse_stream_end()]:
        content += part
        add_calls(calls, items)
    return content, [tuple(one) for one in calls]


def loads(calls: list) -> list:
    """Calls with their arguments as objects."""
    result = [(name, json.loads(arguments)) for name, arguments in calls]
    assert all(isinstance(arguments, dict) for _, arguments in result)
    return result


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
