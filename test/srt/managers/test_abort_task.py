"""What is left of a streamed request when its answer ends is aborted: nothing of one
that was refused, and nothing of another that has its id."""

import asyncio
import unittest
from unittest import mock

from sglang.srt.managers import tokenizer_manager
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")


class TestAbortTask(CustomTestCase):
    def setUp(self):
        self.manager = object.__new__(TokenizerManager)
        self.manager.rid_to_state = {}
        self.manager.enable_trace = False
        self.manager.disaggregation_mode = mock.Mock()

    def accept(self, **fields):
        """What generate_request begins with."""
        request = GenerateReqInput(stream=True, **fields)
        request.normalize_batch_and_arguments()
        self.manager._init_req_state(request)
        return request

    def aborted(self, request):
        """The ids that the task behind the answer aborts."""
        rids = []
        with mock.patch.object(
            self.manager, "abort_request", rids.append
        ), mock.patch.object(tokenizer_manager.asyncio, "sleep", mock.AsyncMock()):
            asyncio.run(self.manager.create_abort_task(request)())
        return rids

    def test_refused(self):
        for fields in (
            {},
            {"text": []},
            {"input_ids": []},
            {"text": ["a", "b"], "sampling_params": []},
            {"text": ["a", "b"], "rid": "c", "sampling_params": [{}]},
            {"text": "a", "rid": ["c"]},
        ):
            request = GenerateReqInput(stream=True, **fields)
            with self.subTest(fields), self.assertRaises(ValueError):
                request.normalize_batch_and_arguments()
            with self.subTest(fields):
                self.assertEqual(self.aborted(request), [])

    def test_left(self):
        self.assertEqual(self.aborted(self.accept(text="a", rid="c")), ["c"])
        batch = self.accept(text=["a", "b"], rid=["d", "e"])
        self.assertEqual(self.aborted(batch), ["d", "e"])
        self.manager.rid_to_state.pop("d")
        self.assertEqual(self.aborted(batch), ["e"])

    def test_another_has_the_id(self):
        self.accept(text="a", rid="c")
        for fields in ({"text": "a", "rid": "c"}, {"text": ["a"], "rid": ["c"]}):
            request = GenerateReqInput(stream=True, **fields)
            request.normalize_batch_and_arguments()
            with self.assertRaisesRegex(ValueError, "c"):
                self.manager._init_req_state(request)
            self.assertEqual(self.aborted(request), [])


if __name__ == "__main__":
    unittest.main()
