"""Two ranks encode a sound as one does, with the audio tower of a small E2B."""

import shutil
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from two_ranks import ask_ranks

from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))
from gemma4.checkpoint import write_checkpoint

register_cpu_ci(est_time=25, suite="stage-a-test-cpu")

RATE = 16000


class TestTwoRanks(CustomTestCase):
    def test_a_sound(self):
        folder = tempfile.mkdtemp(prefix="gemma4-audio-")
        self.addCleanup(shutil.rmtree, folder)
        write_checkpoint(folder, "tiny-e2b", dtype="float32")
        processor = transformers.AutoProcessor.from_pretrained(folder)
        sound = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
        read = processor.feature_extractor(
            [sound], sampling_rate=RATE, return_tensors="pt"
        )
        item = MultimodalDataItem(
            modality=Modality.AUDIO, feature=read["input_features"]
        )
        item.set("input_features_mask", read["input_features_mask"])

        def question(rank):
            return rank.model.get_audio_feature([item])

        (alone,) = ask_ranks(folder, question, tp_size=1)
        self.assertGreater(alone.norm().item(), 0)
        for rank, shared in enumerate(ask_ranks(folder, question, tp_size=2)):
            with self.subTest(rank=rank):
                error = (shared - alone).norm() / alone.norm()
                self.assertLess(error.item(), 1e-5)


if __name__ == "__main__":
    unittest.main()
