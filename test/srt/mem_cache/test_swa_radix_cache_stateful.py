"""Property test of the SWA radix cache under the scheduler's own code, on a CPU.

The scheduler, the prefill adder, the schedule batches, the SWA radix cache, the
allocator and both KV pools are the real ones. Only the forward pass is replaced: it
writes into every slot it is given the id of the token sequence that ends there, and
reads back every slot that attention would read. A slot that was freed too early, or
that another request wrote to, then holds the id of another sequence.

Steps of MTP are among them, one after the other (spec v1), and with slots allocated
ahead while the result of the last step is not processed yet (spec v2).

After each step every slot is either free or held by exactly one owner, and each
running request still holds its whole prompt and its whole sliding window. At the end
nothing is held but by the tree, and evicting the tree fills both pools again.
"""

import hashlib
import logging
import os
import sys
from collections import deque
from types import SimpleNamespace
from typing import Dict, List
from unittest.mock import patch

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import pytest
import torch
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.environ import envs
from sglang.srt.managers import scheduler as scheduler_module
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.overlap_utils import FutureMap
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.schedule_policy import SchedulePolicy
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.mem_cache import allocator as allocator_module
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import alloc_token_slots
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool, SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.swa_radix_cache import SWARadixCache
from sglang.srt.mem_cache.unified_cache_components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.srt.speculative.eagle_info import EagleDraftInput
from sglang.srt.speculative.eagle_info_v2 import assign_extend_cache_locs_func
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")

DRAFT_TOKENS = 4
MAX_REQS = 6
CONTEXT_LEN = 160
FULL_LAYER, SWA_LAYER = SimpleNamespace(layer_id=1), SimpleNamespace(layer_id=0)


class SequenceIds:
    """Numbers token sequences, so that one float32 names all tokens up to a slot's."""

    def __init__(self):
        self.ids: Dict[bytes, int] = {}

    def prefixes(self, tokens: List[int]) -> torch.Tensor:
        """Returns the ids of tokens[:1], tokens[:2], …, float32, [len(tokens)]."""
        digest, out = hashlib.sha1(), []
        for token in tokens:
            digest.update(token.to_bytes(4, "little"))
            out.append(self.ids.setdefault(digest.digest(), len(self.ids) + 1))
        assert len(self.ids) < 2**24  # float32 holds them exactly
        return torch.tensor(out, dtype=torch.float32)

    @staticmethod
    def next_token(tokens: List[int]) -> int:
        """A fixed function, so that equal requests give equal outputs."""
        return hashlib.sha1(bytes(tokens)).digest()[0] % 3


