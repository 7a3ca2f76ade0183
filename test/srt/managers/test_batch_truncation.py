"""--allow-auto-truncate cuts the answer to a prompt that leaves no room for it, and of a
batch no other one."""

import unittest
from unittest import mock

from sglang.srt.managers import tokenizer_manager
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="stage-a-test-cpu")


class TestBatchTruncation(CustomTestCase):
    def test_an_answer_is_cut_for_its_own_prompt(self):
        manager = object.__new__(TokenizerManager)
        manager.model_config = mock.Mock(
            vocab_size=100, joint_head_config=None, pointer_head=None
        )
        manager.context_len, manager.num_reserved_tokens = 20, 0
        manager.allow_auto_truncate = manager.validate_total_tokens = True
        manager.is_generation = True
        stated = {"max_new_tokens": 10}
        prompts = [[1] * 15, [1] * 5]
        batch = GenerateReqInput(input_ids=prompts, sampling_params=stated)
        batch.normalize_batch_and_arguments()
        features = mock.Mock(enable_encoder_swa_bounded_replay=False)
        with mock.patch.multiple(
            tokenizer_manager,
            get_exec=lambda: mock.Mock(features=features),
            get_server_return_hidden_states_mode=lambda: 0,
        ):
            for i, prompt in enumerate(prompts):
                manager._validate_one_request(batch[i], prompt)
        answers = [batch[i].sampling_params["max_new_tokens"] for i in (0, 1)]
        self.assertEqual(answers, [5, 10])
        self.assertEqual(stated, {"max_new_tokens": 10})


if __name__ == "__main__":
    unittest.main()
