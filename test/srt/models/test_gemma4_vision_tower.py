"""Gemma 4's vision tower gives transformers' soft tokens: what the image processor pads
is neither attended to nor pooled, whatever the attention backend.

The pictures are square, tall, wide, small and large; transformers reads each alone, in
float32. A backend without its hardware runs in Triton's interpreter, or is stood for by
attention that goes by the same `cu_seqlens`.
"""

import importlib
import os
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import numpy as np
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_cases import PICTURES, be_the_only_rank, random_picture
from safetensors.torch import load_file

from sglang.srt.layers.attention import vision
from sglang.srt.layers.moe import initialize_moe_config
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem
from sglang.srt.models.gemma4_mm import Gemma4ForConditionalGeneration
from sglang.srt.utils.hf_transformers_utils import get_config
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))
from gemma4.checkpoint import write_checkpoint

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")

PREFILL = "sglang.kernels.ops.attention.prefill_attention"


def _picture(height: int, width: int) -> np.ndarray:
    return random_picture(height, width, seed=1000 * height + width)


def _varlen_attention(q, k, v, *, cu_seqlens_q, max_seqlen_q, softmax_scale, **kwargs):
    """What FlashAttention computes of [tokens, heads, head_dim], without its hardware."""
    bounds = cu_seqlens_q.tolist()
    assert max_seqlen_q == max(b - a for a, b in zip(bounds, bounds[1:]))
    assert bounds[0] == 0 and bounds[-1] == len(q)
    out = torch.empty_like(q)
    for a, b in zip(bounds, bounds[1:]):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * softmax_scale
        out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[a:b])
    return out


