"""Where llguidance drops, narrows or refuses a keyword of a JSON schema, a gap is named."""

import unittest

from schema_table import Gaps

from sglang.srt.constrained.json_schema_support import llguidance_gap
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")


class TestLlguidance(Gaps, CustomTestCase):
    backend = "llguidance"
    gap_of = staticmethod(llguidance_gap)


if __name__ == "__main__":
    unittest.main()
