"""A request's row of req_to_token holds what a decode step reserves at the context's end."""

import os
import unittest
from types import SimpleNamespace

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import torch

from sglang.srt.mem_cache.allocation_sizing import get_req_to_token_extra_context_len
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.runtime_context import get_context
from sglang.srt.speculative.eagle_utils import eagle_prepare_for_decode
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

CONTEXT_LEN = 64
# The scheduler ends a request at CONTEXT_LEN - 2 tokens. One that still runs has one
# token fewer, and the KV of its last token is not written yet.
COMMITTED = CONTEXT_LEN - 4


class TestReqToTokenRow(CustomTestCase):
    def prepare_at_the_end(self, page_size: int):
        """Prepare a decode step of two requests, the first of them at the context's end.

        Returns the rows' slots, [2, row width], and the requests' allocated lengths.
        """
        pool = ReqToTokenPool(
            2, CONTEXT_LEN + get_req_to_token_extra_context_len(), "cpu", False
        )
        if page_size == 1:
            allocator = TokenToKVPoolAllocator(1024, torch.int8, "cpu", None, False)
        else:
            allocator = PagedTokenToKVPoolAllocator(
                1024, page_size, torch.int8, "cpu", None, False
            )
        reqs = [
            SimpleNamespace(
                kv=SimpleNamespace(kv_committed_len=committed, kv_allocated_len=0),
                decode_batch_idx=0,
            )
            for committed in (COMMITTED, 8)
        ]
        tree_cache = SimpleNamespace(
            token_to_kv_pool_allocator=allocator, supports_prefix_sharing=lambda: False
        )
        batch = SimpleNamespace(
            reqs=reqs,
            req_pool_indices=torch.tensor([1, 2]),
            req_to_token_pool=pool,
            token_to_kv_pool_allocator=allocator,
            tree_cache=tree_cache,
            seq_lens_cpu=torch.tensor([COMMITTED, 8]),
            sampling_info=SimpleNamespace(
                penalizer_orchestrator=SimpleNamespace(is_required=False)
            ),
            maybe_evict_swa=lambda: None,
            hisparse_coordinator=None,
            device="cpu",
        )
        eagle_prepare_for_decode(batch)
        return pool.req_to_token[1:], [req.kv.kv_allocated_len for req in reqs]

    def test_reserve_fits(self):
        for algorithm, topk in (("FROZEN_KV_MTP", 1), ("EAGLE", 1), ("EAGLE", 8)):
            for draft_tokens in (4, 8, 12, 16, 32):
                for page_size in (1, 4):
                    config = get_context().override_server_args(
                        device="cpu",
                        attention_backend="torch_native",
                        page_size=page_size,
                        speculative_algorithm=algorithm,
                        speculative_eagle_topk=topk,
                        speculative_num_steps=3 if topk > 1 else draft_tokens - 1,
                        speculative_num_draft_tokens=draft_tokens,
                    )
                    with self.subTest(
                        algorithm=algorithm,
                        topk=topk,
                        draft_tokens=draft_tokens,
                        page_size=page_size,
                    ), config:
                        rows, allocated = self.prepare_at_the_end(page_size)
                        slots = [row[:n] for row, n in zip(rows, allocated)]
                        self.assertEqual([len(s) for s in slots], allocated)
                        slots = torch.cat(slots)
                        self.assertTrue((slots > 0).all())
                        self.assertEqual(len(torch.unique(slots)), len(slots))


if __name__ == "__main__":
    unittest.main()