class Tower:
    """The cases; a subclass names the shape."""

    shape: str

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory(prefix="gemma4-vision-")
        cls.addClassCleanup(folder.cleanup)
        write_checkpoint(folder.name, cls.shape, dtype="float32", overwrite=True)
        cls.folder = folder.name
        cls.oracle = transformers.Gemma4ForConditionalGeneration.from_pretrained(
            folder.name, dtype=torch.float32
        ).eval()
        cls.processor = transformers.AutoProcessor.from_pretrained(folder.name)
        be_the_only_rank(cls)
        initialize_moe_config()
        cls.model = cls.load()

    @classmethod
    def load(cls):
        model = Gemma4ForConditionalGeneration(
            get_config(cls.folder, trust_remote_code=False)
        )
        weights = load_file(os.path.join(cls.folder, "model.safetensors"))
        model.load_weights(weights.items())
        return model.eval()

    def read(self, *sizes, soft_tokens=None):
        """The image processor's output for pictures of these sizes."""
        kwargs = {} if soft_tokens is None else {"max_soft_tokens": soft_tokens}
        return self.processor.image_processor(
            [_picture(*size) for size in sizes], return_tensors="pt", **kwargs
        )

    @torch.inference_mode()
    def encode(self, pixel_values, position_ids) -> torch.Tensor:
        """transformers' soft tokens of one picture, [tokens, text hidden size]."""
        tokens = self.oracle.model.vision_tower(pixel_values, position_ids)
        tokens = self.oracle.model.embed_vision(tokens.last_hidden_state)
        return tokens.reshape(-1, tokens.shape[-1])

    def expected(self, *sizes) -> torch.Tensor:
        """transformers' soft tokens of pictures that it reads one by one."""
        pictures = [self.read(size) for size in sizes]
        return torch.cat(
            [self.encode(p["pixel_values"], p["image_position_ids"]) for p in pictures]
        )

    def items(self, *sizes):
        """An item a picture, as the multimodal processor makes them."""
        pictures = self.read(*sizes)
        return [
            self.item(pictures["pixel_values"][i], pictures["image_position_ids"][i])
            for i in range(len(sizes))
        ]

    def item(self, pixel_values, position_ids):
        item = MultimodalDataItem(modality=Modality.IMAGE, feature=pixel_values)
        item.set("image_position_ids", position_ids)
        return item

    @torch.inference_mode()
    def check(self, items, expected, model=None):
        model = model or self.model
        video = items[0].modality == Modality.VIDEO
        got = (model.get_video_feature if video else model.get_image_feature)(items)
        self.assertEqual(got.shape, expected.shape)
        error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
        worst = error.argmax().item()
        self.assertLess(
            error[worst].item(), 1e-5, f"soft token {worst} of {len(error)} is off"
        )

    def test_each_alone(self):
        for name, size in PICTURES.items():
            with self.subTest(name):
                self.check(self.items(size), self.expected(size))

    def test_all_at_once(self):
        sizes = list(PICTURES.values())
        self.check(self.items(*sizes), self.expected(*sizes))

    def test_the_same_twice(self):
        sizes = [PICTURES[name] for name in ("tall", "wide", "tall")]
        self.check(self.items(*sizes), self.expected(*sizes))

    def test_pictures_of_one_item(self):
        sizes = list(PICTURES.values())
        pictures = self.read(*sizes)
        item = self.item(pictures["pixel_values"], pictures["image_position_ids"])
        self.check([item], self.expected(*sizes))

    def test_padded_to_different_lengths(self):
        """As when the soft tokens of a picture are set a request."""
        small, large = PICTURES["small"], PICTURES["large"]
        few, many = self.read(large), self.read(large, soft_tokens=280)
        items = [
            self.item(few["pixel_values"][0], few["image_position_ids"][0]),
            self.item(many["pixel_values"][0], many["image_position_ids"][0]),
            *self.items(small),
        ]
        of_many = self.encode(many["pixel_values"], many["image_position_ids"])
        expected = [self.expected(large), of_many, self.expected(small)]
        self.check(items, torch.cat(expected))

    def test_more_than_fit_at_once(self):
        sizes = list(PICTURES.values())
        with mock.patch("sglang.srt.models.gemma4_mm.MAX_PATCHES_AT_ONCE", 1400):
            self.check(self.items(*sizes), self.expected(*sizes))

    def test_beside_soft_tokens(self):
        """An item may bring what the tower would give, between others that do not."""
        before, here, after, *_ = PICTURES.values()
        ready = self.item(self.expected(here), None)
        items = [*self.items(before), ready, *self.items(after)]
        self.check(items, self.expected(before, here, after))

    def test_frames_of_a_video(self):
        """A frame is read as a picture, whichever other frames there are."""
        frames = np.stack([_picture(90 + i, 120)[:90] for i in range(3)])
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2)
        video = self.processor.video_processor(
            [frames], do_sample_frames=False, return_tensors="pt"
        )
        pixels, positions = video["pixel_values_videos"], video["video_position_ids"]
        item = MultimodalDataItem(modality=Modality.VIDEO, feature=pixels)
        item.set("video_position_ids", positions)
        pixels = pixels.reshape(-1, 1, *pixels.shape[-2:])
        positions = positions.reshape(-1, 1, *positions.shape[-2:])
        expected = [self.encode(*frame) for frame in zip(pixels, positions)]
        self.check([item], torch.cat(expected))

    def test_fa3(self):
        with (
            mock.patch.object(vision, "_is_cuda", True),
            mock.patch.object(
                vision, "flash_attn_func", _varlen_attention, create=True
            ),
        ):
            self.check_backend("fa3")

    def check_backend(self, name):
        """With pictures of few patches: an interpreter is slow."""
        patches = [self.patches(3, 9), self.patches(6, 3), self.patches(3, 9)]
        pixels, positions = (torch.cat(tensors) for tensors in zip(*patches))
        expected = [self.encode(*picture) for picture in patches]
        with mock.patch(
            "sglang.srt.models.gemma4_vision.Gemma4VisionAttention._select_backend",
            return_value=name,
        ):
            model = self.load()
        self.check([self.item(pixels, positions)], torch.cat(expected), model)

    def patches(self, height, width, room=90):
        """A picture of height x width random patches, padded to `room`."""
        generator = torch.Generator().manual_seed(10 * height + width)
        pixels = torch.rand(1, room, 3 * 16 * 16, generator=generator)
        positions = torch.full((1, room, 2), -1)
        for i in range(height * width):
            positions[0, i] = torch.tensor([i % width, i // width])
        return pixels, positions


class TestLarge(Tower, CustomTestCase):
    """Of 26B-A4B and 31B, which standardize the soft tokens."""

    shape = "tiny"

    @settings(max_examples=settings().max_examples // 7)
    @given(
        st.lists(
            st.tuples(st.integers(16, 500), st.integers(16, 500)).filter(
                lambda size: max(size) < 10 * min(size)
            ),
            min_size=1,
            max_size=4,
        )
    )
    def test_any_sizes(self, sizes):
        self.check(self.items(*sizes), self.expected(*sizes))

    def test_triton(self):
        with (
            mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
            mock.patch.dict(sys.modules),
        ):
            sys.modules.pop(PREFILL, None)
            kernel = importlib.import_module(PREFILL).context_attention_fwd
            with mock.patch.object(vision, "context_attention_fwd", kernel):
                self.check_backend("triton_attn")


class TestSmall(Tower, CustomTestCase):
    """Of E2B and E4B, whose linear layers clip."""

    shape = "tiny-e2b"


if __name__ == "__main__":
    unittest.main()
