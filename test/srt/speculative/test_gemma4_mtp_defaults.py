"""`--speculative-algorithm NEXTN` and the assistant's folder are all that Gemma 4's MTP
needs: the rest is chosen, what the user gave is kept, and what cannot be is refused."""

import importlib.util
import os
import unittest
from pathlib import Path

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import requests

from sglang.srt.arg_groups import speculative_hook
from sglang.srt.arg_groups.overrides import resolved_view
from sglang.srt.server_args import ServerArgs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

spec = importlib.util.spec_from_file_location(
    "gemma4_mtp", Path(__file__).with_name("test_gemma4_mtp.py")
)
mtp = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mtp)
parity = mtp.parity

register_cpu_ci(est_time=40, suite="stage-a-test-cpu")

GIVEN = (
    "speculative_num_steps",
    "speculative_eagle_topk",
    "speculative_num_draft_tokens",
)

setUpModule = mtp.setUpModule
tearDownModule = mtp.tearDownModule


class TestGemma4MTPDefaults(CustomTestCase):
    def resolve(self, *given, algorithm="NEXTN") -> tuple:
        """Steps, top-k and draft tokens of a server that is given these; None is not
        given."""
        args = ServerArgs(
            model_path=f"{parity.FOLDERS}/multimodal",
            device="cpu",
            speculative_algorithm=algorithm,
            speculative_draft_model_path=f"{parity.FOLDERS}/draft",
            **dict(zip(GIVEN, given)),
        )
        args.resolve_once()
        view = resolved_view(args)
        self.assertEqual(view.speculative_algorithm, "FROZEN_KV_MTP")
        return tuple(getattr(view, name) for name in GIVEN)

    def test_nothing_given(self):
        for algorithm in ("NEXTN", "EAGLE", "FROZEN_KV_MTP"):
            with self.subTest(algorithm=algorithm):
                self.assertEqual(self.resolve(algorithm=algorithm), (3, 1, 4))

    def test_given_values_are_kept(self):
        for given, expected in (
            ((5, None, None), (5, 1, 6)),
            ((1, None, None), (1, 1, 2)),
            ((None, 1, None), (3, 1, 4)),
            ((None, None, 3), (2, 1, 3)),
            ((None, 1, 7), (6, 1, 7)),
            ((2, 1, None), (2, 1, 3)),
            ((2, None, 3), (2, 1, 3)),
            ((4, 1, 5), (4, 1, 5)),
            ((3, 2, 6), (3, 2, 6)),
        ):
            with self.subTest(given=given):
                self.assertEqual(self.resolve(*given), expected)

    def test_a_chain_verifies_all_of_its_tokens(self):
        """As other drafts without branches, with a warning."""
        with self.assertLogs(speculative_hook.logger, "WARNING") as logs:
            self.assertEqual(self.resolve(4, 1, 3), (4, 1, 5))
        self.assertIn("adjusted to speculative_num_steps + 1", "".join(logs.output))

    def test_refused(self):
        for given, message in (
            ((None, 2, None), "speculative_eagle_topk > 1 requires"),
            ((3, 2, None), "speculative_eagle_topk > 1 requires"),
            ((None, 2, 6), "speculative_eagle_topk > 1 requires"),
            ((0, None, None), "at least 1"),
            ((-1, 1, None), "at least 1"),
            ((None, None, 1), "at least 1"),
            ((3, 0, 4), "at least 1"),
            ((3, 2, 1), "at least 2"),
        ):
            with self.subTest(given=given):
                with self.assertRaisesRegex(ValueError, message):
                    self.resolve(*given)


class TestServedWithDefaults(mtp.Drafting, CustomTestCase):
    draft_args = []

    def test_answers(self):
        prompt = parity._prompt(5, seed=6)
        answer = self.generate(prompt)
        self.check("defaults", prompt, answer)
        info = requests.get(f"{self.base_url}/server_info", timeout=60).json()
        self.assertEqual(tuple(info[name] for name in GIVEN), (3, 1, 4))


if __name__ == "__main__":
    unittest.main()
