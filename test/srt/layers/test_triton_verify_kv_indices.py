"""The KV slots that a CUDA graph's verify reads are listed once a request."""

import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from triton_verify import CONTEXT, DRAFT_TOKENS, VerifyCase  # isort: skip

import torch

from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=30, suite="base-a-test-cpu")


class TestKVIndices(VerifyCase):
    def test_longest_requests(self):
        """All requests may be as long as their rows, and a row is not kept twice."""
        backend = self.backend()
        width = CONTEXT + DRAFT_TOKENS
        self.assertEqual(backend.cuda_graph_kv_indices.numel(), 3 * width)
        for seq_lens in ([width, width, width], [1, width, CONTEXT], [7, 1, 3]):
            batch = self.batch(backend, seq_lens=seq_lens)
            metadata = self.replayed(backend, batch)
            rows = [
                self.req_to_token[request, :length]
                for request, length in zip(batch.req_pool_indices, seq_lens)
            ]
            expected = torch.cat(rows).long()
            found = metadata.kv_indices[: len(expected)]
            self.assertTrue(torch.equal(found, expected), seq_lens)
            self.assertEqual(metadata.kv_indptr.diff().tolist(), seq_lens)


if __name__ == "__main__":
    unittest.main()
