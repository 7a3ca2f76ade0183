"""Gemma 4's thoughts, whole and streamed, before the parser of its tool calls: reasoning,
calls and content of reported and of generated answers."""

import sys
import unittest
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.parser.gemma4_thoughts import (
    CHANNEL_END,
    CHANNEL_START,
    Gemma4ThoughtScanner,
)
from sglang.srt.parser.reasoning_parser import ReasoningParser
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parents[1] / "function_call"))
from gemma4_answers import TOOLS, add_calls, call, loads, parse_calls  # noqa: E402
from gemma4_texts import (  # noqa: E402
    CUTS,
    MANY,
    PIECES,
    STARTS,
    TEXTS,
    pieces,
    work,
)
from gemma4_thought_answers import MORE_THOUGHTS, THOUGHTS  # noqa: E402

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")


def parse(text, cuts=None, stream_reasoning=True, **kwargs) -> tuple:
    """Reasoning, content and calls of an answer: streamed if `cuts` are given."""
    parser = ReasoningParser("gemma4", stream_reasoning=stream_reasoning, **kwargs)
    if cuts is None:
        reasoning, rest = parser.parse_non_stream(text)
        return reasoning, *parse_calls(rest)
    tool_parser = FunctionCallParser(TOOLS, "gemma4")
    reasoning, content, calls = "", "", []
    results = [parser.parse_stream_chunk(piece) for piece in pieces(text, cuts)]
    for thought, rest in [*results, parser.parse_stream_end()]:
        reasoning += thought
        part, items = tool_parser.parse_stream_chunk(rest)
        content += part
        add_calls(calls, items)
    part, items = tool_parser.parse_stream_end()
    add_calls(calls, items)
    return reasoning, content + part, [tuple(one) for one in calls]


def chat_request(prompt: str, **kwargs) -> ChatCompletionRequest:
    """A request as the serving layer leaves it once its prompt is rendered."""
    messages = [{"role": "user", "content": "How much?"}]
    request = ChatCompletionRequest(model="gemma", messages=messages, **kwargs)
    request._response_parser_prefix = prompt
    return request


class TestGemma4Reasoning(CustomTestCase):
    def check(self, text, reasoning, content, calls, **kwargs):
        whole = parse(text, **kwargs)
        self.assertEqual((*whole[:2], loads(whole[2])), (reasoning, content, calls))
        for cut in range(1, len(text)):
            self.assertEqual(parse(text, [cut], **kwargs), whole)
        every = range(len(text))
        self.assertEqual(parse(text, every, **kwargs), whole)
        self.assertEqual(parse(text, every, stream_reasoning=False, **kwargs), whole)

    def test_answers(self):
        for name, text, is_open, reasoning, calls, content in THOUGHTS + MORE_THOUGHTS:
            with self.subTest(name):
                self.check(text, reasoning, content, calls, force_reasoning=is_open)

    def test_prompt_says_whether_a_thought_is_open(self):
        """Whatever the flag says, and whatever was thought before the model's turn."""
        user = f"<|turn>user\n{CHANNEL_START}thought\nWhy?<turn|>\n<|turn>model\n"
        thought = f"{user}{CHANNEL_START}thought\n"
        prompts = [
            (user, False),
            (thought, True),
            (f"{thought}Hm.", True),
            (f"{thought}Hm. a <", True),
            (f"{thought}{CHANNEL_END}", False),
            (f"{thought}Hm.{CHANNEL_END}Well: ", False),
            (f"{thought}Hm.{CHANNEL_END}{CHANNEL_START}thought\n", True),
            (f"{thought}{call('limit:1')}<|tool_response>{{}}<tool_response|>", False),
        ]
        for prompt, is_open in prompts:
            for flag in (False, True):
                with self.subTest(prompt=prompt, flag=flag):
                    kwargs = {"request": chat_request(prompt, tools=TOOLS)}
                    kwargs["force_reasoning"] = flag
                    if is_open:
                        text = f"I look{CHANNEL_END}It is 5."
                        self.check(text, "I look", "It is 5.", [], **kwargs)
                    self.check(
                        "It is 5.",
                        "It is 5." if is_open else "",
                        "" if is_open else "It is 5.",
                        [],
                        **kwargs,
                    )

    def test_prompt_ends_in_the_opening_marker(self):
        for end in range(1, len("thought\n")):
            request = chat_request(
                f"<|turn>model\n{CHANNEL_START}" + "thought\n"[:end], tools=TOOLS
            )
            text = "thought\n"[end:] + f"Hm.{CHANNEL_END}It is 5."
            self.check(text, "Hm.", "It is 5.", [], request=request)

    def test_continued_message(self):
        """The prompt of a parser that is used alone is the message it continues."""
        request = chat_request("")
        request.messages.append(
            type(request.messages[0]).model_construct(
                role="assistant", content=f"{CHANNEL_START}thought\nI"
            )
        )
        request.continue_final_message = True
        text = f" look{CHANNEL_END}It is 5."
        self.check(text, " look", "It is 5.", [], request=request)

    def test_only_a_tool_ends_a_thought(self):
        text = f"{CHANNEL_START}thought\nAs {call('a:1', 'f')}.{CHANNEL_END}It is 5."
        request = chat_request("<|turn>model\n", tools=TOOLS)
        self.check(text, f"As {call('a:1', 'f')}.", "It is 5.", [], request=request)

    def test_force_nonempty_content(self):
        request = chat_request(
            "", chat_template_kwargs={"force_nonempty_content": True}
        )
        for text in (f"{CHANNEL_START}thought\nHm.", f"{CHANNEL_START}thought\nHm.<c"):
            parser = ReasoningParser("gemma4", request=request)
            self.assertEqual(parser.parse_non_stream(text), ("", text[18:]))
            parser = ReasoningParser("gemma4", request=request)
            parser.parse_stream_chunk(text)
            self.assertEqual(parser.parse_stream_end(), ("", text[18:]))

    def test_work_is_linear(self):
        """The work for a character does not grow with the text, whatever repeats."""

        def scanner():
            return Gemma4ThoughtScanner(lambda name: True)

        for start in STARTS:
            for piece in PIECES:
                text = start + piece * (2000 // len(piece))
                for part in (text[: len(text) // 4], text):
                    with self.subTest(start=start, piece=piece, size=len(part)):
                        self.assertLess(work(scanner(), part, 1), 25)
                        self.assertLess(work(scanner(), part, len(part)), 5)

    @MANY
    @given(TEXTS, CUTS, st.booleans())
    def test_any_text(self, text, cuts, is_open):
        """Ends; the arguments are JSON; streamed is whole."""
        whole = parse(text, force_reasoning=is_open)
        loads(whole[2])
        for places in (cuts, range(0, len(text), 2)):
            streamed = parse(text, places, force_reasoning=is_open)
            self.assertEqual(streamed, whole)


if __name__ == "__main__":
    unittest.main()
