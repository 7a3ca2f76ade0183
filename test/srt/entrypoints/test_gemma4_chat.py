"""Gemma 4's answers as /v1/chat/completions and /v1/responses give them, whole and
streamed: reasoning, content, and the index, name and arguments of each call."""

import asyncio
import json
import random
import re
import sys
import unittest
from pathlib import Path

from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    ResponsesRequest,
)
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

SRT = Path(__file__).parents[1]
sys.path[:0] = [str(SRT / "function_call"), str(SRT / "parser")]
from gemma4_answers import (  # noqa: E402
    ANSWERS,
    MORE_ANSWERS,
    TOOLS,
    call,
    loads,
)
from gemma4_miswritten import MISWRITTEN, MORE_MISWRITTEN  # noqa: E402
from gemma4_serving import (  # noqa: E402
    TokenizerManager,
    settings,
    template_manager,
)
from gemma4_texts import CHANNEL_END, CHANNEL_START  # noqa: E402
from gemma4_thought_answers import MORE_THOUGHTS, THOUGHTS  # noqa: E402

register_cpu_ci(est_time=40, suite="stage-a-test-cpu")

QUESTION = {"role": "user", "content": "How much?"}


def random_ends(text):
    """Where the pieces of a stream end: each character, and cut at random."""
    generator = random.Random(text)
    places = range(1, len(text))
    yield list(places)
    for count in (1, 3, 10):
        yield sorted(generator.sample(places, min(count, len(places))))


class Answers:
    """The answers that both APIs give."""

    def setUp(self):
        self.addCleanup(settings().close)

    def serve(self, text, ends=(), is_multimodal=False, finish="stop"):
        manager = TokenizerManager(is_multimodal, text, ends, finish)
        return self.serving_class(manager, template_manager())

    def check(self, text, reasoning, content, calls, finish="stop", **kwargs):
        """The same answer whole and streamed; `kwargs` of serve() and the request."""
        is_multimodal = kwargs.pop("is_multimodal", False)
        served = {"is_multimodal": is_multimodal, "finish": finish}
        whole = self.read_whole(self.ask(self.serve(text, **served), False, **kwargs))
        self.assertEqual((*whole[:2], loads(whole[2])), (reasoning, content, calls))
        if finish == "stop" and calls:
            finish = "tool_calls"
        self.assertIn(whole[3], (finish, None))
        for ends in random_ends(text):
            chunks = self.ask(self.serve(text, ends, **served), True, **kwargs)
            self.assertEqual(self.read_stream(chunks), whole)

    def test_answers(self):
        answers = [*ANSWERS, *MORE_ANSWERS, *MISWRITTEN, *MORE_MISWRITTEN]
        for name, text, calls, content in answers:
            with self.subTest(name):
                self.check(text, "", content, calls)

    def test_thoughts(self):
        """The flag is on for all; only the prompt tells the open thoughts."""
        for name, text, is_open, reasoning, calls, content in THOUGHTS + MORE_THOUGHTS:
            kwargs = {"enable_thinking": True, "open_thought": is_open}
            for is_multimodal in (False, True):
                with self.subTest(name, is_multimodal=is_multimodal):
                    self.check(
                        text,
                        reasoning,
                        content,
                        calls,
                        is_multimodal=is_multimodal,
                        chat_template_kwargs=kwargs,
                    )

    def test_flag_off(self):
        """A thought is one even if nobody asked for it, and if the prompt has it open."""
        text = f"{CHANNEL_START}thought\nHm.{CHANNEL_END}It is 5."
        self.check(text, "Hm.", "It is 5.", [])
        self.check(
            f"Hm.{CHANNEL_END}It is 5.",
            "Hm.",
            "It is 5.",
            [],
            chat_template_kwargs={"open_thought": True},
        )

    def test_only_a_tool_ends_a_thought(self):
        said = f"As {call('a:1', 'f')}."
        text = f"{CHANNEL_START}thought\n{said}{CHANNEL_END}It is 5."
        self.check(text, said, "It is 5.", [])

    def test_cut_by_length(self):
        text = call("query:|x").removesuffix("}<tool_call|>")
        calls = [("web_search", {"query": "x"})]
        self.check(text, "", "", calls, finish="length")