class CPUScheduler(Scheduler):
    """The scheduler without its processes: a forward pass writes and checks ids."""

    def __init__(
        self, *, page_size, window, full_size, swa_size, chunk, mixed, overlap, mtp
    ):
        self.server_args = ServerArgs(
            model_path="dummy",
            device="cpu",
            page_size=page_size,
            attention_backend="torch_native",
            chunked_prefill_size=chunk,
            max_running_requests=MAX_REQS,
            pp_max_micro_batch_size=MAX_REQS,
            swa_full_tokens_ratio=swa_size / full_size,
        )
        if mtp:
            self.server_args.speculative_algorithm = "FROZEN_KV_MTP"
            self.server_args.speculative_num_steps = DRAFT_TOKENS - 1
            self.server_args.speculative_eagle_topk = 1
            self.server_args.speculative_num_draft_tokens = DRAFT_TOKENS
        set_global_server_args_for_scheduler(self.server_args)

        self.spec_algorithm = SpeculativeAlgorithm.from_string(
            self.server_args.speculative_algorithm
        )
        self.model_config = SimpleNamespace(
            vocab_size=16,
            context_len=CONTEXT_LEN,
            is_encoder_decoder=False,
            is_matryoshka=False,
            think_end_id=None,
        )
        self.page_size = page_size
        self.window = window
        # As wide as a server's, which drafts beyond the context's end.
        self.req_to_token_pool = ReqToTokenPool(
            MAX_REQS, CONTEXT_LEN + 4 + DRAFT_TOKENS, "cpu", enable_memory_saver=False
        )
        self.kv_pool = SWAKVPool(
            size=full_size,
            size_swa=swa_size,
            page_size=page_size,
            dtype=torch.float32,
            head_num=1,
            head_dim=1,
            swa_attention_layer_ids=[SWA_LAYER.layer_id],
            full_attention_layer_ids=[FULL_LAYER.layer_id],
            enable_kvcache_transpose=False,
            device="cpu",
        )
        self.token_to_kv_pool_allocator = SWATokenToKVPoolAllocator(
            full_size, swa_size, page_size, torch.float32, "cpu", self.kv_pool, False
        )
        self.tree_cache = SWARadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.req_to_token_pool,
                token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
                page_size=page_size,
                is_eagle=self.spec_algorithm.is_eagle(),
                sliding_window_size=window,
            )
        )
        self.full_tokens_per_layer = full_size
        self.swa_tokens_per_layer = swa_size
        self.max_total_num_tokens = full_size
        self.max_running_requests = MAX_REQS
        self.max_req_len = CONTEXT_LEN
        self.max_prefill_tokens = 4 * CONTEXT_LEN
        self.chunked_prefill_size = chunk
        self.is_mixed_chunk = mixed
        self.enable_overlap = overlap
        self.model_worker = SimpleNamespace(on_verify_complete_cpu=lambda drafts: None)
        self.future_map = FutureMap(
            MAX_REQS, chunk, CONTEXT_LEN, "cpu", self.spec_algorithm
        )
        self.policy = SchedulePolicy("fcfs", self.tree_cache, False, False, False)

        self.waiting_queue: List[Req] = []
        self.running_batch = ScheduleBatch(reqs=[], batch_is_full=False)
        self.last_batch = self.cur_batch = self.chunked_req = None
        self._chunked_req_scheduled_last_iter = False
        self.result_queue = deque()
        # Low, so that more requests are admitted than fit, and some are retracted.
        self.new_token_ratio = self.init_new_token_ratio = self.min_new_token_ratio = 0
        self.new_token_ratio_decay = 0
        self.max_prefill_bs = self.forward_ct = self.forward_ct_decode = 0
        self.num_generated_tokens = self.num_retracted_reqs = 0
        self.is_generation = self.is_hybrid_swa = True
        self.is_hybrid_ssm = self.enable_hisparse = self.enable_lora = False
        self.enable_hierarchical_cache = self.enable_hicache_storage = False
        self.enable_priority_scheduling = self.enable_priority_preemption = False
        self.priority_scheduling_preemption_threshold = 0
        self.enable_dynamic_chunking = self.enable_metrics = self.enable_fpm = False
        self.enable_overlap_mlx = self.require_mlp_sync = False
        self.use_ngram_embedding = False
        self.abort_on_priority_when_disabled = False
        self.truncation_align_size = self.dllm_config = self.prefill_delayer = None
        self.max_queued_requests = None
        self.disaggregation_mode = DisaggregationMode.NULL
        self.grammar_manager = SimpleNamespace(
            has_waiting_grammars=lambda: False, abort_requests=lambda req: None
        )
        self.send_to_tokenizer = SimpleNamespace(send_output=lambda *args: None)
        self.session_controller = SimpleNamespace(sessions={})

        self.sequences = SequenceIds()
        self.tokens: Dict[str, List[int]] = {}  # rid -> all tokens, sampled ones too
        self.retracted = 0

    # What only reports, or talks to other processes.
    def stream_output(self, *args, **kwargs):
        pass

    def report_prefill_stats(self, *args, **kwargs):
        pass

    def report_decode_stats(self, *args, **kwargs):
        pass

    def update_spec_metrics(self, *args, **kwargs):
        pass

    def maybe_prepare_mlp_sync_batch(self, batch, need_sync=None):
        return batch

    def _prefetch_kvcache(self, req):
        pass

    def _add_request_to_queue(self, req, is_retracted=False):
        self.retracted += is_retracted
        super()._add_request_to_queue(req, is_retracted)

    def add_request(self, rid: str, prompt: List[int], max_new_tokens: int):
        params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
        params.normalize(None)
        req = Req(rid, "", prompt, params, vocab_size=self.model_config.vocab_size)
        self._add_request_to_queue(req)

    def step(self) -> bool:
        """One turn of the event loop. Returns whether a batch ran."""
        batch = self.get_next_batch_to_run()
        self.cur_batch = batch
        if not self.enable_overlap:
            if batch:
                self.process(batch, self.forward(batch))
        else:
            consecutive_prefill = self.is_disable_overlap_for_batch(batch)
            if consecutive_prefill:
                self.process(*self.result_queue.popleft())
            if batch:
                result = self.forward(batch)
                self.result_queue.append((batch.copy(), result))
            if self.last_batch and not consecutive_prefill:
                self.process(*self.result_queue.popleft())
        self.last_batch = batch
        return batch is not None

    def process(self, batch: ScheduleBatch, result: GenerationBatchResult):
        if batch.forward_mode.is_decode():
            self.process_batch_result_decode(batch, result)
        else:
            self.process_batch_result_prefill(batch, result)

    def forward(self, batch: ScheduleBatch) -> GenerationBatchResult:
        self.forward_ct += 1
        if batch.is_spec_v2:
            return self.forward_spec_v2(batch)
        if batch.forward_mode.is_decode() and not batch.spec_algorithm.is_none():
            return self.verify(batch)
        return self.forward_target(batch)

    def forward_target(self, batch: ScheduleBatch) -> GenerationBatchResult:
        decoding = batch.reqs if batch.forward_mode.is_decode() else batch.decoding_reqs
        lens = [1] * len(batch.reqs)
        if batch.forward_mode.is_extend():
            lens = batch.extend_lens
        next_tokens, offset = [], 0
        for req, num_new, seq_len in zip(batch.reqs, lens, batch.seq_lens_cpu.tolist()):
            if not decoding or req not in decoding:
                self.tokens[req.rid] = list(req.fill_ids)
            tokens = self.tokens[req.rid][:seq_len]
            assert len(tokens) == seq_len
            locs = batch.out_cache_loc[offset : offset + num_new]
            offset += num_new
            self.attend(req, tokens, locs)
            next_tokens.append(self.sequences.next_token(tokens))
            del self.tokens[req.rid][seq_len:]
            self.tokens[req.rid].append(next_tokens[-1])
        assert offset == len(batch.out_cache_loc)
        batch.output_ids = torch.tensor(next_tokens)
        return GenerationBatchResult(next_token_ids=torch.tensor(next_tokens))

    def verify(self, batch: ScheduleBatch) -> GenerationBatchResult:
        """A step of FROZEN_KV_MTP: its memory operations, drafts that are half right."""
        batch.maybe_evict_swa()
        for req in batch.reqs:
            req.decode_batch_idx += 1
        out_cache_loc = alloc_token_slots(
            batch.tree_cache, len(batch.reqs) * DRAFT_TOKENS
        ).view(-1, DRAFT_TOKENS)
        for req, locs, seq_len in zip(
            batch.reqs, out_cache_loc, batch.seq_lens_cpu.tolist()
        ):
            self.req_to_token_pool.write(
                (req.req_pool_idx, slice(seq_len, seq_len + DRAFT_TOKENS)),
                locs.to(torch.int32),
            )
        accepted_lens, rejected = [], []
        for req, locs, seq_len in zip(
            batch.reqs, out_cache_loc, batch.seq_lens_cpu.tolist()
        ):
            tokens = req.origin_input_ids + req.output_ids
            assert len(tokens) == seq_len + 1
            num_accepted = 0
            for token in self.draft_and_verify(req, tokens, locs):
                req.output_ids.append(token)
                num_accepted += 1
                req.check_finished()
                if req.finished():
                    break
            req.kv_committed_len += num_accepted
            req.kv_allocated_len = req.kv_committed_len
            accepted_lens.append(num_accepted)
            rejected.append(locs[num_accepted:])
        self.token_to_kv_pool_allocator.free(torch.cat(rejected))
        accepted = torch.tensor(accepted_lens)
        batch.seq_lens.add_(accepted)
        batch.seq_lens_cpu.add_(accepted)
        batch.orig_seq_lens.add_(accepted.to(torch.int32))
        return GenerationBatchResult(next_token_ids=None)

    def draft_and_verify(
        self, req: Req, tokens: List[int], locs: torch.Tensor
    ) -> List[int]:
        """Returns the tokens a step accepts, of drafts that are half right."""
        num_right = len(tokens) % DRAFT_TOKENS  # of DRAFT_TOKENS - 1 drafts
        drafts = list(tokens)
        for i in range(DRAFT_TOKENS - 1):
            right = self.sequences.next_token(drafts)
            drafts.append(right if i < num_right else right + 3)
        self.attend(req, drafts, locs)
        bonus = self.sequences.next_token(drafts[: len(tokens) + num_right])
        return drafts[len(tokens) :][:num_right] + [bonus]

    def forward_spec_v2(self, batch: ScheduleBatch) -> GenerationBatchResult:
        """A step of spec v2: the host does not know yet what the last one accepted."""
        future_indices = self.future_map.alloc_future_indices(len(batch.reqs))
        if batch.forward_mode.is_extend():
            result = self.forward_target(batch)
            bonus_tokens, new_seq_lens = result.next_token_ids, batch.seq_lens
        else:
            self.future_map.resolve_future(batch)
            assert torch.equal(batch.spec_info.new_seq_lens, batch.seq_lens)
            out_cache_loc = assign_extend_cache_locs_func(
                batch.req_pool_indices,
                self.req_to_token_pool.req_to_token,
                batch.seq_lens,
                batch.seq_lens + DRAFT_TOKENS,
                len(batch.reqs),
                DRAFT_TOKENS,
                "cpu",
            ).view(-1, DRAFT_TOKENS)
            predict = torch.zeros(len(batch.reqs), DRAFT_TOKENS, dtype=torch.int64)
            accept_lens = []
            for i, (req, locs, seq_len) in enumerate(
                zip(batch.reqs, out_cache_loc, batch.seq_lens.tolist())
            ):
                tokens = self.tokens[req.rid]
                assert len(tokens) == seq_len + 1
                assert tokens[-1] == batch.spec_info.bonus_tokens[i]
                accepted = self.draft_and_verify(req, tokens, locs)
                tokens += accepted
                predict[i, : len(accepted)] = torch.tensor(accepted)
                accept_lens.append(len(accepted))
            accept_lens = torch.tensor(accept_lens)
            result = GenerationBatchResult(
                next_token_ids=predict.flatten(),
                accept_lens=accept_lens,
                speculative_num_draft_tokens=DRAFT_TOKENS,
            )
            last = accept_lens[:, None] - 1
            bonus_tokens = predict.gather(1, last)[:, 0]
            new_seq_lens = batch.seq_lens + accept_lens
        nothing = torch.empty(len(batch.reqs), 0)
        result.next_draft_input = EagleDraftInput(
            bonus_tokens=bonus_tokens,
            new_seq_lens=new_seq_lens,
            topk_p=nothing,
            topk_index=nothing,
        )
        self.future_map.store_to_map(future_indices, result)
        batch.spec_info = result.next_draft_input
        batch.spec_info.future_indices = future_indices
        batch.seq_lens = new_seq_lens
        return result

    def attend(self, req: Req, tokens: List[int], locs: torch.Tensor):
        """Write the ids of the last len(locs) tokens, read all that attention reads."""
        ids = self.sequences.prefixes(tokens)
        row = self.row(req, len(tokens))
        first = len(tokens) - len(locs)
        assert torch.equal(row[first:], locs), "the request's row misses its new slots"
        value = ids[first:].view(-1, 1, 1)
        for layer in (FULL_LAYER, SWA_LAYER):
            self.kv_pool.set_kv_buffer(layer, locs, value, value)

        full = self.kv_pool.get_key_buffer(FULL_LAYER.layer_id)[row].view(-1)
        assert torch.equal(full, ids), f"{req.rid}: a full slot was overwritten"
        start = max(0, first - self.window)
        swa_locs = self.kv_pool.translate_loc_from_full_to_swa(row[start:])
        assert (swa_locs > 0).all(), f"{req.rid}: its window lost a slot"
        swa = self.kv_pool.get_key_buffer(SWA_LAYER.layer_id)[swa_locs].view(-1)
        assert torch.equal(swa, ids[start:]), f"{req.rid}: a SWA slot was overwritten"

    def row(self, req: Req, end: int, start: int = 0) -> torch.Tensor:
        row = self.req_to_token_pool.req_to_token[req.req_pool_idx, start:end]
        return row.to(torch.int64)

    def live_requests(self) -> List[Req]:
        """All requests that hold slots."""
        reqs = list(self.running_batch.reqs)
        if self.last_batch is not None:
            reqs += self.last_batch.reqs
        for batch, _ in self.result_queue:
            reqs += batch.reqs
        if self.chunked_req is not None:
            reqs.append(self.chunked_req)
        return list({id(r): r for r in reqs if r.req_pool_idx is not None}.values())

    def swa_held(self) -> int:
        """SWA slots that are neither free nor evictable."""
        allocator = self.token_to_kv_pool_allocator
        free = allocator.swa_available_size() + self.tree_cache.swa_evictable_size()
        return allocator.size_swa - free

    def has_work(self) -> bool:
        return bool(self.waiting_queue or self.result_queue or self.live_requests())

    def check_pools(self):
        allocator, page = self.token_to_kv_pool_allocator, self.page_size
        mapping = allocator.full_to_swa_index_mapping

        full_owned, swa_owned = [], []  # one tensor of slots an owner
        stack = list(self.tree_cache.root_node.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            full_owned.append(node.value)
            if node.swa_tombstone:
                assert (mapping[node.value] == 0).all(), "a tombstone holds SWA slots"
                assert node.swa_lock_ref == 0
            else:
                swa_owned.append(mapping[node.value])
            assert node.full_lock_ref >= node.swa_lock_ref >= 0

        live = self.live_requests()
        for req in live:
            end = req.kv_allocated_len
            full_owned.append(self.row(req, end, req.cache_protected_len))
            swa_start = max(req.cache_protected_len, req.swa_evicted_seqlen)
            swa_owned.append(mapping[self.row(req, end, swa_start)])

        for name, owned, sub, size in (
            ("full", full_owned, allocator.full_attn_allocator, allocator.size_full),
            ("swa", swa_owned, allocator.swa_attn_allocator, allocator.size_swa),
        ):
            pages = [torch.unique(x // page) for x in owned if len(x)]
            assert all((x > 0).all() for x in pages), f"{name}: slot 0 is held"
            free = torch.cat([sub.free_pages, sub.release_pages])
            everything = torch.cat([*pages, free])
            assert len(torch.unique(everything)) == len(
                everything
            ), f"{name}: a slot has two owners, or is free and held"
            assert len(everything) == size // page, f"{name}: a slot was lost"
        # A page's slots that were allocated ahead keep their entry when it is freed.
        held = torch.cat([torch.empty(0, dtype=torch.int64), *full_owned])
        mapped = mapping if page == 1 else mapping[held]
        assert torch.unique(mapped[mapped > 0]).numel() == (mapped > 0).sum()

        free_full = set(allocator.full_attn_allocator.free_pages.tolist())
        for req in live:
            committed = req.kv_committed_len
            row = self.row(req, committed)
            assert not free_full & set(
                (row // page).tolist()
            ), f"{req.rid}: a full slot it attends to is free"
            window = mapping[row[max(0, committed - self.window) :]]
            assert (window > 0).all(), f"{req.rid}: its window is not held"

    def check_idle(self):
        assert not self.has_work(), "a request never finished"
        assert self.req_to_token_pool.available_size() == MAX_REQS
        self.check_pools()
        tree, allocator = self.tree_cache, self.token_to_kv_pool_allocator
        tree.sanity_check()
        assert tree.full_protected_size() == tree.swa_protected_size() == 0
        full_size, swa_size = allocator.size_full, allocator.size_swa
        assert allocator.full_available_size() + tree.full_evictable_size() == full_size
        assert allocator.swa_available_size() + tree.swa_evictable_size() == swa_size
        tree.evict(EvictParams(num_tokens=full_size, swa_num_tokens=swa_size))
        assert not tree.root_node.children
        assert allocator.full_available_size() == full_size
        assert allocator.swa_available_size() == swa_size


class SWARadixCacheMachine(RuleBasedStateMachine):
    page_sizes = (1,)

    @initialize(
        data=st.data(),
        window=st.integers(3, 12),
        chunk=st.sampled_from([8, 16, 32]),
        interval=st.sampled_from([0.125, 1.0]),
        split=st.sampled_from([True, True, False]),
        release=st.booleans(),
        mode=st.sampled_from(
            ["plain", "overlap", "mixed", "overlap-mixed", "mtp", "overlap-mtp"]
        ),
    )
    def start(self, data, window, chunk, interval, split, release, mode):
        page_size = data.draw(st.sampled_from(self.page_sizes))
        if page_size > 1 and mode == "mtp":
            mode = "overlap-mtp"
        self.overrides = [
            envs.SGLANG_OPT_SWA_SPLIT_LEAF_ON_INSERT.override(split),
            envs.SGLANG_OPT_SWA_RELEASE_LEAF_LOCK_AFTER_WINDOW.override(release),
            envs.SGLANG_SWA_EVICTION_INTERVAL_MULTIPLIER.override(interval),
        ]
        for override in self.overrides:
            override.__enter__()
        # One chunk in flight, one to be allocated, and some windows beside them.
        swa_size = 2 * chunk + data.draw(st.integers(2, 8)) * (window + 2 * page_size)
        full_size = max(swa_size, CONTEXT_LEN) + data.draw(st.integers(0, 2)) * 64
        self.scheduler = CPUScheduler(
            page_size=page_size,
            window=window,
            full_size=full_size // page_size * page_size,
            swa_size=swa_size // page_size * page_size,
            chunk=chunk,
            mixed="mixed" in mode,
            overlap="overlap" in mode,
            mtp="mtp" in mode,
        )
        self.prompts: List[List[int]] = []
        self.num_requests = 0
        event(f"mode {mode}")

    @rule(
        data=st.data(),
        tail=st.lists(st.integers(0, 2), min_size=1, max_size=40),
        max_new_tokens=st.integers(1, 50),
    )
    def add(self, data, tail, max_new_tokens):
        prompt = list(tail)
        if self.prompts and data.draw(st.integers(0, 3)):
            # Share a prefix, go on with an earlier answer, or repeat a prompt.
            base = data.draw(st.sampled_from(self.prompts))
            kept = data.draw(st.integers(0, len(base)))
            prompt = base[:kept] + data.draw(st.sampled_from([[], prompt]))
        prompt = (prompt or [0])[: CONTEXT_LEN - 60]
        self.num_requests += 1
        self.scheduler.add_request(f"{self.num_requests}.", prompt, max_new_tokens)
        answer = list(prompt)
        for _ in range(max_new_tokens):
            answer.append(SequenceIds.next_token(answer))
        self.prompts += [prompt, answer]

    @rule(steps=st.integers(1, 12))
    def run(self, steps):
        for _ in range(steps):
            self.scheduler.step()
            self.scheduler.check_pools()

    @precondition(lambda self: self.num_requests)
    @rule(data=st.data())
    def abort(self, data):
        number = data.draw(st.integers(1, self.num_requests))
        self.scheduler.abort_request(AbortReq(rid=f"{number}."))
        self.scheduler.check_pools()

    @rule(full=st.integers(0, 40), swa=st.integers(0, 40))
    def evict(self, full, swa):
        self.scheduler.tree_cache.evict(
            EvictParams(num_tokens=full, swa_num_tokens=swa)
        )
        self.scheduler.check_pools()

    @rule()
    def retract(self):
        """A step that decodes, and retracts as if the pools were full."""
        with (
            patch.object(scheduler_module, "TEST_RETRACT", True),
            patch.object(scheduler_module, "TEST_RETRACT_INTERVAL", 1),
            patch.object(scheduler_module, "TEST_RETRACT_NO_PREFILL_BS", 0),
        ):
            self.scheduler.step()
        self.scheduler.check_pools()

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        try:
            for _ in range(4000):
                ran = self.scheduler.step()
                self.scheduler.check_pools()
                if not ran and not self.scheduler.has_work():
                    break
            self.scheduler.check_idle()
            event(f"retracted: {self.scheduler.retracted > 0}")
        finally:
            for override in reversed(self.overrides):
                override.__exit__(None, None, None)


class PagedSWARadixCacheMachine(SWARadixCacheMachine):
    page_sizes = (2, 4)


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def small_scheduler() -> CPUScheduler:
    """With a window of 4, and requests one step at a time."""
    return CPUScheduler(
        page_size=1,
        window=4,
        full_size=CONTEXT_LEN,
        swa_size=64,
        chunk=32,
        mixed=False,
        overlap=False,
        mtp=False,
    )


def test_revived_tombstone_keeps_full_slots_of_a_running_request():
    """A prompt computed again may bring SWA slots back, not replace the full ones."""
    scheduler = small_scheduler()
    tree, prompt = scheduler.tree_cache, [0, 1, 2] * 8
    with envs.SGLANG_OPT_SWA_SPLIT_LEAF_ON_INSERT.override(True):
        scheduler.add_request("first.", prompt, 30)
        scheduler.step()
        # The window of 4 is locked, the SWA slots of the 20 tokens before it are not.
        tree.evict(EvictParams(num_tokens=0, swa_num_tokens=20))
        head = next(iter(tree.root_node.children.values()))
        assert head.swa_tombstone and head.full_lock_ref == 1
        slots = head.value.clone()

        scheduler.add_request("second.", prompt[:10] + [5, 5, 5], 30)
        scheduler.step()
        head = next(iter(tree.root_node.children.values()))
        assert len(head.value) == 10 and not head.swa_tombstone
        assert torch.equal(head.value, slots[:10])
        while scheduler.step():
            scheduler.check_pools()
        scheduler.check_idle()


def test_unified_tree_keeps_full_slots_of_a_running_request():
    """The same in the tree of SGLANG_ENABLE_UNIFIED_RADIX_TREE."""
    scheduler = small_scheduler()
    allocator = scheduler.token_to_kv_pool_allocator
    tree = UnifiedRadixCache(
        CacheInitParams(
            disable=False,
            req_to_token_pool=scheduler.req_to_token_pool,
            token_to_kv_pool_allocator=allocator,
            page_size=1,
            sliding_window_size=scheduler.tree_cache.sliding_window_size,
            tree_components=(ComponentType.FULL, ComponentType.SWA),
        )
    )
    scheduler.tree_cache = scheduler.policy.tree_cache = tree
    prompt = [0, 1, 2] * 8
    # A node that ends before the window of the request which holds it.
    scheduler.add_request("0.", prompt[:10], 1)
    while scheduler.step():
        pass
    scheduler.add_request("first.", prompt, 30)
    scheduler.step()
    (first,) = scheduler.live_requests()
    evicted = tree.evict(EvictParams(num_tokens=0, swa_num_tokens=20))
    assert evicted.swa_num_tokens_evicted == 10
    scheduler.add_request("second.", prompt[:10] + [5, 5, 5], 30)
    while scheduler.step():
        if first.req_pool_idx is not None:
            free = allocator.full_attn_allocator.free_pages
            assert not torch.isin(scheduler.row(first, 10), free).any()


@pytest.mark.parametrize(
    "mtp, overlap",
    [(False, False), (True, False), (True, True)],
    ids=["plain", "mtp", "overlap-mtp"],
)
@pytest.mark.parametrize("window", [3, 7, 32])
def test_window_is_released(window, mtp, overlap):
    """The finer interval counts tokens, also where a step of MTP accepts several."""
    scheduler = CPUScheduler(
        page_size=1,
        window=window,
        full_size=2 * CONTEXT_LEN,
        swa_size=2 * CONTEXT_LEN,
        chunk=64,
        mixed=False,
        overlap=overlap,
        mtp=mtp,
    )
    prompt, held = [0, 1, 2] * 15, []
    with (
        envs.SGLANG_OPT_SWA_SPLIT_LEAF_ON_INSERT.override(True),
        envs.SGLANG_SWA_EVICTION_INTERVAL_MULTIPLIER.override(0.125),
    ):
        scheduler.add_request("1.", prompt, 100)
        while scheduler.step():
            scheduler.check_pools()
            if (
                scheduler.live_requests()
                and scheduler.last_batch.forward_mode.is_decode()
            ):
                held.append(scheduler.swa_held())
        scheduler.check_idle()
    interval = max(1, window // 8)
    # The prompt's window, the answer's, the page between, and what is not due yet.
    bound = window + window + 1 + interval + (DRAFT_TOKENS if mtp else 0)
    if overlap:
        # Slots of two steps ahead, and tokens that the host does not know yet.
        bound += 2 * DRAFT_TOKENS
    assert bound - 2 * DRAFT_TOKENS <= max(held) <= bound


@pytest.mark.hypothesis
def test_swa_radix_cache_stateful():
    run_state_machine_as_test(
        SWARadixCacheMachine, settings=settings(stateful_step_count=30)
    )


class TorchKernel:
    """Stands in for a Triton kernel of the allocator, which needs a GPU."""

    def __init__(self, run):
        self.run = run

    def __getitem__(self, grid):
        return self.run


def alloc_extend(pre_lens, seq_lens, last_loc, free_pages, out, bs_upper, page_size):
    allocator_module.alloc_extend_naive(
        pre_lens, seq_lens, last_loc, free_pages, out, page_size, "cpu"
    )


def alloc_decode(seq_lens, last_loc, free_pages, out, bs_upper, page_size):
    alloc_extend(seq_lens - 1, seq_lens, last_loc, free_pages, out, bs_upper, page_size)


@pytest.mark.hypothesis
def test_swa_radix_cache_stateful_paged(monkeypatch):
    """Pages of several slots, with the allocator's own path for want of Triton."""
    monkeypatch.setattr(
        allocator_module, "alloc_extend_kernel", TorchKernel(alloc_extend)
    )
    monkeypatch.setattr(
        allocator_module, "alloc_decode_kernel", TorchKernel(alloc_decode)
    )
    run_state_machine_as_test(
        PagedSWARadixCacheMachine,
        settings=settings(
            stateful_step_count=30,
            max_examples=max(settings().max_examples // 4, 1),
        ),
    )


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
