"""Gemma 4 answers prompts that its sliding-window pool does not hold, without a cache.

Nothing of a prompt is kept for others then, and its slots are released a chunk late.
"""

import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import test_gemma4_parity as parity

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=60, suite="base-a-test-cpu")

setUpModule, tearDownModule = parity.setUpModule, parity.tearDownModule


class TestWithoutCache(parity.Served, CustomTestCase):
    folder, dtype = "multimodal", "float32"
    # 3200 tokens in the full pool, and 480 in the other one.
    server_args = [
        *("--max-total-tokens", "3200", "--swa-full-tokens-ratio", "0.15"),
        *("--chunked-prefill-size", "512", "--disable-radix-cache"),
    ]

    def ask(self, lengths, **sampling_params):
        prompts = [parity._prompt(length) for length in lengths]
        for prompt, answer in zip(prompts, self.generate(prompts)):
            self.check(f"prompt of {len(prompt)} tokens", prompt, answer)

    def test_long_prompts(self):
        self.ask((230, 500, 1000))

    def test_one_alone(self):
        self.ask((1000,))


if __name__ == "__main__":
    unittest.main()
