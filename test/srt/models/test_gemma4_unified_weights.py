"""Gemma 4 Unified reads its checkpoints under both names of the weights before the text
model: the released ones, and those of transformers' modules.

transformers saves under either: what it loaded keeps its names, what it made gets the
released ones unless `save_original_format=False` asks for the modules' own.
"""

import os
import sys
import tempfile
import unittest
from pathlib import Path

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import numpy as np
import torch
import transformers
from picture_cases import be_the_only_rank
from safetensors.torch import load_file

from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem
from sglang.srt.models.gemma4_unified import Gemma4UnifiedForConditionalGeneration
from sglang.srt.utils.hf_transformers_utils import get_config
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))
from gemma4.checkpoint import write_checkpoint

register_cpu_ci(est_time=40, suite="stage-a-test-cpu")

TOLERANCE = 1e-5


class TestUnifiedWeights(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory(prefix="gemma4-unified-")
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        written = cls.folder / "written"
        write_checkpoint(written, "tiny-12b", dtype="float32")
        loaded = transformers.Gemma4UnifiedForConditionalGeneration.from_pretrained(
            written, dtype=torch.float32
        )
        # One that transformers made itself, and that knows no names of a folder.
        cls.oracle = transformers.Gemma4UnifiedForConditionalGeneration(loaded.config)
        cls.oracle.load_state_dict(loaded.state_dict())
        cls.oracle.eval()
        cls.config = get_config(str(written), trust_remote_code=False)
        cls.processor = transformers.AutoProcessor.from_pretrained(written)
        be_the_only_rank(cls)

    def check(self, oracle, name_there, original):
        """Save `oracle`, whose weights must have one of that name, and load it."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            oracle.save_pretrained(folder, save_original_format=original)
            weights = load_file(os.path.join(folder, "model.safetensors"))
        self.assertIn(name_there, weights)
        model = Gemma4UnifiedForConditionalGeneration(self.config).eval()
        # What is not loaded must not be right by chance.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        model.load_weights(weights.items())
        for name, parameter in model.named_parameters():
            self.assertFalse(parameter.isnan().any(), f"{name} is not loaded")
        self.check_pictures(model)
        self.check_sound(model)

    @torch.inference_mode()
    def check_pictures(self, model):
        random = np.random.default_rng(0)
        pictures = [
            random.integers(0, 256, (*size, 3), dtype=np.uint8)
            for size in ((96, 96), (400, 60), (700, 900))
        ]
        read = self.processor.image_processor(pictures, return_tensors="pt")
        pixels, positions = read["pixel_values"], read["image_position_ids"]
        item = MultimodalDataItem(modality=Modality.IMAGE, feature=pixels)
        item.set("image_position_ids", positions)
        expected = self.oracle.get_image_features(pixels, positions).pooler_output
        self.assert_close(model.get_image_feature([item]), torch.cat(expected))

    @torch.inference_mode()
    def check_sound(self, model):
        frames = torch.randn(1, 5, 640, generator=torch.Generator().manual_seed(0))
        mask = torch.tensor([[True, True, True, False, False]])
        item = MultimodalDataItem(modality=Modality.AUDIO, feature=frames)
        item.set("input_features_mask", mask)
        expected = self.oracle.model.get_audio_features(frames, mask).pooler_output
        self.assert_close(model.get_audio_feature([item]), expected[mask])

    def assert_close(self, got, expected):
        self.assertEqual(got.shape, expected.shape)
        error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
        self.assertLess(error.max().item(), TOLERANCE)

    def test_released_names(self):
        name = "model.vision_embedder.patch_dense.weight"
        self.check(self.oracle, name, original=True)

    def test_names_of_the_modules(self):
        name = "model.embed_vision.patch_dense.weight"
        self.check(self.oracle, name, original=False)

    def test_released_names_without_a_head(self):
        name = "vision_embedder.patch_dense.weight"
        self.check(self.oracle.model, name, original=True)

    def test_names_of_the_modules_without_a_head(self):
        name = "embed_vision.patch_dense.weight"
        self.check(self.oracle.model, name, original=False)


if __name__ == "__main__":
    unittest.main()
