"""Answers as Gemma 4 writes them, with what the API must say of them."""

import json

from gemma4_texts import pieces

from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.function_call.gemma4_format import (
    STRING_DELIM,
    TOOL_CALL_END,
    TOOL_CALL_START,
)


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


def searches(*arguments: dict) -> list:
    return [("web_search", one) for one in arguments]


# Name, text, calls (name and arguments), content; the first are public reports.
ANSWERS = [
    (
        "two calls of the second tool",
        call("query:|a|") + call("query:|b|"),
        searches({"query": "a"}, {"query": "b"}),
        "",
    ),
    (
        "null",
        call("city:|Oslo|,unit:null", "get_weather"),
        [("get_weather", {"city": "Oslo", "unit": None})],
        "",
    ),
    (
        "the end marker inside a string",
        call("query:|what is !END ?|").replace("!END", TOOL_CALL_END),
        searches({"query": f"what is {TOOL_CALL_END} ?"}),
        "",
    ),
    (
        "one closing marker too many",
        call("query:|x|") + TOOL_CALL_END,
        searches({"query": "x"}),
        "",
    ),
    ("prose that ends in the first character of a marker", "if a <", [], "if a <"),
]

MORE_ANSWERS = [
    (
        "text around calls",
        f"One moment.{call('query:|x|')}\n{call('limit:2')}\nThat is all.",
        searches({"query": "x"}, {"limit": 2}),
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
        searches({"query": "x"}),
        "",
    ),
    (
        "no last brace",
        f"{TOOL_CALL_START}call:web_search{{query:{STRING_DELIM}x{STRING_DELIM}"
        f"{TOOL_CALL_END}ok",
        searches({"query": "x"}),
        "ok",
    ),
    ("no arguments", call(""), searches({}), ""),
    (
        "a bracket left open",
        call("a:{b:[1,{c:2}},limit:3"),
        searches({"a": {"b": [1, {"c": 2}]}, "limit": 3}),
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
        searches({"query": "", "tags": [], "limit": ""}),
        "",
    ),
    (
        "cut in a string",
        TOOL_CALL_START + "call:web_search{query:" + STRING_DELIM + "x}",
        searches({"query": "x}"}),
        "",
    ),
    (
        "cut in the name",
        TOOL_CALL_START + "call:web_sea",
        [],
        TOOL_CALL_START + "call:web_sea",
    ),
]


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


class Parsed:
    """Of tests of the tool-call parser."""

    def check(self, text, calls, content):
        whole = parse_calls(text)
        self.assertEqual((whole[0], loads(whole[1])), (content, calls))
        for cut in range(1, len(text)):
            self.assertEqual(parse_calls(text, [cut]), whole)
        self.assertEqual(parse_calls(text, range(len(text))), whole)
