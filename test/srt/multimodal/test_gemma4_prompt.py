"""A text beside pictures and sound is encoded once, without what they stand for, to the
ids of transformers' own processor."""

import asyncio
import copy
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sglang.srt.managers import tokenizer_manager
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.multimodal import gemma4_prompt
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor
from sglang.srt.multimodal.processors.gemma4 import Gemma4SGLangProcessor
from sglang.srt.multimodal.processors.gemma4_unified import Gemma4UnifiedSGLangProcessor
from sglang.test.ci.ci_register import register_cpu_ci

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))
from gemma4.checkpoint import write_checkpoint  # noqa: E402

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")

IMAGE, AUDIO, VIDEO = "<|image|>", "<|audio|>", "<|video|>"
CLASSES = {
    "tiny": Gemma4SGLangProcessor,
    "tiny-12b": Gemma4UnifiedSGLangProcessor,
}
PARTS = st.sampled_from(
    [IMAGE, AUDIO, "<bos>", "<|turn>", "<turn|>", "<|image>", "<image|>", "<audio|>"]
    + ["<|image", "<", "|>", " ", "\n", "▁", "ba be", "00:01"]
) | st.text(max_size=6)
TEXTS = st.lists(PARTS, max_size=12).map("".join)
PICTURES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8))
    for i, shape in enumerate([(48, 64, 3), (200, 20, 3), (17, 23, 3)])
]
SOUNDS = [
    np.random.default_rng(i).normal(size=n).astype(np.float32)
    for i, n in enumerate([8000, 1900])
]


def processor_of(kind, model):
    """One that a server would have, without a server's settings."""
    made = object.__new__(kind)
    made._processor, made._tokenizer = model, model.tokenizer
    made._tokenizer_auto_adds_specials = True
    made.image_config = made.video_config = made.audio_config = None
    made.disable_fast_image_processor = True
    made.precompute_hash_before_cpu_transfer = False
    made.mm_feature_transport, made.FEATURE_NAMES = "cpu", ()
    made.video_preprocessing_device = None
    made.retry_on_cpu_after_gpu_oom = False
    return made


@pytest.fixture(scope="module", params=list(CLASSES))
def ours(request):
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder, "model"), request.param, weights=False)
        model = transformers.AutoProcessor.from_pretrained(Path(folder, "model"))
    return processor_of(CLASSES[request.param], model)


def plain(ours, *args, **kwargs):
    """What it gives where transformers encodes the text, as 0.5.23 does."""
    with mock.patch.object(
        Gemma4SGLangProcessor,
        "_call_processor",
        BaseMultimodalProcessor._call_processor,
    ):
        return ours.process_mm_data(*args, **kwargs)


def check(ours, text, **media):
    """The same ids and features, or the same refusal."""
    try:
        expected = plain(ours, text, **media)
    except ValueError as e:
        with pytest.raises(ValueError) as found:
            ours.process_mm_data(text, **media)
        assert str(found.value) == str(e)
        return
    got = ours.process_mm_data(text, **media)
    assert got["input_ids"].tolist() == expected["input_ids"].tolist()
    assert got["input_ids"].dtype == expected["input_ids"].dtype
    for name in set(expected) - {"input_ids", "attention_mask", "mm_token_type_ids"}:
        assert torch.equal(torch.as_tensor(got[name]), torch.as_tensor(expected[name]))


@given(text=TEXTS, odd=st.integers(0, 9), seed=st.integers(0, 2))
def test_the_ids_are_those_of_transformers(ours, text, odd, seed):
    """Of any text, with a picture and a sound a marker, or not."""
    images, sounds = text.count(IMAGE) + (odd == 9), text.count(AUDIO) - (odd == 8)
    media = {
        "images": [PICTURES[(seed + i) % 3] for i in range(images)],
        "audios": [SOUNDS[(seed + i) % 2] for i in range(max(sounds, 0))],
    }
    check(ours, text, **{k: v for k, v in media.items() if v})


def test_videos(ours):
    """The time of a frame is text, which may belong to a word before it."""
    frames = np.zeros((3, 48, 64, 3), np.uint8).transpose(0, 3, 1, 2)
    video = torch.from_numpy(frames)
    check(ours, f"ba{VIDEO}be {IMAGE}", videos=[video], images=PICTURES[:1])
    check(ours, f"{VIDEO}{IMAGE}", images=PICTURES[:1])


@pytest.mark.parametrize("text", [f"ba {IMAGE} be", f"<bos>{IMAGE}{AUDIO} be"])
def test_transformers_encodes_the_markers_alone(ours, text):
    """Also of a second request: transformers leaves padding behind."""
    media = {"images": PICTURES[:1], "audios": SOUNDS[: text.count(AUDIO)] or None}
    for _ in range(2):
        kind = type(ours._processor)
        with mock.patch.object(kind, "_check_special_mm_tokens") as checked:
            ours.process_mm_data(text, **media)
        ([encoded], _), _ = checked.call_args
        assert encoded.startswith("<|image>") and "be" not in encoded


class Reached(Exception):
    pass


def test_the_text_is_encoded_once(ours):
    """By the processor alone, which makes the ids of a prompt with media."""
    manager = TokenizerManager.__new__(TokenizerManager)
    manager.tokenizer, manager.mm_processor = ours._tokenizer, ours
    manager.model_config = SimpleNamespace(
        vocab_size=512, hf_config=SimpleNamespace(architectures=["Gemma4"])
    )
    manager._validate_mm_limits = manager._normalize_mm_content_hashes = mock.Mock()
    manager._tokenize_texts = mock.Mock(side_effect=AssertionError("encoded"))
    asked = GenerateReqInput(text=f"ba {IMAGE}", image_data=["a"])
    with (
        mock.patch.object(
            ours, "process_mm_data_async", side_effect=Reached
        ) as reached,
        mock.patch.object(tokenizer_manager, "get_disagg") as disagg,
        pytest.raises(Reached),
    ):
        disagg().language_model_only = disagg().language_only = False
        manager.max_req_input_len = None
        asyncio.run(manager._tokenize_one_request(asked))
    assert reached.call_args.kwargs["input_text"] == asked.text


@pytest.mark.parametrize("how", ["another class", "cut", "not split"])
def test_other_processors_are_left_alone(ours, how):
    model = ours._processor
    assert gemma4_prompt.find_markers(model) is not None
    if how == "another class":
        other = copy.copy(model)
        other.__class__ = type("Other", (type(model),), {})
        assert gemma4_prompt.find_markers(other) is None
    elif how == "cut":
        with mock.patch.dict(model.tokenizer.init_kwargs, max_length=5):
            assert gemma4_prompt.find_markers(model) is None
    else:
        with mock.patch.object(model, "eoi_token", "ba"):
            assert gemma4_prompt.find_markers(model) is None


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
