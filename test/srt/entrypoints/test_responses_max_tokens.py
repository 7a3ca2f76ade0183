"""`max_output_tokens` of /v1/responses is the number of tokens that the engine may give."""

import unittest

from sglang.srt.entrypoints.openai.protocol import ResponsesRequest
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")


def budget(max_output_tokens, **kwargs):
    """What the engine makes of a request: a number of new tokens, or None."""
    request = ResponsesRequest(
        model="m", input="a", max_output_tokens=max_output_tokens
    )
    params = SamplingParams(**request.to_sampling_params(**kwargs))
    params.normalize(None)
    params.verify(100)
    return params.max_new_tokens


class TestResponsesMaxTokens(CustomTestCase):
    def test_exact(self):
        for n in (1, 2, 3, 16, 8192):
            self.assertEqual(budget(n), n)

    def test_default(self):
        self.assertEqual(budget(None, default_max_tokens=7), 7)
        self.assertEqual(budget(9, default_max_tokens=7), 7)
        self.assertEqual(budget(5, default_max_tokens=7), 5)


if __name__ == "__main__":
    unittest.main()
