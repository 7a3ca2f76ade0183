"""A grammar for a model that may think first: it holds from where the thought ends, and
from the first token if there is no thought."""

import asyncio
import sys
import unittest
from pathlib import Path
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.constrained.grammar_manager import GrammarManager
from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    ResponsesRequest,
)
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses
from sglang.srt.parser.reasoning_parser import ReasoningParser
from sglang.srt.sampling.sampling_params import set_request_reasoning_optional
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parents[1] / "entrypoints"),
]
import gemma4_serving  # noqa: E402
import reasoner_walk  # noqa: E402
from reasoner_walk import (  # noqa: E402
    ANSWER,
    END,
    START,
    AcceptsMixin,
    accepted,
    allowed,
    ids_of,
    tokenizer,
)

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")

THOUGHT = f"{START}thought\nI see {{.{END}"
BACKENDS = ("xgrammar", "llguidance")


def new_grammar(name, require_reasoning=False, optional=True):
    """The grammar as the scheduler prepares it for a request."""
    sampling_params = {}
    set_request_reasoning_optional(sampling_params, optional)
    req = SimpleNamespace(
        grammar=reasoner_walk.new_grammar(name, require_reasoning).copy(),
        sampling_params=SimpleNamespace(
            custom_params=sampling_params.get("custom_params")
        ),
    )
    manager = GrammarManager.__new__(GrammarManager)
    manager.scheduler = SimpleNamespace(model_config=SimpleNamespace())
    manager._apply_request_reasoning_config(req)
    return req.grammar


class TestOptionalReasoning(AcceptsMixin, CustomTestCase):
    def test_answer_at_once(self):
        for name in BACKENDS:
            with self.subTest(name):
                self.check_accepts(new_grammar(name), ANSWER)
                self.assertEqual(accepted(new_grammar(name), "It is 5."), 0)
                self.assertEqual(accepted(new_grammar(name), END + ANSWER), 0)
                self.assertEqual(accepted(new_grammar(name), f"{{{START}"), 1)

    def test_thought_first(self):
        for name in BACKENDS:
            with self.subTest(name):
                self.check_accepts(new_grammar(name), THOUGHT + ANSWER)
                length = len(ids_of(THOUGHT))
                for text in ("It is 5.", THOUGHT):
                    self.assertEqual(
                        accepted(new_grammar(name), THOUGHT + text), length
                    )

    def test_first_token(self):
        """The mask is the grammar's own, and the marker."""
        for name in BACKENDS:
            with self.subTest(name):
                plain = allowed(new_grammar(name, optional=False))
                start = ids_of(START)[0]
                self.assertNotIn(start, plain)
                self.assertEqual(allowed(new_grammar(name)), plain | {start})

    def test_prompt_ends_in_a_thought(self):
        for name in BACKENDS:
            with self.subTest(name):
                grammar = new_grammar(name, require_reasoning=True, optional=False)
                self.check_accepts(grammar, f"I see {{.{END}{ANSWER}")

    @settings(max_examples=60)
    @given(
        st.sampled_from([ANSWER, THOUGHT + ANSWER]),
        st.lists(st.integers(1, 40), max_size=8),
    )
    def test_rollback(self, text, moves):
        """What was taken back leaves no trace, as drafts need it."""
        ids = ids_of(text)
        for name in BACKENDS:
            with self.subTest(name):
                grammar, at = new_grammar(name), 0
                for forward, back in zip(moves, reversed(moves)):
                    for token in ids[at : at + forward]:
                        grammar.accept_token(token)
                    at = min(len(ids), at + forward)
                    back = min(at, back)
                    grammar.rollback(back)
                    at -= back
                    fresh = new_grammar(name)
                    for token in ids[:at]:
                        fresh.accept_token(token)
                    self.assertEqual(allowed(grammar), allowed(fresh))


class TestRequests(CustomTestCase):
    """What the API asks of the scheduler."""

    def setUp(self):
        self.addCleanup(gemma4_serving.settings().close)

    def ask_chat(self, **template):
        manager = gemma4_serving.TokenizerManager(False, ANSWER, (), "stop")
        chat = OpenAIServingChat(manager, gemma4_serving.template_manager())
        request = ChatCompletionRequest(
            model="gemma",
            messages=[{"role": "user", "content": "How much?"}],
            chat_template_kwargs=template,
        )
        return chat._convert_to_internal_request(request, None)[0]

    def ask_responses(self, **template):
        manager = gemma4_serving.TokenizerManager(False, ANSWER, (), "stop")
        responses = OpenAIServingResponses(manager, gemma4_serving.template_manager())
        request = ResponsesRequest(
            model="gemma", input="How much?", chat_template_kwargs=template
        )
        asyncio.run(responses.create_responses(request, None))
        return manager.request

    def test_where_the_grammar_starts(self):
        cases = [
            # thinking, thought open in the prompt; forced, optional
            (False, False, False, False),
            (False, True, True, False),
            (True, False, False, True),
            (True, True, True, False),
        ]
        for ask in (self.ask_chat, self.ask_responses):
            for thinking, is_open, forced, optional in cases:
                with self.subTest(thinking=thinking, is_open=is_open):
                    sent = ask(enable_thinking=thinking, open_thought=is_open)
                    expected = {}
                    set_request_reasoning_optional(expected, optional)
                    self.assertEqual(sent.require_reasoning, forced)
                    self.assertEqual(
                        sent.sampling_params.get("custom_params") or {},
                        expected.get("custom_params", {}),
                    )

    def test_tokens_of_thoughts_are_counted(self):
        """The scheduler counts them from the marker that the model writes."""
        detector = ReasoningParser("gemma4").detector
        ids = detector.get_self_opened_think_start_token_ids(tokenizer())
        self.assertEqual(ids, ids_of(START))


if __name__ == "__main__":
    unittest.main()
