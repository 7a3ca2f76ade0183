"""Two ranks of the CPU engine answer as transformers does: each has half of the heads,
of the dense MLP and of every expert."""

import dataclasses
import os
import tempfile
import unittest
from unittest import mock

import requests
import test_gemma4_parity
from test_gemma4_parity import CHUNKED, WINDOW, Served, _prompt

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

import checkpoint  # isort: skip # test_gemma4_parity has put it on the path

register_cpu_ci(est_time=80, suite="stage-a-test-cpu")

NEW_TOKENS = 16
# Heads and widths that two ranks can share, KV heads of the full layers among them.
SHARED = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
}


class TestTwoRanks(Served, CustomTestCase):
    dtype = "float32"
    server_args = [*CHUNKED, "--max-total-tokens", "1200", "--tp", "2"]
    tolerance = {"float32": 1e-5}

    @classmethod
    def setUpClass(cls):
        folders = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folders.cleanup)
        cls.folder = folders.name
        tiny = checkpoint.SHAPES["tiny"]
        shape = dataclasses.replace(tiny, text={**tiny.text, **SHARED})
        with mock.patch.dict(checkpoint.SHAPES, {"shared": shape}):
            checkpoint.write_checkpoint(cls.path(), "shared", dtype=cls.dtype)
        cores = sorted(os.sched_getaffinity(0))
        cls.variables = {"SGLANG_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
        super().setUpClass()

    @classmethod
    def path(cls):
        return f"{cls.folder}/model"

    def setUp(self):
        super().setUp()
        self.enterContext(
            mock.patch.object(test_gemma4_parity, "NEW_TOKENS", NEW_TOKENS)
        )

    def test_there_are_two(self):
        info = requests.get(f"{self.base_url}/get_server_info", timeout=60).json()
        self.assertEqual(info["tp_size"], 2)

    def test_alone(self):
        for length in (1, WINDOW + 1, 4 * WINDOW):
            with self.subTest(length=length):
                prompt = _prompt(length)
                answer = self.generate(prompt, NEW_TOKENS, logprob_start_len=0)
                self.check(f"prompt of {length} tokens", prompt, answer)

    def test_at_once(self):
        prompts = [_prompt(n, seed=1) for n in (1, 5, WINDOW, 4 * WINDOW)]
        for prompt, answer in zip(prompts, self.generate(prompts, NEW_TOKENS)):
            with self.subTest(length=len(prompt)):
                self.check(f"prompt of {len(prompt)} tokens", prompt, answer)


if __name__ == "__main__":
    unittest.main()
