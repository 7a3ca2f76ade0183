"""Answers in which Gemma 4 writes calls wrong, with what the API must say of them."""

from gemma4_answers import call, searches

from sglang.srt.function_call.gemma4_format import (
    STRING_DELIM,
    TOOL_CALL_END,
    TOOL_CALL_START,
)

# Name, text, calls (name and arguments), content; the first are public reports.
MISWRITTEN = [
    (
        "opening delimiter left out",
        call("query:Paris, France|,limit:5"),
        searches({"query": "Paris, France", "limit": 5}),
        "",
    ),
    (
        "JSON quotes inside an array",
        call('query:|x|,tags:["ds_1","b"]'),
        searches({"query": "x", "tags": ["ds_1", "b"]}),
        "",
    ),
]

MORE_MISWRITTEN = [
    (
        "neither brace nor end marker, then a second call",
        f"{TOOL_CALL_START}call:web_search{{tags:[1{call('limit:2')}",
        searches({"tags": ["1"]}, {"limit": 2}),
        "",
    ),
    (
        "two calls between one pair of markers",
        call("query:|x|}call:web_search{limit:1"),
        searches({"query": "x"}, {"limit": 1}),
        "",
    ),
    ("a brace too many", call("query:|x|}"), searches({"query": "x"}), ""),
    (
        "a brace too many before the next pair",
        call("a:{b:1}},limit:2"),
        searches({"a": {"b": 1}, "limit": 2}),
        "",
    ),
    (
        "brackets inside strings of arrays",
        call('tags:[|]|,|}|,"[",|{x:[|],limit:1'),
        searches({"tags": ["]", "}", "[", "{x:["], "limit": 1}),
        "",
    ),
    (
        "brackets inside a string without its opening delimiter",
        call("query:f(x[1]) {y}|,limit:5"),
        searches({"query": "f(x[1]) {y}", "limit": 5}),
        "",
    ),
    (
        "closing delimiter left out",
        call("limit:1,query:|x") + call("query:|y|"),
        searches({"limit": 1, "query": "x"}, {"query": "y"}),
        "",
    ),
    (
        "closing JSON quote left out",
        call('limit:1,query:"x') + call('query:"y"'),
        searches({"limit": 1, "query": "x"}, {"query": "y"}),
        "",
    ),
    (
        "no delimiters",
        call("query:red shoes, size 9,limit:5"),
        searches({"query": "red shoes, size 9", "limit": 5}),
        "",
    ),
    (
        "no delimiters, and the schema says string",
        call("query:90210,tags:[1,true],limit:7"),
        searches({"query": "90210", "tags": ["1", "true"], "limit": 7}),
        "",
    ),
    (
        "no delimiters, and what looks like a key is none of the tool's",
        call("query:note: see, page: 5,limit:5"),
        searches({"query": "note: see, page: 5", "limit": 5}),
        "",
    ),
    (
        "delimiters where the schema says integer",
        call("limit:5|,tags:[1|,2]"),
        searches({"limit": "5", "tags": ["1", "2"]}),
        "",
    ),
    (
        "the end marker inside a JSON string",
        call('query:"what is !END ?",limit:1').replace("!END", TOOL_CALL_END),
        searches({"query": f"what is {TOOL_CALL_END} ?", "limit": 1}),
        "",
    ),
    (
        "the last string left open",
        call("limit:1,tags:[|a|,|b]") + "ok",
        searches({"limit": 1, "tags": ["a", "b"]}),
        "ok",
    ),
    (
        "a delimiter inside a string",
        call("query:|the | token|,limit:5"),
        searches({"query": f"the {STRING_DELIM} token", "limit": 5}),
        "",
    ),
    (
        "a comma left out",
        call("query:|x| limit:5,tags:[|a| |b|]"),
        searches({"query": "x", "limit": 5, "tags": ["a", "b"]}),
        "",
    ),
    (
        "JSON",
        call('"query": "say \\"hi\\"\\n\\ud83d\\ude00", "limit": 5, "a": {"b": null}'),
        searches({"query": 'say "hi"\n\U0001f600', "limit": 5, "a": {"b": None}}),
        "",
    ),
    (
        "escaped quotes before what would end a string or a key",
        call('a:"x\\",limit:5","b\\"":"\\"}"'),
        searches({"a": 'x",limit:5', 'b"': '"}'}),
        "",
    ),
    (
        "Python's constants",
        call("a:True,b:False,c:None"),
        searches({"a": True, "b": False, "c": None}),
        "",
    ),
]
