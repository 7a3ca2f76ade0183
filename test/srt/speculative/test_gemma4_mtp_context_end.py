"""Prompt and answer fill the context with Gemma 4's MTP assistant as without it, though
it drafts and verifies beyond the end."""

import importlib.util
import unittest
from pathlib import Path

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

spec = importlib.util.spec_from_file_location(
    "context_end", Path(__file__).parents[1] / "managers" / "test_context_end.py"
)
end = importlib.util.module_from_spec(spec)
spec.loader.exec_module(end)

register_cpu_ci(est_time=120, suite="stage-a-test-cpu")


def setUpModule():
    end.setUpModule()


def tearDownModule():
    end.tearDownModule()


class TestContextEndMTP(end.ContextEnd, end.mtp.Drafting, CustomTestCase):
    more_args = ["--context-length", str(end.CONTEXT)]


if __name__ == "__main__":
    unittest.main()
