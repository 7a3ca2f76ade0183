"""Gemma 4's answers over HTTP, whole and streamed, as OpenAI's client reads them: the
model of a server on the CPU engine says each answer token by token, as it is told."""

import os
import shutil
import sys
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
from openai.lib.streaming.chat import ChatCompletionStreamState
from transformers import AutoTokenizer

from sglang.srt.utils import kill_process_tree
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import (
    CustomTestCase,
    find_available_port,
    popen_launch_server,
)

TEST = Path(__file__).parents[2]
sys.path.insert(0, str(TEST / "srt" / "function_call"))
sys.path.insert(0, str(TEST / "srt" / "parser"))
sys.path.insert(0, str(TEST.parent / "benchmark"))
from gemma4.checkpoint import CHAT_TEMPLATE, TURN_END, write_checkpoint  # noqa: E402
from gemma4_answers import ANSWERS, TOOLS, loads  # noqa: E402
from gemma4_miswritten import MISWRITTEN  # noqa: E402
from gemma4_texts import CHANNEL_END, CHANNEL_START  # noqa: E402
from gemma4_thought_answers import THOUGHTS  # noqa: E402
from told import Told  # noqa: E402

from sglang.srt.function_call.gemma4_format import (  # noqa: E402
    STRING_DELIM,
    TOOL_CALL_END,
    TOOL_CALL_START,
)

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")

MARKERS = [TOOL_CALL_START, TOOL_CALL_END, STRING_DELIM, CHANNEL_START, CHANNEL_END]

# Streamed or not, and whether the markers too come a character at a time.
ASKED = [(False, False), (True, False), (True, True)]

# A thought is left to the model, opened for it, or closed before it begins.
TEMPLATE = CHAT_TEMPLATE + """\
{%- if not enable_thinking -%}
    {{- '<|channel>thought\\n<channel|>' -}}
{%- elif open_thought -%}
    {{- '<|channel>thought\\n' -}}
{%- endif -%}
"""


class TestGemma4ChatHTTP(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="gemma4-chat-")
        cls.process = None
        model = f"{cls.folder}/tiny"
        write_checkpoint(model, dtype="float32")
        cls.tokenizer = AutoTokenizer.from_pretrained(model)
        template = Path(cls.folder, "template.jinja")
        template.write_text(TEMPLATE)
        url = f"http://127.0.0.1:{find_available_port(22000)}"
        path = [os.path.dirname(sys.executable), os.environ.get("PATH", "")]
        modules = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        cls.process = popen_launch_server(
            model,
            url,
            timeout=300,
            device="cpu",
            other_args=[
                *("--device", "cpu", "--dtype", "float32"),
                *("--max-total-tokens", "8192", "--skip-server-warmup"),
                *("--tool-call-parser", "gemma4", "--reasoning-parser", "gemma4"),
                *("--chat-template", str(template)),
                "--enable-custom-logit-processor",
            ],
            env={
                "PATH": os.pathsep.join(path),
                "PYTHONPATH": os.pathsep.join(modules),
                "OMP_NUM_THREADS": "1",
                "SGLANG_USE_CPU_ENGINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
        )
        cls.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)

    @classmethod
    def tearDownClass(cls):
        if cls.process is not None:
            kill_process_tree(cls.process.pid)
            cls.process.wait()
        shutil.rmtree(cls.folder)

    def tokens(self, text, by_character: bool) -> list:
        """The tokens of an answer: as the tokenizer cuts it, or one a character."""
        parts = list(text) if by_character else [text]
        tokens = [self.tokenizer.encode(p, add_special_tokens=False) for p in parts]
        tokens = sum(tokens, [])
        self.assertEqual(self.tokenizer.decode(tokens), text)
        return tokens

    def ask(self, tokens, stream, template_kwargs):
        """The choice of an answer, and how many tokens or, streamed, pieces it had."""
        answer = self.client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "How much?"}],
            tools=[tool.model_dump(exclude_none=True) for tool in TOOLS],
            temperature=0,
            stream=stream,
            extra_body={
                "custom_logit_processor": Told.to_str(),
                "custom_params": {"told": [*tokens, TURN_END]},
                "chat_template_kwargs": template_kwargs,
            },
        )
        if not stream:
            return answer.choices[0], answer.usage.completion_tokens
        state, chunks = ChatCompletionStreamState(), list(answer)
        for chunk in chunks:
            state.handle_chunk(chunk)
        return state.get_final_completion().choices[0], len(chunks)

    def check(self, cases):
        """`cases`: name, text, arguments of the template, reasoning, calls, content."""
        with ThreadPoolExecutor(16) as pool:
            asked = [
                (case, stream, tokens, pool.submit(self.ask, tokens, stream, case[2]))
                for case in cases
                for stream, by_character in ASKED
                for tokens in [self.tokens(case[1], by_character)]
            ]
        for (name, _, _, reasoning, calls, content), stream, tokens, future in asked:
            with self.subTest(name, stream=stream, tokens=len(tokens)):
                choice, count = future.result()
                if stream:
                    self.assertGreater(count, 3)
                else:
                    self.assertEqual(count, len(tokens) + 1)
                message = choice.message
                thought = getattr(message, "reasoning_content", None)
                self.assertEqual(thought or "", reasoning)
                self.assertEqual(message.content or "", content)
                found = message.tool_calls or []
                functions = [(c.function.name, c.function.arguments) for c in found]
                self.assertEqual(loads(functions), calls)
                self.assertEqual([c.index for c in found], list(range(len(calls))))
                self.assertEqual(len({c.id for c in found}), len(calls))
                finish = "tool_calls" if calls else "stop"
                self.assertEqual(choice.finish_reason, finish)

    def test_markers_are_tokens(self):
        for marker in MARKERS:
            self.assertEqual(len(self.tokens(marker, False)), 1, marker)

    def test_answers(self):
        self.check(
            [
                (name, text, {"enable_thinking": False}, "", calls, content)
                for name, text, calls, content in ANSWERS + MISWRITTEN
            ]
        )

    def test_thoughts(self):
        self.check(
            [
                (name, text, {"enable_thinking": True, "open_thought": is_open}, *rest)
                for name, text, is_open, *rest in THOUGHTS
            ]
        )


if __name__ == "__main__":
    unittest.main()
