"""With FP8 weights, quantized here or in the checkpoint, each projection of Gemma 4's text
model is FP8, and the towers of pictures and sound, their projections and the routers are
not."""

import os
import sys
import unittest
from pathlib import Path

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

from fp8_models import build_as_on_hopper, can_build_models

from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.quantization.unquant import (
    UnquantizedFusedMoEMethod,
    UnquantizedLinearMethod,
)
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))
from gemma4.checkpoint import write_checkpoint
from gemma4.fp8_forms import FORMS

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")

SHAPES = ("tiny", "tiny-31b", "tiny-e2b", "tiny-e4b", "tiny-12b")
UNQUANTIZED = (UnquantizedLinearMethod, UnquantizedFusedMoEMethod)
TOWERS = {
    "tiny": {"vision_tower", "embed_vision"},
    "tiny-31b": {"vision_tower", "embed_vision"},
    "tiny-e2b": {"vision_tower", "embed_vision", "audio_tower", "embed_audio"},
    "tiny-e4b": {"vision_tower", "embed_vision", "audio_tower", "embed_audio"},
    # Its projections are no layers of the engine.
    "tiny-12b": set(),
}


class TestFp8Towers(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        can_build_models(cls)

    def check(self, shape, fp8, quantization=None):
        folder = self.folder / f"{shape}-{fp8}"
        write_checkpoint(folder, shape, fp8=fp8, weights=False)
        model = build_as_on_hopper(folder, quantization)
        towers = set()
        for name, module in model.named_modules():
            if isinstance(module, (LinearBase, FusedMoE)):
                in_text = name.startswith("language_model.")
                if not in_text:
                    towers.add(name.split(".")[0])
                self.assertEqual(
                    isinstance(module.quant_method, UNQUANTIZED),
                    not in_text or name.endswith(".router.proj"),
                    f"{name} has {type(module.quant_method).__name__}",
                )
        self.assertEqual(towers, TOWERS[shape])

    def test_quantized_here(self):
        for quantization in ("fp8", "w8a8_fp8"):
            for shape in SHAPES:
                with self.subTest(shape=shape, quantization=quantization):
                    self.check(shape, None, quantization)

    def test_quantized_checkpoints(self):
        for form in FORMS:
            for shape in SHAPES:
                with self.subTest(shape=shape, form=form):
                    self.check(shape, form)


if __name__ == "__main__":
    unittest.main()
