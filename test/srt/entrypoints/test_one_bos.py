"""A rendered chat prompt reaches the engine with one BOS, whether its template renders
it, the tokenizer adds it, or both; transformers' processor is the oracle."""

import asyncio
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import transformers

from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    ResponsesRequest,
)
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses
from sglang.srt.multimodal.processors.base_processor import (
    BaseMultiModalProcessorOutput,
)
from sglang.srt.multimodal.processors.gemma4 import Gemma4SGLangProcessor
from sglang.srt.parser.conversation import Conversation, SeparatorStyle, chat_templates
from sglang.srt.parser.template_manager import TemplateManager
from sglang.srt.runtime_context import get_context
from sglang.srt.server_args import ServerArgs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))
from gemma4.checkpoint import BOS, write_checkpoint

register_cpu_ci(est_time=40, suite="stage-a-test-cpu")

MESSAGES = [{"role": "user", "content": "say a word"}]


def setUpModule():
    global FOLDER
    FOLDER = tempfile.TemporaryDirectory(prefix="gemma4-bos-")
    write_checkpoint(f"{FOLDER.name}/model", weights=False)
    get_context().set_server_args(ServerArgs(model_path=f"{FOLDER.name}/model"))


def tearDownModule():
    FOLDER.cleanup()


def load(added: bool, rendered: bool):
    """The tiny model's processor, whose tokenizer adds a BOS, and whose template
    renders one, or not."""
    processor = transformers.AutoProcessor.from_pretrained(f"{FOLDER.name}/model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        f"{FOLDER.name}/model", add_bos_token=added
    )
    template = tokenizer.chat_template
    if not rendered:
        template = template.replace("{{- bos_token -}}", "")
    processor.chat_template = tokenizer.chat_template = template
    processor.tokenizer = tokenizer
    assert (tokenizer.encode("") == [BOS]) == added
    return processor


def serving(cls, tokenizer, is_multimodal=True, conversation=None):
    manager = mock.Mock(
        tokenizer=tokenizer,
        model_config=mock.Mock(
            is_multimodal=is_multimodal,
            hf_config=SimpleNamespace(model_type="gemma4", architectures=["Gemma4"]),
            get_default_sampling_params=lambda: {},
        ),
        config_value=lambda name: None,
    )
    templates = TemplateManager()
    templates._chat_template_name = conversation
    self = object.__new__(cls)
    OpenAIServingChat.__init__(self, manager, templates)
    return self


def engine_ids(tokenizer, request) -> list:
    """The ids of a request: its own, or its text as the tokenizer manager encodes it."""
    if isinstance(request, str):
        return tokenizer(request)["input_ids"]
    return list(request)


CASES = [(added, rendered) for added in (False, True) for rendered in (False, True)]


class TestOneBos(CustomTestCase):
    def check(self, ids, processor):
        expected = processor.apply_chat_template(
            MESSAGES, tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"][0]
        self.assertEqual(ids, list(expected))

    def test_chat(self):
        for added, rendered in CASES:
            processor = load(added, rendered)
            chat = serving(OpenAIServingChat, processor.tokenizer)
            with self.subTest(added=added, rendered=rendered):
                request, _ = chat._convert_to_internal_request(
                    ChatCompletionRequest(model="m", messages=MESSAGES)
                )
                given = request.text if request.text else request.input_ids
                self.check(engine_ids(processor.tokenizer, given), processor)

    def test_responses(self):
        for added, rendered in CASES:
            processor = load(added, rendered)
            responses = serving(OpenAIServingResponses, processor.tokenizer)
            responses.use_harmony = False
            with self.subTest(added=added, rendered=rendered):
                _, _, [given], _ = asyncio.run(
                    responses._make_request(
                        ResponsesRequest(model="m", input="say a word"),
                        None,
                        processor.tokenizer,
                    )
                )
                self.check(engine_ids(processor.tokenizer, given), processor)

    def test_conversation_template(self):
        """Templates of the server's own, of a text model and of another."""
        tokenizer = load(added=True, rendered=True).tokenizer
        conversation = Conversation(
            name="with-bos",
            system_template="<bos>{system_message}",
            roles=("user", "model"),
            sep_style=SeparatorStyle.ADD_COLON_SINGLE,
            sep="\n",
        )
        expected = tokenizer.encode(
            "<bos>\nuser: say a word\nmodel:", add_special_tokens=False
        )
        with mock.patch.dict(chat_templates, {"with-bos": conversation}):
            for is_multimodal in (False, True):
                chat = serving(OpenAIServingChat, tokenizer, is_multimodal, "with-bos")
                with self.subTest(is_multimodal=is_multimodal):
                    request, _ = chat._convert_to_internal_request(
                        ChatCompletionRequest(model="m", messages=MESSAGES)
                    )
                    given = request.text if request.text else request.input_ids
                    self.assertEqual(engine_ids(tokenizer, given), expected)

    def test_processor(self):
        """What a multimodal processor encodes itself."""
        for added, rendered in CASES:
            processor = load(added, rendered)
            text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
            ours = object.__new__(Gemma4SGLangProcessor)
            ours._tokenizer = processor.tokenizer
            ours._resolve_processor = lambda _: (processor, processor.tokenizer)
            with self.subTest(added=added, rendered=rendered):
                _, ids, _ = ours.process_and_combine_mm_data(
                    BaseMultiModalProcessorOutput(input_text=text), None
                )
                self.check(ids.tolist(), processor)
                ids, _, _ = ours.build_input_ids(text)
                self.check(list(ids), processor)


if __name__ == "__main__":
    unittest.main()
