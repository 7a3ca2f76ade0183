"""Gemma 4 answers prompts that its sliding-window pool does not hold, or refuses them.

None is waited for: a prompt that no empty pool could take would wait without end, and
all requests behind it.
"""

import sys
import unittest
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).parent))
import test_gemma4_parity as parity

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=120, suite="base-a-test-cpu")

tearDownModule = parity.tearDownModule
# 1600 tokens in the full pool, and 240 in the other one.
POOLS = ["--max-total-tokens", "1600", "--swa-full-tokens-ratio", "0.15"]
# Of the memory, which is to hold a prompt of any length, less would be left.
WITHOUT_CHUNKS = ["--chunked-prefill-size", "-1", "--mem-fraction-static", "0.5"]
# Room that is kept for an answer, and for drafts beyond it.
MARGIN, DRAFT_SLOTS = 5, 2 * 4


def setUpModule():
    parity.setUpModule()
    parity.write_checkpoint(f"{parity.FOLDERS}/draft", assistant=True)


def drafting() -> list:
    """Of a server that drafts, mostly in vain, as the draft's weights are random."""
    return [
        *("--speculative-algorithm", "NEXTN"),
        *("--speculative-draft-model-path", f"{parity.FOLDERS}/draft"),
        *("--speculative-num-steps", "3", "--speculative-num-draft-tokens", "4"),
        *("--speculative-eagle-topk", "1"),
    ]


class Small(parity.Served):
    folder, dtype = "multimodal", "float32"

    def check_limit(self, limit):
        """A prompt as long as the limit is refused, a shorter one is answered."""
        for length in (limit, 2 * limit):
            response = requests.post(
                f"{self.base_url}/generate",
                json={"input_ids": parity._prompt(length)},
                timeout=60,
            )
            self.assertEqual(response.status_code, 400, response.text)
            self.assertIn(f"maximum allowed length ({limit} tokens)", response.text)

        answer = self.generate(parity._prompt(limit - 1))
        self.assertEqual(len(answer["output_ids"]), MARGIN)

        prompt = parity._prompt(20)
        self.check("after those", prompt, self.generate(prompt))


class TestChunks(Small, CustomTestCase):
    server_args = [*POOLS, "--chunked-prefill-size", "512"]

    def test_long_prompts(self):
        prompts = [parity._prompt(length) for length in (230, 500, 1000)]
        for prompt, answer in zip(prompts, self.generate(prompts)):
            self.check(f"prompt of {len(prompt)} tokens", prompt, answer)


class TestWithoutChunks(Small, CustomTestCase):
    server_args = [*POOLS, *WITHOUT_CHUNKS]
    draft_slots = 0

    def test_what_the_pool_holds(self):
        # Prompt and answer are less than the pool without the page more that a
        # request is charged, so that one that was retracted fits again.
        self.check_limit(240 - 1 - MARGIN - self.draft_slots)

    def test_together(self):
        lengths = (150, 160, 40, 165, 33, 100)
        prompts = [parity._prompt(length) for length in lengths]
        for prompt, answer in zip(prompts, self.generate(prompts)):
            self.check(f"prompt of {len(prompt)} tokens", prompt, answer)

    def test_cached_prefix(self):
        start = parity._prompt(160, seed=2)
        self.generate(start, new_tokens=1)
        for length in (20, 32, 100, 159):
            prompt = start[:length] + parity._prompt(166 - length, seed=3)[1:]
            self.check(f"{length} tokens cached", prompt, self.generate(prompt))


class TestDraftingWithoutChunks(TestWithoutChunks):
    draft_slots = DRAFT_SLOTS

    @classmethod
    def setUpClass(cls):
        cls.server_args = [*POOLS, *WITHOUT_CHUNKS, *drafting()]
        super().setUpClass()


class TestDrafting(Small, CustomTestCase):
    @classmethod
    def setUpClass(cls):
        cls.server_args = [*POOLS, "--chunked-prefill-size", "64", *drafting()]
        super().setUpClass()

    def test_what_the_pool_holds(self):
        self.check_limit(1600 - 1 - MARGIN - DRAFT_SLOTS)


class TestPages(Small, CustomTestCase):
    """In pages of 16 a request is charged up to 31 tokens more than it has."""

    server_args = [*POOLS, "--page-size", "16", "--chunked-prefill-size", "64"]

    def test_what_the_pool_holds(self):
        self.check_limit(1600 - 2 * 16 + 1 - MARGIN)


if __name__ == "__main__":
    unittest.main()
