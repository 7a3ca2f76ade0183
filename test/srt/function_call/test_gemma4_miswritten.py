"""Gemma 4's tool calls where the model writes them wrong, whole and streamed."""

import sys
import unittest
from pathlib import Path

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parent))
from gemma4_answers import Parsed  # noqa: E402
from gemma4_miswritten import MISWRITTEN, MORE_MISWRITTEN  # noqa: E402

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")


class TestMiswritten(Parsed, CustomTestCase):
    def test_answers(self):
        for name, text, calls, content in MISWRITTEN + MORE_MISWRITTEN:
            with self.subTest(name):
                self.check(text, calls, content)


if __name__ == "__main__":
    unittest.main()
