"""A frozen-KV draft of one branch: the first choice of a step is the next step's token,
and nothing is computed of all the others."""

import contextlib
import os
import unittest
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import torch

from sglang.srt.speculative import frozen_kv_mtp_worker_v2
from sglang.srt.speculative.frozen_kv_mtp_info import FrozenKVMTPDraftInput
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")

STEPS, VOCABULARY, HIDDEN = 3, 50, 8


class Assistant:
    """A draft model: its logits and its hidden states follow from both of its inputs."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.embed = torch.randn(VOCABULARY, HIDDEN, generator=generator)
        self.head = torch.randn(HIDDEN, VOCABULARY, generator=generator)
        self.seen = []

    def step(self, tokens, hidden):
        hidden = torch.tanh(self.embed[tokens] + hidden)
        return hidden @ self.head, hidden

    def forward(self, forward_batch):
        self.seen.append(forward_batch.input_ids.tolist())
        logits, hidden = self.step(
            forward_batch.input_ids, forward_batch.spec_info.hidden_states
        )
        output = SimpleNamespace(next_token_logits=logits, hidden_states=hidden)
        return SimpleNamespace(logits_output=output)


class Worker(frozen_kv_mtp_worker_v2.FrozenKVMTPDraftWorker):
    draft_model_runner = property(lambda self: self.assistant)


def draft(assistant, bonus_tokens, hidden_states):
    """FrozenKVMTPDraftWorker.draft_forward with topk 1."""
    worker = object.__new__(Worker)
    worker.topk, worker.speculative_num_steps = 1, STEPS
    worker.speculative_num_draft_tokens = STEPS + 1
    worker.device, worker.draft_attn_backend = "cpu", None
    worker.assistant = assistant
    steps = torch.arange(STEPS).repeat(len(bonus_tokens), 1)
    worker._chain_parents, worker._chain_score_indices = steps - 1, steps
    worker._set_positions = lambda forward_batch: None
    worker._target_kv_pool_view = lambda forward_batch: contextlib.nullcontext()
    forward_batch = SimpleNamespace(
        spec_info=FrozenKVMTPDraftInput(
            bonus_tokens=bonus_tokens, hidden_states=hidden_states
        ),
        needs_forward_metadata_init=lambda: False,
    )
    with mock.patch.object(
        frozen_kv_mtp_worker_v2,
        "forward_context",
        lambda *args, **kwargs: contextlib.nullcontext(),
    ):
        return worker.draft_forward(forward_batch)


class TestChain(CustomTestCase):
    def setUp(self):
        generator = torch.Generator().manual_seed(1)
        self.bonus_tokens = torch.randint(VOCABULARY, (5,), generator=generator)
        self.hidden = torch.randn(5, HIDDEN, generator=generator)
        self.assistant = Assistant()

    def test_first_choices_follow_each_other(self):
        parents, scores, tokens = draft(
            self.assistant, self.bonus_tokens, self.hidden.clone()
        )
        expected, hidden, token = [], self.hidden, self.bonus_tokens
        for _ in range(STEPS):
            logits, hidden = self.assistant.step(token, hidden)
            token = logits.argmax(-1)
            expected.append(token)
        self.assertEqual(tokens.tolist(), torch.stack(expected, 1).tolist())
        self.assertEqual(len(self.assistant.seen), STEPS)
        # As organize_draft_results describes a tree of one branch.
        self.assertEqual(parents.tolist(), [list(range(-1, STEPS - 1))] * 5)
        self.assertEqual(scores.tolist(), [list(range(STEPS))] * 5)

    def test_no_probabilities_of_the_vocabulary(self):
        refused = mock.Mock(side_effect=AssertionError("a softmax over the vocabulary"))
        with (
            mock.patch.object(torch, "softmax", refused),
            mock.patch.object(frozen_kv_mtp_worker_v2, "fast_topk", refused),
        ):
            draft(self.assistant, self.bonus_tokens, self.hidden.clone())


if __name__ == "__main__":
    unittest.main()
