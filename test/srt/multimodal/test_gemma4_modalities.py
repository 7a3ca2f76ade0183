"""Gemma 4 refuses media that its checkpoint cannot read, and media that nothing in the
prompt stands for, before the scheduler sees them."""

import asyncio
import unittest
import unittest.mock
from types import SimpleNamespace

from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.multimodal.processors.gemma4 import Gemma4SGLangProcessor
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")


def process(towers, loaded=None, **data):
    """Hand media to a processor of a checkpoint with these towers; it loads `loaded`."""
    processor = object.__new__(Gemma4SGLangProcessor)
    processor.hf_config = SimpleNamespace(
        **{f"{name}_config": object() for name in towers}
    )
    processor.mm_tokens = SimpleNamespace(
        image_token_id=1, video_token_id=2, audio_token_id=3
    )

    async def load_mm_data(**_):
        loads = {"images": [], "videos": [], "audios": [], **(loaded or {})}
        return SimpleNamespace(**loads)

    async def combine(*_):
        return [], SimpleNamespace(tolist=lambda: [5]), None

    processor.load_mm_data = load_mm_data
    processor.process_and_combine_mm_data_async = combine
    request = SimpleNamespace(video_data=data.pop("video_data", None))
    return asyncio.run(
        processor.process_mm_data_async(input_text="", request_obj=request, **data)
    )


class TestTowers(CustomTestCase):
    def test_no_tower(self):
        for name, tower in {
            "image": "vision",
            "video": "vision",
            "audio": "audio",
        }.items():
            for towers in ([], ["vision"], ["audio"], ["vision", "audio"]):
                with self.subTest(name, towers=towers):
                    arguments = dict(
                        loaded={f"{name}s": ["x"]}, **{f"{name}_data": ["x"]}
                    )
                    if tower in towers:
                        self.assertEqual(process(towers, **arguments).input_ids, [5])
                        continue
                    with self.assertRaisesRegex(ValueError, f"{name}_data.*{tower}"):
                        process(towers, **arguments)

    def test_no_placeholder(self):
        for name in ("image", "video", "audio"):
            with self.subTest(name), self.assertRaisesRegex(
                ValueError, f"1 {name} placeholders but 2 {name} inputs"
            ):
                process(
                    ["vision", "audio"],
                    loaded={f"{name}s": ["x"]},
                    **{f"{name}_data": ["x", "y"]},
                )

    def test_no_processor(self):
        """A text-only folder."""
        manager = object.__new__(TokenizerManager)
        manager.model_config = SimpleNamespace(
            vocab_size=100, hf_config=SimpleNamespace(architectures=[])
        )
        manager.mm_processor = None
        for name in ("image_data", "video_data", "audio_data"):
            obj = GenerateReqInput(input_ids=[1], **{name: "x"})
            obj.normalize_batch_and_arguments()
            with self.subTest(name), unittest.mock.patch(
                "sglang.srt.managers.tokenizer_manager.get_disagg",
                lambda: SimpleNamespace(language_model_only=False),
            ), self.assertRaisesRegex(ValueError, "text"):
                asyncio.run(manager._tokenize_one_request(obj))


if __name__ == "__main__":
    unittest.main()
