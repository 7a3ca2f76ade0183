"""Prompts are encoded without offsets, to the same ids."""

import asyncio
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.utils.encode_texts import encode_texts
from sglang.test.ci.ci_register import register_cpu_ci

BENCHMARKS = Path(__file__).parents[3] / "benchmark"
sys.path.insert(0, str(BENCHMARKS))
from gemma4.checkpoint import write_checkpoint  # noqa: E402

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")

MARKED = st.lists(
    st.sampled_from(["<|image|>", "<bos>", "<|turn>", "<turn|>", " ", "\n", "▁", "ba"])
    | st.text(max_size=8)
).map("".join)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as place:
        write_checkpoint(Path(place, "model"), "26b-a4b", weights=False)
        yield str(Path(place, "model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@given(texts=st.lists(st.text() | MARKED, min_size=1, max_size=4))
def test_the_ids_are_the_same(tokenizer, texts):
    assert encode_texts(tokenizer, texts) == tokenizer(texts)["input_ids"]


def manager(tokenizer):
    """What encodes the text of a request."""
    made = TokenizerManager.__new__(TokenizerManager)
    made.tokenizer = tokenizer
    made.async_dynamic_batch_tokenizer = None
    made.model_config = SimpleNamespace(is_embedding_gemma=False)
    return made


@pytest.mark.parametrize("texts", ["ba be <|turn>", ["ba", "", "be bi"]])
def test_a_request_is_encoded_so(tokenizer, texts):
    asked = [texts] if isinstance(texts, str) else texts
    ids = tokenizer(asked)["input_ids"]
    with mock.patch.object(type(tokenizer), "_encode_plus") as whole:
        with mock.patch.object(PreTrainedTokenizerFast, "_encode_plus", whole):
            found, _ = asyncio.run(manager(tokenizer)._tokenize_texts(texts))
    assert found == (ids[0] if isinstance(texts, str) else ids)
    assert not whole.called


class Louder(PreTrainedTokenizerFast):
    def _encode_plus(self, text, *args, **kwargs):
        return super()._encode_plus([x + "!" for x in text], *args, **kwargs)


def test_what_else_a_tokenizer_does_is_kept(folder, tokenizer):
    louder = Louder.from_pretrained(folder)
    assert encode_texts(louder, ["ba"]) is None
    found, _ = asyncio.run(manager(louder)._tokenize_texts("ba"))
    assert found == tokenizer("ba!")["input_ids"]


@pytest.mark.parametrize("how", ["cut", "padded", "split"])
def test_settings_of_the_backend_are_kept(folder, how):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if how == "cut":
        tokenizer.backend_tokenizer.enable_truncation(2)
    elif how == "padded":
        tokenizer.backend_tokenizer.enable_padding(length=9)
    else:
        tokenizer.split_special_tokens = True
    assert encode_texts(tokenizer, ["ba be bi <|turn>"]) is None


def test_a_tokenizer_without_a_backend():
    assert encode_texts(SimpleNamespace(), ["ba"]) is None


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
