"""Prompt and answer may fill the context to its last token, on the CPU engine.

The answer's last token takes no position. transformers, in float32, is the oracle of
what stands at the end.
"""

import importlib.util
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests
import torch

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

spec = importlib.util.spec_from_file_location(
    "gemma4_mtp", Path(__file__).parents[1] / "speculative" / "test_gemma4_mtp.py"
)
mtp = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mtp)
parity = mtp.parity

register_cpu_ci(est_time=120, suite="stage-a-test-cpu")

CONTEXT = 192


def setUpModule():
    mtp.setUpModule()


def tearDownModule():
    mtp.tearDownModule()


class ContextEnd:
    def ask(self, length: int, new_tokens):
        """Answer of a prompt of `length` tokens, or the error of a refused one."""
        prompt = parity._prompt(length, seed=40)
        response = requests.post(
            f"{self.base_url}/generate",
            json={
                "input_ids": prompt,
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": new_tokens,
                    "ignore_eos": True,
                },
            },
            timeout=300,
        )
        if response.status_code != 200:
            self.assertEqual(response.status_code, 400, response.text)
            return response.json()["error"]["message"]
        return prompt, response.json()

    @torch.inference_mode()
    def check_full(self, prompt, answer):
        tokens = answer["output_ids"]
        self.assertEqual(len(prompt) + len(tokens), CONTEXT)
        self.assertEqual(answer["meta_info"]["finish_reason"]["type"], "length")
        logits = self.oracle(input_ids=torch.tensor([prompt + tokens])).logits
        best = logits[0, len(prompt) - 1 : -1].argmax(dim=-1)
        self.assertEqual(best.tolist(), tokens)

    def test_alone(self):
        for left in (1, 2, 3, 4, 5, 6, 7, 40):
            for new_tokens in (left, None):
                with self.subTest(left=left, new_tokens=new_tokens):
                    self.check_full(*self.ask(CONTEXT - left, new_tokens))

    def test_together(self):
        lefts = (1, 2, 3, 5, 8, 13, 21, 34)
        with ThreadPoolExecutor(len(lefts)) as pool:
            answers = list(pool.map(lambda n: self.ask(CONTEXT - n, n), lefts))
        for answer in answers:
            self.check_full(*answer)

    def test_more_is_refused(self):
        for left in (1, 5, 40):
            self.assertIn(str(CONTEXT), self.ask(CONTEXT - left, left + 1))
        for length in (CONTEXT, CONTEXT + 1, 2 * CONTEXT):
            self.assertIn(str(CONTEXT), self.ask(length, None))


class TestContextEnd(ContextEnd, parity.Served, CustomTestCase):
    folder, dtype = "multimodal", "float32"
    server_args = [*parity.ROOMY, "--context-length", str(CONTEXT)]


if __name__ == "__main__":
    unittest.main()