class TestGemma4Chat(Answers, CustomTestCase):
    serving_class = OpenAIServingChat

    def ask(self, chat, stream, **kwargs):
        """The response, or the chunks of a stream."""
        request = ChatCompletionRequest(
            **{"messages": [QUESTION], **kwargs},
            model="gemma",
            tools=TOOLS,
            stream=stream,
        )
        adapted, request = chat._convert_to_internal_request(request, None)

        async def collect():
            if not stream:
                return await chat._handle_non_streaming_request(adapted, request, None)
            chunks = chat._generate_chat_stream(adapted, request, None)
            return [chunk async for chunk in chunks]

        return asyncio.run(collect())

    def read_whole(self, response):
        """Reasoning, content, calls and finish reason."""
        choice = response.choices[0]
        self.assertEqual(choice.message.role, "assistant")
        calls = choice.message.tool_calls or []
        self.assertEqual([c.index for c in calls], list(range(len(calls))))
        self.assertEqual(len({c.id for c in calls}), len(calls))
        functions = [(c.function.name, c.function.arguments) for c in calls]
        reasoning = choice.message.reasoning_content or ""
        return reasoning, choice.message.content, functions, choice.finish_reason

    def read_stream(self, chunks):
        self.assertEqual(chunks.pop(), "data: [DONE]\n\n")
        choices = [json.loads(c.removeprefix("data: "))["choices"][0] for c in chunks]
        deltas = [choice["delta"] for choice in choices]
        self.assertEqual(deltas[0]["role"], "assistant")
        self.assertFalse([d for d in deltas[1:] if d.get("role")])
        calls = []
        for delta in deltas:
            for part in delta.get("tool_calls") or []:
                function = part["function"]
                if part.get("id"):
                    self.assertEqual(part["index"], len(calls))
                    calls.append((function["name"], ""))
                self.assertEqual(part["index"], len(calls) - 1)
                name, arguments = calls[-1]
                calls[-1] = (name, arguments + (function.get("arguments") or ""))
        finishes = [choice["finish_reason"] for choice in choices]
        self.assertEqual(set(finishes[:-1]), {None})
        reasoning = "".join(d.get("reasoning_content") or "" for d in deltas)
        content = "".join(d.get("content") or "" for d in deltas)
        return reasoning, content, calls, finishes[-1]

    def test_thought_continued(self):
        message = {"role": "assistant", "content": f"{CHANNEL_START}thought\nI"}
        self.check(
            f" look{CHANNEL_END}It is 5.",
            " look",
            "It is 5.",
            [],
            messages=[QUESTION, message],
            continue_final_message=True,
        )


class TestGemma4Responses(Answers, CustomTestCase):
    serving_class = OpenAIServingResponses

    def ask(self, responses, stream, **kwargs):
        tools = [
            {"type": "function", **tool.function.model_dump(exclude_none=True)}
            for tool in TOOLS
        ]
        request = ResponsesRequest(
            model="gemma", input="How much?", tools=tools, stream=stream, **kwargs
        )

        async def collect():
            response = await responses.create_responses(request, None)
            return [event async for event in response] if stream else response

        return asyncio.run(collect())

    def read_whole(self, response):
        return self.read_output([item.model_dump() for item in response.output])

    def read_output(self, output):
        texts = {"reasoning": "", "message": ""}
        calls = []
        for item in output:
            if item["type"] == "function_call":
                calls.append((item["name"], item["arguments"]))
            else:
                texts[item["type"]] += "".join(c["text"] for c in item["content"])
        return texts["reasoning"], texts["message"], calls, None

    def read_stream(self, events):
        data = [re.search("^data: (.*)", event, re.M)[1] for event in events]
        events = [json.loads(text) for text in data if text != "[DONE]"]
        answer = self.read_output(events[-1]["response"]["output"])
        deltas = {
            "reasoning_text": "",
            "output_text": "",
            "function_call_arguments": "",
        }
        for event in events:
            if event["type"].endswith(".delta"):
                deltas[event["type"].split(".")[1]] += event["delta"]
        arguments = "".join(arguments for _, arguments in answer[2])
        self.assertEqual(tuple(deltas.values()), (*answer[:2], arguments))
        return answer


if __name__ == "__main__":
    unittest.main()
