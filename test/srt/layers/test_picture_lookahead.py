"""Which keys a token of a prompt with pictures sees in a layer with a sliding window.

The oracle is transformers' own mask for Gemma 4, of prompts with pictures and frames of
videos, cut into cached and new tokens.
"""

import os
import unittest

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import (
    create_masks_for_vision_model,
    get_block_sequence_ids_for_mask,
)

from sglang.srt.layers.attention.lookahead import get_picture_lookahead
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalInputs,
)
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")

TYPES = {Modality.IMAGE: 1, Modality.VIDEO: 2, Modality.AUDIO: 3}


@st.composite
def prompts(draw):
    """Returns (length, cached tokens, [(modality, first, last)]).

    Between media there is text, as in every prompt; the cached tokens end anywhere, and
    the new ones with the prompt.
    """
    spans, end = [], draw(st.integers(0, 4))
    for _ in range(draw(st.integers(0, 4))):
        first = end + draw(st.integers(1, 5))
        last = first + draw(st.integers(0, 20))
        spans.append((draw(st.sampled_from(list(TYPES))), first, last))
        end = last + 1
    length = end + draw(st.integers(1, 9))
    return length, draw(st.integers(0, length - 1)), spans


def _mm_inputs(spans):
    """An item a picture, but all frames of a video in one."""
    items = [
        MultimodalDataItem(modality=modality, offsets=[(first, last)])
        for modality, first, last in spans
        if modality != Modality.VIDEO
    ]
    frames = [span[1:] for span in spans if span[0] == Modality.VIDEO]
    if frames:
        items.append(MultimodalDataItem(modality=Modality.VIDEO, offsets=frames))
    return MultimodalInputs(mm_items=items) if items else None


def _expected(length, spans, window) -> torch.Tensor:
    """transformers' mask of the sliding layers, [length, length] of bool."""
    config = Gemma4TextConfig(
        sliding_window=window, use_bidirectional_attention="vision", num_hidden_layers=2
    )
    # The default is sdpa's, which may leave out the mask.
    config._attn_implementation = "eager"
    types = torch.zeros(1, length, dtype=torch.long)
    for modality, first, last in spans:
        types[0, first : last + 1] = TYPES[modality]
    mask = create_masks_for_vision_model(
        config,
        torch.zeros(1, length, 1),
        torch.ones(1, length, dtype=torch.long),
        None,
        torch.arange(length)[None],
        get_block_sequence_ids_for_mask(types, device="cpu"),
    )["sliding_attention"]
    return mask[0, 0] == 0


class TestPictureLookahead(CustomTestCase):
    @given(st.lists(prompts(), min_size=1, max_size=3), st.integers(2, 30))
    def test_as_transformers(self, requests, window):
        prefixes = [prefix for _, prefix, _ in requests]
        lengths = [length - prefix for length, prefix, _ in requests]
        lookahead = get_picture_lookahead(
            [_mm_inputs(spans) for _, _, spans in requests], prefixes, lengths
        )
        start = 0
        for (length, prefix, spans), new in zip(requests, lengths):
            ahead = None if lookahead is None else lookahead[start : start + new]
            start += new
            mask = TorchNativeAttnBackend._make_sliding_window_mask(
                q_len=new,
                kv_len=length,
                sliding_window_size=window - 1,
                device="cpu",
                query_offset=prefix,
                lookahead=ahead,
            )
            expected = _expected(length, spans, window)[prefix:]
            self.assertTrue(torch.equal(mask, expected))

    @given(st.lists(prompts(), min_size=1, max_size=3))
    def test_none_for_text_and_audio(self, requests):
        spans = [
            [span for span in spans if span[0] == Modality.AUDIO]
            for _, _, spans in requests
        ]
        lookahead = get_picture_lookahead(
            [_mm_inputs(s) for s in spans],
            [prefix for _, prefix, _ in requests],
            [length - prefix for length, prefix, _ in requests],
        )
        self.assertIsNone(lookahead)

    def test_a_picture_that_goes_on_is_causal(self):
        inputs = _mm_inputs([(Modality.IMAGE, 3, 9), (Modality.IMAGE, 12, 20)])
        lookahead = get_picture_lookahead([inputs], [0], [15])
        self.assertEqual(lookahead.tolist(), [0] * 3 + [*range(6, -1, -1)] + [0] * 5)

    def test_none_where_the_pictures_are_cached(self):
        inputs = _mm_inputs([(Modality.IMAGE, 3, 9)])
        self.assertIsNone(get_picture_lookahead([inputs, None], [10, 0], [5, 7]))


class TestTorchNative(CustomTestCase):
    """The CPU engine's attention, against the definition in float64."""

    HEADS, KV_HEADS, DIM, WINDOW = 4, 2, 8, 5

    @given(st.lists(prompts(), min_size=1, max_size=3), st.booleans())
    def test_extend(self, requests, sliding):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.tensor([length for length, _, _ in requests])
        prefixes = torch.tensor([prefix for _, prefix, _ in requests])
        new = lengths - prefixes
        slots = torch.randperm(int(lengths.sum()), generator=generator)
        req_to_token = torch.zeros(len(requests), int(lengths.max()), dtype=torch.long)
        for i, of_request in enumerate(slots.split(lengths.tolist())):
            req_to_token[i, : len(of_request)] = of_request
        q, k, v = (
            torch.randn(rows, heads, self.DIM, generator=generator)
            for rows, heads in (
                (int(new.sum()), self.HEADS),
                (int(lengths.sum()), self.KV_HEADS),
                (int(lengths.sum()), self.KV_HEADS),
            )
        )
        lookahead = get_picture_lookahead(
            [_mm_inputs(spans) for _, _, spans in requests],
            prefixes.tolist(),
            new.tolist(),
        )
        out = TorchNativeAttnBackend._run_sdpa_forward_extend(
            TorchNativeAttnBackend,
            q,
            torch.empty_like(q),
            k,
            v,
            req_to_token,
            torch.arange(len(requests)),
            lengths,
            prefixes,
            new,
            scaling=1.0,
            enable_gqa=True,
            causal=True,
            sliding_window_size=self.WINDOW - 1 if sliding else None,
            lookahead=lookahead,
        )
        expected = []
        for i, (queries, (length, prefix, spans)) in enumerate(
            zip(q.double().split(new.tolist()), requests)
        ):
            if sliding:
                mask = _expected(length, spans, self.WINDOW)
            else:
                mask = torch.ones(length, length, dtype=torch.bool).tril()
            keys = k[req_to_token[i, :length]].double()
            values = v[req_to_token[i, :length]].double()
            keys, values = (
                x.repeat_interleave(self.HEADS // self.KV_HEADS, dim=1)
                for x in (keys, values)
            )
            scores = torch.einsum("qhd,khd->hqk", queries, keys)
            scores.masked_fill_(~mask[prefix:], float("-inf"))
            expected.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        torch.testing.assert_close(
            out.double(), torch.cat(expected), rtol=1e-5, atol=1e-5
        )


if __name__ == "__main__":
    unittest.main()
