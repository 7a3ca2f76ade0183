"""Two ranks of the CPU engine answer as transformers does: each has half of the heads,
of the dense MLP and of every expert. Answers are drafted (MTP), and prompts, which come
in chunks smaller than a picture, have pictures.

The assistant drafts the token before once more, as in test_gemma4_mtp.py.
"""

import dataclasses
import importlib.util
import os
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import requests
import test_gemma4_parity as parity
from test_gemma4_parity import CHUNKED, WINDOW, _prompt
from test_gemma4_pictures import MARK, Asking, _picture, _text

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

spec = importlib.util.spec_from_file_location(
    "gemma4_mtp", Path(__file__).parents[1] / "speculative" / "test_gemma4_mtp.py"
)
mtp = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mtp)

from gemma4 import checkpoint  # isort: skip # test_gemma4_parity has put it on the path

register_cpu_ci(est_time=110, suite="stage-a-test-cpu")

NEW_TOKENS = 16
# Heads and widths that two ranks can share, KV heads of the full layers among them.
SHARED = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
}


class TestTwoRanks(Asking, CustomTestCase):
    tolerance = {"float32": 1e-5}

    @classmethod
    def setUpClass(cls):
        folders = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folders.cleanup)
        cls.folder = folders.name
        draft = Path(cls.folder, "draft")
        tiny = checkpoint.SHAPES["tiny"]
        shape = dataclasses.replace(tiny, text={**tiny.text, **SHARED})
        with mock.patch.dict(checkpoint.SHAPES, {"shared": shape}):
            for path, assistant in ((cls.path(), False), (draft, True)):
                checkpoint.write_checkpoint(
                    path, "shared", assistant=assistant, dtype=cls.dtype
                )
        mtp._make_copycat(draft, Path(cls.path()))
        cls.server_args = [*CHUNKED, "--max-total-tokens", "1200", "--tp", "2"]
        cls.server_args += ["--speculative-algorithm", "NEXTN"]
        cls.server_args += ["--speculative-draft-model-path", str(draft)]
        cores = sorted(os.sched_getaffinity(0))
        cls.variables = {"SGLANG_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
        super().setUpClass()

    @classmethod
    def path(cls):
        return f"{cls.folder}/model"

    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.object(parity, "NEW_TOKENS", NEW_TOKENS))

    def check_tokens(self, prompt, answer):
        name = f"prompt of {len(prompt)} tokens"
        parity.Served.check(self, name, prompt, answer)

    def test_there_are_two(self):
        info = requests.get(f"{self.base_url}/get_server_info", timeout=60).json()
        self.assertEqual(info["tp_size"], 2)

    def test_alone(self):
        for length in (1, WINDOW + 1, 4 * WINDOW):
            with self.subTest(length=length):
                prompt = _prompt(length)
                answer = self.generate(prompt, NEW_TOKENS, logprob_start_len=0)
                self.check_tokens(prompt, answer)

    def test_at_once(self):
        prompts = [_prompt(n, seed=1) for n in (1, 5, WINDOW, 4 * WINDOW)]
        accepted = set()
        for prompt, answer in zip(prompts, self.generate(prompts, NEW_TOKENS)):
            with self.subTest(length=len(prompt)):
                self.check_tokens(prompt, answer)
            counts = answer["meta_info"]["spec_correct_drafts_histogram"]
            accepted |= {n for n, count in enumerate(counts) if count}
        # Some steps accept nothing of a draft, and some all of it.
        self.assertIn(0, accepted)
        self.assertIn(3, accepted)

    def test_picture_alone(self):
        text = f"{_text(9)} {MARK} {_text(7, seed=1)}"
        self.check_all("one", (text, [_picture("square")]))

    def test_pictures_at_once(self):
        several = f"{_text(5)} {MARK} {_text(3)} {MARK} {_text(60, seed=2)} {MARK} go"
        names = ("wide", "tall", "small")
        self.check_all(
            "at once",
            (several, [_picture(name) for name in names]),
            (f"{_text(40)} {MARK}", [_picture("large")]),
            (f"{MARK}{MARK}", [_picture("tall", 1)] * 2),
            (_text(50, seed=10), []),
        )


if __name__ == "__main__":
    unittest.main()
