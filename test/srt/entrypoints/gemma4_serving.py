"""A server for Gemma 4 without a model: it renders prompts, and answers what it is told."""

import re
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

from sglang.srt.entrypoints.openai import serving_chat, serving_responses

CHANNEL_START = "<|channel>"
CHANNEL_END = "<channel|>"
SERVING = SimpleNamespace(
    default_chat_template_kwargs=None,
    incremental_streaming_output=False,
    stream_response_default_include_usage=False,
    enable_cache_report=False,
    return_input_ids=False,
    return_output_ids=False,
    enable_response_store=False,
)


def settings() -> ExitStack:
    """The server's settings, until the stack is closed."""
    disagg = SimpleNamespace(disaggregation_mode="null")
    stack = ExitStack()
    for module in (serving_chat, serving_responses):
        stack.enter_context(mock.patch.object(module, "get_serving", lambda: SERVING))
    stack.enter_context(
        mock.patch.object(serving_responses, "get_disagg", lambda: disagg)
    )
    return stack


class Tokenizer:
    """Markers are tokens, and so are characters."""

    chat_template = "enable_thinking"
    bos_token_id = -1
    _PIECES = re.compile(r"<\|[a-z_]+>|<[a-z_]+\|>|.", re.DOTALL)

    def __init__(self):
        self._tokens = []

    def convert_tokens_to_ids(self, tokens):
        for token in tokens:
            if token not in self._tokens:
                self._tokens.append(token)
        return [self._tokens.index(token) for token in tokens]

    def encode(self, text, **kwargs):
        return self.convert_tokens_to_ids(self._PIECES.findall(text))

    def decode(self, ids, **kwargs):
        return "".join(self._tokens[index] for index in ids)

    def apply_chat_template(
        self, messages, tokenize, open_thought=False, enable_thinking=False, **kwargs
    ):
        text = "".join(
            f"<|turn>{message['role']}\n{message['content']}<turn|>\n"
            for message in messages
        )
        text += "<|turn>model\n"
        if open_thought:
            text += f"{CHANNEL_START}thought\n"
        elif not enable_thinking:
            text += f"{CHANNEL_START}thought\n{CHANNEL_END}"
        return self.encode(text) if tokenize else text


class TokenizerManager:
    """Answers with `text`, up to each of `ends` where the request streams."""

    served_model_name = model_path = "gemma"
    server_args = SimpleNamespace(tool_call_parser="gemma4", reasoning_parser="gemma4")

    def __init__(self, is_multimodal, text, ends, finish):
        self.tokenizer = Tokenizer()
        self.model_config = SimpleNamespace(
            is_multimodal=is_multimodal,
            hf_config=SimpleNamespace(
                model_type="gemma4", architectures=["Gemma4ForConditionalGeneration"]
            ),
            get_default_sampling_params=lambda: {},
        )
        self.text, self.ends = text, ends
        self.finish = {"type": finish, "matched": 106}

    def config_value(self, name):
        return getattr(self.server_args, name, None)

    def create_abort_task(self, request):
        return None

    async def generate_request(self, request, raw_request):
        self.request = request
        for end in [*(self.ends if request.stream else ()), len(self.text)]:
            is_last = end == len(self.text)
            yield {
                "index": 0,
                "text": self.text[:end],
                "output_ids": [],
                "meta_info": {
                    "id": "1",
                    "finish_reason": self.finish if is_last else None,
                    "prompt_tokens": 1,
                    "completion_tokens": end,
                    "weight_version": "1",
                },
            }


def template_manager():
    return SimpleNamespace(
        chat_template_name=None,
        jinja_template_content_format="string",
        jinja_template_may_reorder_tool_results=False,
        python_chat_template=None,
        reasoning_config=None,
        force_reasoning=False,
    )
