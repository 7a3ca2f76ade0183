"""Every grammar backend holds the answer behind a thought to its schema."""

import sys
import unittest
from pathlib import Path

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parent))
from reasoner_walk import (  # noqa: E402
    ANSWER,
    END,
    AcceptsMixin,
    accepted,
    ids_of,
    new_grammar,
)

register_cpu_ci(est_time=15, suite="stage-a-test-cpu")


class TestReasonerBackends(AcceptsMixin, CustomTestCase):
    def test_answer_behind_a_thought(self):
        thought = f"I see {{.{END}"
        for name in ("xgrammar", "llguidance", "outlines"):
            with self.subTest(name):
                self.check_accepts(new_grammar(name, True), thought + ANSWER)
                count = accepted(new_grammar(name, True), f"{thought}It is 5.")
                self.assertEqual(count, len(ids_of(thought)))

    def test_answer_of_a_model_that_does_not_think(self):
        for name in ("xgrammar", "llguidance", "outlines"):
            with self.subTest(name):
                self.check_accepts(new_grammar(name, False), ANSWER)
                self.assertEqual(accepted(new_grammar(name, False), "It is 5."), 0)


if __name__ == "__main__":
    unittest.main()
