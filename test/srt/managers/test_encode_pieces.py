"""The pieces of a prompt have the token ids of the whole."""

import json
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_encode_texts import MARKED, folder, tokenizer  # noqa: F401
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from sglang.srt.entrypoints.openai import parallel_prompt_encode as pieces
from sglang.srt.environ import envs
from sglang.srt.utils.bpe_cuts import describe, find_bpe_cuts
from sglang.srt.utils.encode_texts import encode_texts, prepare
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")


@given(text=st.text() | MARKED, specials=st.booleans())
def test_pieces_have_the_ids_of_the_whole(tokenizer, text, specials):
    with (
        mock.patch.object(pieces, "_MIN_CHUNK_CHARS", 1),
        mock.patch.object(pieces, "_parallel_ok", True),
        envs.SGLANG_PARALLEL_PROMPT_ENCODE_MIN_CHARS.override(0),
    ):
        found = pieces.parallel_prompt_encode(
            tokenizer, text, {"add_special_tokens": specials}
        )
    assert found == tokenizer.encode(text, add_special_tokens=specials)


@pytest.mark.parametrize("direction", ["left", "right"])
def test_what_a_processor_leaves_behind_alters_nothing(tokenizer, direction):
    """A multimodal processor has texts padded, and the backend keeps it so."""
    text = "ba be\n" * 3
    whole = tokenizer.encode(text)
    tokenizer.backend_tokenizer.enable_padding(direction=direction)
    try:
        with (
            mock.patch.object(pieces, "_MIN_CHUNK_CHARS", 4),
            mock.patch.object(pieces, "_parallel_ok", True),
            envs.SGLANG_PARALLEL_PROMPT_ENCODE_MIN_CHARS.override(0),
            mock.patch.object(pieces, "split_prompt", wraps=pieces.split_prompt) as cut,
        ):
            found = pieces.parallel_prompt_encode(tokenizer, text)
    finally:
        tokenizer.backend_tokenizer.no_padding()
    assert found == whole
    assert cut.called


def test_a_text_is_cut_behind_words(tokenizer):
    *_, pattern, npattern, cuts = pieces._plan_for(tokenizer)
    with mock.patch.object(pieces, "_MIN_CHUNK_CHARS", 1):
        cut = pieces.split_prompt("ba be\n\nbi  <|turn> .bo", pattern, npattern, cuts)
    assert cut == ["ba", " be", "\n\nbi", "  <|turn>", " .bo"]


def bpe(*merges, **options):
    """A tokenizer as Gemma's, of these merges."""
    made = {left + right: None for left, right in merges}
    letters = ["<unk>", "▁", "\n", *"ab"]
    vocab = {token: index for index, token in enumerate([*letters, *made])}
    model = models.BPE(vocab, list(merges), unk_token="<unk>", **options)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer, cut",
    [
        (bpe(("a", "b"), ("▁", "ab"), ("▁", "▁")), True),
        (bpe(("a", "▁")), False),
        (bpe(("a", "\n")), False),
        (bpe(("▁", "a"), ("b", "▁a")), False),
        (bpe(("a", "b"), ignore_merges=True), False),
        (bpe(("a", "b"), dropout=0.5), False),
    ],
)
def test_no_cut_where_a_merge_can_reach_over_it(tokenizer, cut):
    assert (find_bpe_cuts(describe(tokenizer)) is not None) is cut


@st.composite
def tokenizers(draw):
    tokens, merges = ["▁", "\n", "a", "b"], []
    for _ in range(draw(st.integers(0, 6))):
        pair = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if "".join(pair) not in tokens:
            tokens.append("".join(pair))
            merges.append(pair)
    return bpe(*merges)


@given(backend=tokenizers(), text=st.text("ab \n▁c"))
def test_any_merges(backend, text):
    if cuts := find_bpe_cuts(describe(backend)):
        cut = cuts.split(text)
        ids = [i for piece in backend.encode_batch(cut) for i in piece.ids]
        assert ids == backend.encode(text).ids


def test_the_parts_are_those_of_the_whole_file():
    """Of a tokenizer whose words upstream cuts between, too."""
    backend = bpe(("a", "b"))
    backend.normalizer = None
    split = pre_tokenizers.Split(Regex(pieces._INTRA_SPLIT_REGEX), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    backend.post_processor = processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", 0)]
    )
    whole, parts = json.loads(backend.to_str()), describe(backend)
    for name in ("normalizer", "pre_tokenizer", "post_processor"):
        assert parts[name] == whole[name]
    for name, value in parts["model"].items():
        assert (value or None) == (whole["model"][name] or None)
    assert pieces._intra_cut_safe(parts)


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "added_tokens"])
def test_no_cut_where_something_else_may(part):
    cfg = describe(bpe(("a", "b")))
    assert find_bpe_cuts(cfg)
    cfg[part] = {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Whitespace"},
        "added_tokens": [{"normalized": True}],
    }[part]
    assert find_bpe_cuts(cfg) is None


def test_a_single_long_prompt_is_cut(tokenizer):
    """By what /generate asks, whose plan is made before."""
    pieces._plans.pop(tokenizer, None)
    prepare(tokenizer)
    assert tokenizer in pieces._plans
    text = "ba be " * 8000
    with (
        mock.patch.object(pieces, "_parallel_ok", True),
        mock.patch.object(pieces, "split_prompt", wraps=pieces.split_prompt) as split,
    ):
        found = encode_texts(tokenizer, [text])
        assert encode_texts(tokenizer, ["ba"]) == tokenizer(["ba"])["input_ids"]
    assert split.call_count == 1
    assert found == tokenizer([text])["input_ids"]


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
