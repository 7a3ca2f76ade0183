"""A session request that replaces the whole history ends what is running of it."""

import unittest
from types import SimpleNamespace

from sglang.srt.managers.io_struct import SessionParams
from sglang.srt.session.session_controller import Session
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")


class FakeReq(SimpleNamespace):
    """What a session reads and writes of a Req."""

    def __init__(self, rid, origin_input_ids, origin_input_ids_unpadded=None, **_):
        super().__init__(
            rid=rid,
            origin_input_ids=origin_input_ids,
            origin_input_ids_unpadded=origin_input_ids_unpadded or origin_input_ids,
            output_ids=[],
            finished_reason=None,
            to_finish=None,
            multimodal_inputs=None,
            sampling_params=SimpleNamespace(max_new_tokens=4),
            inherit_mm_token_counts=lambda _: None,
        )

    def finished(self):
        return self.finished_reason is not None

    def set_finish_with_abort(self, message):
        self.to_finish = message


class TestReplace(CustomTestCase):
    def setUp(self):
        self.session = Session(1000, "s")

    def send(self, name, **params):
        fields = dict.fromkeys(
            "sampling_params lora_id custom_logit_processor stream return_logprob "
            "top_logprobs_num token_ids_logprob return_sampling_mask "
            "sampling_logprobs_mode require_reasoning return_hidden_states "
            "return_routed_experts routed_experts_start_len bootstrap_host "
            "bootstrap_port bootstrap_room routed_dp_rank disagg_prefill_dp_rank "
            "priority routing_key extra_key cache_salt http_worker_ipc time_stats "
            "mm_inputs".split()
        )
        request = SimpleNamespace(
            **{
                **fields,
                "rid": name,
                "input_ids": [1, 2],
                "session_params": SessionParams(id="s", **params),
            }
        )
        return self.session.create_req(request, None, 100, req_factory=FakeReq)

    def replaced(self, *earlier):
        last = self.send("last", replace=True)
        self.assertEqual(list(self.session.req_nodes), ["last"])
        self.assertEqual(last.origin_input_ids, [1, 2])
        self.assertIsNone(last.to_finish)
        for req in earlier:
            self.assertIsNotNone(req.to_finish, req.rid)

    def test_one_turn(self):
        self.replaced(self.send("first"))

    def test_a_tree_of_turns(self):
        first, other = self.send("first"), self.send("other")
        for req in (first, other):
            req.finished_reason = "stop"
        second = self.send("second", rid="first")
        self.replaced(second)

    def test_a_turn_under_the_same_rid(self):
        self.send("first").finished_reason = "stop"
        again = self.send("first")
        self.replaced(again)

    def test_nothing_yet(self):
        self.replaced()


if __name__ == "__main__":
    unittest.main()
