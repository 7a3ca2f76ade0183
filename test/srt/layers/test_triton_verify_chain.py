"""Verifying drafts of one branch with the Triton backend, without a mask.

A draft of one branch is verified causally, which is what the kernel does without a mask.
The answers are compared with float64 attention, and the buffer that a CUDA graph keeps
with what its readers need. The kernels run in Triton's interpreter.
"""

import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from triton_verify import (  # isort: skip
    CONTEXT,
    DRAFT_TOKENS,
    HEAD_DIM,
    NUM_KV_HEADS,
    SEQ_LENS,
    WINDOW,
    VerifyCase,
)

import torch

from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=60, suite="base-a-test-cpu")

NUM_HEADS = 4


def chain_mask() -> torch.Tensor:
    """The mask of `build_tree_kernel_efficient`: the prefix, then the chain."""
    chain = torch.ones(DRAFT_TOKENS, DRAFT_TOKENS, dtype=torch.bool).tril()
    rows = [torch.ones(DRAFT_TOKENS, length).bool() for length in SEQ_LENS]
    return torch.cat([torch.cat([row, chain], 1).flatten() for row in rows])


class TestAnswers(VerifyCase):
    def attention(self, backend, batch, window, attn_type=AttentionType.DECODER):
        """Answers of one layer, and float64's."""
        layer = RadixAttention(
            NUM_HEADS,
            HEAD_DIM,
            HEAD_DIM**-0.5,
            NUM_KV_HEADS,
            layer_id=0,
            sliding_window_size=window,
            attn_type=attn_type,
        )
        num_tokens = len(SEQ_LENS) * DRAFT_TOKENS
        q = torch.randn(num_tokens, NUM_HEADS * HEAD_DIM)
        k, v = torch.randn(2, num_tokens, NUM_KV_HEADS, HEAD_DIM)
        out = backend.forward_extend(q, k, v, layer, batch, save_kv_cache=False)

        expected = []
        for i, length in enumerate(SEQ_LENS):
            slots = self.req_to_token[batch.req_pool_indices[i], :length].long()
            rows = slice(i * DRAFT_TOKENS, (i + 1) * DRAFT_TOKENS)
            keys = torch.cat([self.pool.k_buffer[0][slots], k[rows]])[:, 0].double()
            values = torch.cat([self.pool.v_buffer[0][slots], v[rows]])[:, 0].double()
            queries = q[rows].view(DRAFT_TOKENS, NUM_HEADS, HEAD_DIM).double()
            scores = torch.einsum("qhd,kd->hqk", queries, keys) * HEAD_DIM**-0.5
            behind = length + torch.arange(DRAFT_TOKENS)[:, None]
            behind = behind - torch.arange(length + DRAFT_TOKENS)
            seen = behind >= 0
            if window is not None and window >= 0:
                seen &= behind <= window
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            expected.append(torch.einsum("hqk,kd->qhd", weights, values).flatten(1))
        return out.double(), torch.cat(expected)

    def check(self, backend, batch, **kwargs):
        for window in (-1, WINDOW):
            with self.subTest(window=window, **kwargs):
                found, expected = self.attention(backend, batch, window, **kwargs)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    def test_graph(self):
        for mask in (None, chain_mask()):
            backend = self.backend()
            batch = self.batch(backend, mask)
            backend.forward_metadata = self.replayed(backend, batch)
            self.assertIsNone(backend.forward_metadata.custom_mask)
            self.check(backend, batch)

    def test_eager(self):
        for mask in (None, chain_mask()):
            backend = self.backend()
            batch = self.batch(backend, mask)
            backend.init_forward_metadata(batch)
            self.assertIsNone(backend.forward_metadata.custom_mask)
            self.check(backend, batch)

    def test_layers_that_prefill_both_ways(self):
        """A server without chunks and graphs lets a prompt's tokens see later ones."""
        argv = ["--chunked-prefill-size", "-1", "--disable-cuda-graph"]
        backend = self.backend(1, *argv)
        self.assertTrue(backend.allow_bidirectional_attention_in_extend)
        batch = self.batch(backend, chain_mask())
        backend.init_forward_metadata(batch)
        found, expected = self.attention(
            backend, batch, -1, attn_type=AttentionType.DECODER_BIDIRECTIONAL
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    def test_branches_read_their_mask(self):
        backend = self.backend(topk=2)
        mask = chain_mask()
        metadata = self.replayed(backend, self.batch(backend, mask))
        read = metadata.custom_mask[: mask.numel()].bool()
        self.assertTrue(torch.equal(read, mask))


class TestBuffers(VerifyCase):
    def test_mask(self):
        """A mask over the context is kept for branches alone."""
        bs = len(SEQ_LENS)
        chain, branches = self.backend(), self.backend(topk=2)
        self.assertEqual(
            branches.verify_mask.buffer.numel(),
            bs * DRAFT_TOKENS * (CONTEXT + DRAFT_TOKENS),
        )
        self.assertEqual(chain.verify_mask.buffer.numel(), bs * DRAFT_TOKENS**2)
        self.assertFalse(chain.verify_mask.is_read)


if __name__ == "__main__":
    unittest.main()
