"""Gemma 4 answers prompts that its sliding-window pool does not hold, or refuses them."""

import sys
import unittest
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).parent))
import test_gemma4_parity as parity

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")

setUpModule, tearDownModule = parity.setUpModule, parity.tearDownModule
# 1600 tokens in the full pool, and at the default ratio 240 in the other one.
POOLS = ["--max-total-tokens", "1600"]


class TestChunks(parity.Served, CustomTestCase):
    folder, dtype = "multimodal", "float32"
    server_args = [*POOLS, "--chunked-prefill-size", "512"]

    def test_long_prompts(self):
        prompts = [parity._prompt(length) for length in (230, 500, 1000)]
        for prompt, answer in zip(prompts, self.generate(prompts)):
            self.check(f"prompt of {len(prompt)} tokens", prompt, answer)


class TestChunksWithoutCache(TestChunks):
    server_args = [*TestChunks.server_args, "--disable-radix-cache"]


class TestWithoutChunks(parity.Served, CustomTestCase):
    folder, dtype = "multimodal", "float32"
    # Of the memory, which is to hold a prompt of any length, less would be left.
    server_args = [*POOLS, "--chunked-prefill-size", "-1"]
    server_args += ["--mem-fraction-static", "0.5"]

    def test_what_the_pool_holds(self):
        # A window and a page less than the pool.
        limit = 240 - (parity.WINDOW - 1) - 1
        prompt = parity._prompt(limit - 1)
        self.check("the longest prompt", prompt, self.generate(prompt))

        response = requests.post(
            f"{self.base_url}/generate",
            json={"input_ids": parity._prompt(limit)},
            timeout=60,
        )
        self.assertEqual(response.status_code, 400, response.text)
        self.assertIn(f"maximum allowed length ({limit} tokens)", response.text)


if __name__ == "__main__":
    unittest.main()
