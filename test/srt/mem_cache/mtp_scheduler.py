"""The scheduler on a CPU without a model (cache_scheduler.py), with Frozen-KV MTP."""

from types import SimpleNamespace

import torch
from cache_scheduler import CacheScheduler, IdWorker

from sglang.kernels.ops.speculative.cache_locs import (
    assign_extend_cache_locs_uniform_func,
)
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.speculative.frozen_kv_mtp_worker_v2 import FrozenKVMTPDraftWorker


class MTPWorker(IdWorker):
    """Frozen-KV MTP's worker, whose drafts are half right."""

    def __init__(self, *, draft_tokens: int, **kwargs):
        super().__init__(**kwargs)
        self.draft_tokens = draft_tokens

    def on_verify_complete_cpu(self, num_correct_drafts, batch_size):
        pass

    def forward_batch_generation(
        self, batch: ScheduleBatch, on_publish=None, **kwargs
    ) -> GenerationBatchResult:
        if batch.forward_mode.is_extend():
            result = self.forward_target(batch)
            result.new_seq_lens = batch.seq_lens
            bonus_tokens = result.next_token_ids
        else:
            result, bonus_tokens = self.verify(batch)
        if on_publish is not None:
            on_publish(result.new_seq_lens)
        hidden = [
            self.sequences.prefixes(self.tokens[req.rid][:-1])[-1:]
            for req in batch.reqs
        ]
        result.next_draft_input = FrozenKVMTPDraftWorker._build_seed_draft_input(
            SimpleNamespace(topk=1), bonus_tokens, torch.stack(hidden)
        )
        return result

    def verify(self, batch: ScheduleBatch):
        """A step of MTP: all drafts are written, and what is wrong is overwritten."""
        bs, width = len(batch.reqs), self.draft_tokens
        out_cache_loc = assign_extend_cache_locs_uniform_func(
            req_pool_indices=batch.req_pool_indices,
            req_to_token=self.req_to_token,
            start_offset=batch.seq_lens,
            batch_size=bs,
            draft_token_num=width,
            device="cpu",
        ).view(bs, width)
        predict = torch.zeros(bs, width, dtype=torch.int32)
        accept_lens = torch.zeros(bs, dtype=torch.int32)
        for i, (req, row, seq_len) in enumerate(
            zip(batch.reqs, batch.req_pool_indices, batch.seq_lens.tolist())
        ):
            tokens = self.tokens[req.rid]
            assert len(tokens) == seq_len + 1, f"{req.rid}: a wrong length"
            assert batch.spec_info.bonus_tokens[i] == tokens[-1]
            ids = self.sequences.prefixes(tokens)
            assert batch.spec_info.hidden_states[i] == ids[seq_len - 1]

            num_right = len(tokens) % width  # of width - 1 drafts
            drafts = list(tokens)
            for step in range(width - 1):
                right = self.sequences.next_token(drafts)
                drafts.append(right if step < num_right else right + 3)
            self.attend(req.rid, row, drafts, out_cache_loc[i])
            accepted = drafts[seq_len + 1 :][:num_right]
            accepted.append(self.sequences.next_token(tokens + accepted))
            tokens += accepted
            predict[i, : len(accepted)] = torch.tensor(accepted)
            accept_lens[i] = len(accepted)
        result = GenerationBatchResult(
            next_token_ids=predict.flatten(),
            accept_lens=accept_lens,
            speculative_num_draft_tokens=width,
            new_seq_lens=batch.seq_lens + accept_lens,
        )
        return result, predict.gather(1, accept_lens[:, None].long() - 1)[:, 0]


class MTPScheduler(CacheScheduler):
    """With draft tokens, or without; counts the requests that are retracted."""

    def __init__(self, *, draft_tokens: int = 0, **kwargs):
        self.num_drafts, self.retracted = draft_tokens, 0
        super().__init__(**kwargs)

    def spec_args(self) -> dict:
        if not self.num_drafts:
            return super().spec_args()
        return dict(
            speculative_algorithm="FROZEN_KV_MTP",
            speculative_num_steps=self.num_drafts - 1,
            speculative_eagle_topk=1,
            speculative_num_draft_tokens=self.num_drafts,
        )

    def make_worker(self, **kwargs) -> IdWorker:
        if not self.num_drafts:
            return super().make_worker(**kwargs)
        return MTPWorker(draft_tokens=self.num_drafts, **kwargs)

    def _add_request_to_queue(self, req, is_retracted=False):
        self.retracted += is_retracted
        super()._add_request_to_queue(req, is_retracted)

    def swa_held(self) -> int:
        """SWA slots that are neither free nor evictable."""
        allocator = self.token_to_kv_pool_allocator
        free = allocator.swa_available_size() + self.tree_cache.swa_evictable_size()
        return allocator.size_swa - free
