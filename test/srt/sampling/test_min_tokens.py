"""`min_tokens` holds back every token that would end an answer, until it has as many
tokens, retracted or drafted, and no longer; where a grammar is complete it ends."""

import unittest
from types import SimpleNamespace

import torch

from sglang.srt.sampling.penaltylib import (
    BatchedMinNewTokensPenalizer,
    BatchedPenalizerOrchestrator,
)
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")

VOCAB = 24
# What ends an answer: by the generation config, by the request, and by the tokenizer.
EOS, STOP, MORE, ONE = {1, 6, 5}, {11}, {13}, 2
ENDS = EOS | STOP | MORE | {ONE}


def request(minimum, tokens=0):
    return SimpleNamespace(
        sampling_params=SimpleNamespace(min_new_tokens=minimum, stop_token_ids=STOP),
        eos_token_ids=EOS,
        tokenizer=SimpleNamespace(additional_stop_token_ids=MORE, eos_token_id=ONE),
        output_ids=[0] * tokens,
    )


class Batch:
    """Requests and their penalties, as the scheduler keeps them."""

    def __init__(self, *reqs):
        self.reqs, self.device = list(reqs), "cpu"
        self.penalties = BatchedPenalizerOrchestrator(
            VOCAB, self, {BatchedMinNewTokensPenalizer}
        )

    def logits(self, allowed=range(VOCAB)):
        """Of each request, ends likeliest; of the tokens that a grammar allows."""
        logits = torch.zeros(len(self.reqs), VOCAB)
        logits[:, sorted(ENDS)] = 50.0
        self.penalties.apply(logits)
        forbidden = [i for i in range(VOCAB) if i not in allowed]
        logits[:, forbidden] = float("-inf")
        return logits

    def may_end(self):
        """Of each request; all of the ends are held back, or none is."""
        rows = torch.softmax(self.logits() / 0.01, dim=-1)[:, sorted(ENDS)] > 0
        assert all(row.all() or not row.any() for row in rows), rows
        return [bool(row.all()) for row in rows]


class TestMinTokens(CustomTestCase):
    def decode(self, batch, counts, steps):
        """Whether each request may end, in turn, and how many tokens it has then."""
        for _ in range(steps):
            tokens = [len(req.output_ids) for req in batch.reqs]
            for req, may_end, n in zip(batch.reqs, batch.may_end(), tokens):
                self.assertEqual(may_end, n >= req.sampling_params.min_new_tokens)
            # The scheduler counts a step's tokens as it prepares the next one.
            for req, count in zip(batch.reqs, counts):
                req.output_ids += [0] * count
            if batch.penalties.is_required:
                batch.penalties.cumulate_output_tokens(None)

    def test_every_end(self):
        self.decode(Batch(request(4), request(0), request(1)), [1, 1, 1], 6)

    def test_retracted(self):
        self.decode(Batch(request(5, tokens=3), request(5, tokens=7)), [1, 1], 4)

    def test_drafted(self):
        self.decode(Batch(request(9), request(3)), [3, 2], 5)

    def test_result_under_way(self):
        """The overlap scheduler prepares a step before it knows the last one's."""
        batch = Batch(request(3))
        held = []
        for _ in range(5):
            held.append(not batch.may_end()[0])
            batch.penalties.cumulate_output_tokens(None)
            batch.reqs[0].output_ids += [0]
        self.assertEqual(held, [True, True, True, False, False])

    def test_merged_and_filtered(self):
        batch, other = Batch(request(3, tokens=1)), Batch(request(2, tokens=1))
        batch.penalties.merge(other.penalties)
        batch.reqs += other.reqs
        self.decode(batch, [1, 1], 2)
        batch.reqs = batch.reqs[1:]
        batch.penalties.filter(torch.tensor([1]))
        self.decode(batch, [1], 2)

    def test_complete_grammar(self):
        batch = Batch(request(4))
        for temperature in (1.0, 1e-6):
            logits = batch.logits(allowed=EOS) / temperature
            probabilities = torch.softmax(logits, dim=-1)
            self.assertFalse(probabilities.isnan().any())
            self.assertIn(logits.argmax().item(), EOS)
        # A text that may still go on does.
        self.assertEqual(batch.logits(allowed=EOS | {9}).argmax().item(), 9)


if __name__ == "__main__":
    unittest.main()
