"""Answers in which Gemma 4 thinks, with what the API must say of them."""

import sys
from pathlib import Path

from sglang.srt.function_call.gemma4_format import TOOL_CALL_START

sys.path.insert(0, str(Path(__file__).parents[1] / "function_call"))
from gemma4_answers import call, searches  # noqa: E402
from gemma4_texts import CHANNEL_END, CHANNEL_START  # noqa: E402

_THOUGHT = f"{CHANNEL_START}thought\nHm.{CHANNEL_END}"

# Name, text, whether the prompt ends in an open thought, reasoning, calls, content; the
# first are public reports.
THOUGHTS = [
    (
        "a call before the thought is closed",
        f"{CHANNEL_START}thought\nLet me look.{call('query:|x|')}",
        False,
        "Let me look.",
        searches({"query": "x"}),
        "",
    ),
    (
        "thinking on, a call at once",
        call("query:|x|"),
        False,
        "",
        searches({"query": "x"}),
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
        searches({"limit": 1}),
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
        searches({"limit": 1}),
        "Done.",
    ),
    (
        "the thought's markers inside a string of a call",
        call("query:|!THOUGHT|").replace("!THOUGHT", _THOUGHT),
        False,
        "",
        searches({"query": _THOUGHT}),
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
