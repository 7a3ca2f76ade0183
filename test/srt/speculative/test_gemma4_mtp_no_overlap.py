"""Gemma 4's MTP without the overlap scheduler answers as transformers does, and drafts
and accepts what it does with it."""

import importlib.util
import inspect
import os
import unittest
from pathlib import Path

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2
from sglang.srt.speculative.dspark_components.dspark_worker_v2 import DSparkWorkerV2
from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2
from sglang.srt.speculative.frozen_kv_mtp_worker_v2 import FrozenKVMTPWorkerV2
from sglang.srt.speculative.multi_layer_eagle_worker_v2 import MultiLayerEagleWorkerV2
from sglang.srt.speculative.uno_worker_v2 import UnoWorkerV2
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

spec = importlib.util.spec_from_file_location(
    "gemma4_mtp", Path(__file__).with_name("test_gemma4_mtp.py")
)
mtp = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mtp)
parity = mtp.parity

register_cpu_ci(est_time=90, suite="stage-a-test-cpu")

setUpModule = mtp.setUpModule
tearDownModule = mtp.tearDownModule


class TestWorkersTakeWhatTheSchedulerHands(CustomTestCase):
    """Without overlap it hands a worker the batch and pp_proxy_tensors."""

    def test_signature(self):
        for worker in (
            DFlashWorkerV2,
            DSparkWorkerV2,
            EAGLEWorkerV2,
            FrozenKVMTPWorkerV2,
            MultiLayerEagleWorkerV2,
            UnoWorkerV2,
        ):
            with self.subTest(worker.__name__):
                signature = inspect.signature(worker.forward_batch_generation)
                signature.bind(None, None, pp_proxy_tensors=None)


class Overlapping(mtp.Drafting, CustomTestCase):
    """The server to compare with."""


class TestMTPWithoutOverlap(mtp.DraftingParity, CustomTestCase):
    more_args = ["--disable-overlap-schedule"]

    def test_drafts_are_those_with_overlap(self):
        prompts = [parity._prompt(length, seed=29) for length in parity.LENGTHS]
        ours = [self.generate(prompt) for prompt in prompts]
        self.addCleanup(Overlapping.tearDownClass)
        Overlapping.setUpClass()
        theirs = [Overlapping().generate(prompt) for prompt in prompts]
        for length, *answers in zip(parity.LENGTHS, ours, theirs):
            with self.subTest(length=length):
                self.assertEqual(*(answer["output_ids"] for answer in answers))
                steps = [
                    a["meta_info"]["spec_correct_drafts_histogram"] for a in answers
                ]
                self.assertEqual(*steps)


if __name__ == "__main__":
    unittest.main()
