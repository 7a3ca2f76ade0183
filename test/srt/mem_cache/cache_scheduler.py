"""The scheduler on a CPU without its processes and without a model.

The scheduler's event loop, the prefill adder, the batches, the unified radix cache, the
allocator and both KV pools are the real ones. Only the model is replaced: a forward pass
writes into every slot it is given the id of the token sequence that ends there, and reads
back every slot that attention would read. A slot that was freed too early, or that
another request wrote to, then holds the id of another sequence.
"""

import hashlib
from array import array
from collections import deque
from types import SimpleNamespace
from typing import Dict, Iterable, List, Set

import torch

from sglang.kernels.ops.speculative.cache_locs import (
    assign_extend_cache_locs_uniform_func,
)
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.dp_attn import SchedulerDPAttnAdapter
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.mem_cache.allocation_sizing import get_req_to_token_extra_context_len
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.observability.scheduler_stage_metrics import (
    SchedulerStageMetricsRecorder,
)
from sglang.srt.runtime_context import get_context, get_schedule, get_spec
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.frozen_kv_mtp_worker_v2 import FrozenKVMTPDraftWorker
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

MAX_REQS = 6
CONTEXT_LEN = 160
VOCAB_SIZE = 16
STOP_TOKEN = 6  # one of 21 tokens
FULL_LAYER, SWA_LAYER = SimpleNamespace(layer_id=1), SimpleNamespace(layer_id=0)


class Quiet:
    """Takes every call and does nothing: for what only reports or sends."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


class SequenceIds:
    """Numbers token sequences, so that one float32 names all tokens up to a slot's."""

    def __init__(self):
        self.ids: Dict[bytes, int] = {}

    def prefixes(self, tokens: Iterable[int]) -> torch.Tensor:
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
        digest = hashlib.sha1(bytes(tokens)).digest()
        return STOP_TOKEN if digest[0] < 12 else digest[1] % 3


class IdWorker:
    """In the model worker's place: writes sequence ids to the KV pools, and checks them.

    With draft tokens it is Frozen-KV MTP's worker, whose drafts are half right.
    """

    def __init__(self, *, kv_pool, req_to_token_pool, window: int, draft_tokens: int):
        self.kv_pool = kv_pool
        self.req_to_token = req_to_token_pool.req_to_token
        self.window = window
        self.draft_tokens = draft_tokens
        self.sequences = SequenceIds()
        # rid -> all tokens, with those sampled that the host may not know yet.
        self.tokens: Dict[str, List[int]] = {}

    def on_verify_complete_cpu(self, num_correct_drafts, batch_size):
        pass

    def forward_batch_generation(
        self, batch: ScheduleBatch, on_publish=None, **kwargs
    ) -> GenerationBatchResult:
        if self.draft_tokens == 0:
            return self.forward_target(batch)
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

    def forward_target(self, batch: ScheduleBatch) -> GenerationBatchResult:
        """One more token for each request, after its new tokens, or its last one."""
        extend = batch.forward_mode.is_extend()
        lens = batch.extend_lens if extend else [1] * len(batch.reqs)
        decoding = batch.decoding_reqs or [] if extend else batch.reqs
        next_tokens, offset = [], 0
        for req, row, num_new, seq_len in zip(
            batch.reqs, batch.req_pool_indices, lens, batch.seq_lens.tolist()
        ):
            if req not in decoding:
                self.tokens[req.rid] = list(req.get_fill_ids())
            tokens = self.tokens[req.rid]
            assert len(tokens) == seq_len, f"{req.rid}: a wrong length"
            new = slice(offset, offset + num_new)
            offset += num_new
            assert batch.input_ids[new].tolist() == tokens[seq_len - num_new :]
            self.attend(req.rid, row, tokens, batch.out_cache_loc[new])
            next_tokens.append(self.sequences.next_token(tokens))
            tokens.append(next_tokens[-1])
        assert offset == len(batch.out_cache_loc) == len(batch.input_ids)
        return GenerationBatchResult(next_token_ids=torch.tensor(next_tokens))

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

    def attend(self, rid: str, row: torch.Tensor, tokens: List[int], locs):
        """Write the ids of the last len(locs) tokens, read all that attention reads."""
        ids = self.sequences.prefixes(tokens)
        slots = self.req_to_token[row, : len(tokens)].to(torch.int64)
        first = len(tokens) - len(locs)
        assert torch.equal(slots[first:], locs), f"{rid}: its row misses new slots"
        swa_locs = self.kv_pool.translate_loc_from_full_to_swa(locs)
        value = ids[first:].view(-1, 1, 1)
        for layer in (FULL_LAYER, SWA_LAYER):
            loc = KVWriteLoc(locs, swa_locs)
            self.kv_pool.set_kv_buffer(layer, loc, value, value)

        full = self.kv_pool.get_key_buffer(FULL_LAYER.layer_id)[slots].view(-1)
        assert torch.equal(full, ids), f"{rid}: a full slot was overwritten"
        start = max(0, first - self.window)
        swa_slots = self.kv_pool.translate_loc_from_full_to_swa(slots[start:])
        assert (swa_slots > 0).all(), f"{rid}: its window lost a slot"
        swa = self.kv_pool.get_key_buffer(SWA_LAYER.layer_id)[swa_slots].view(-1)
        assert torch.equal(swa, ids[start:]), f"{rid}: a SWA slot was overwritten"


class CacheScheduler(Scheduler):
    """The scheduler over small pools, one turn of its event loop at a time."""

    def __init__(
        self,
        *,
        core: str,
        page_size: int,
        window: int,
        full_size: int,
        swa_size: int,
        chunk: int,
        mixed: bool = False,
        overlap: bool = False,
        draft_tokens: int = 0,
        needs_cpu_seq_lens: bool = True,
        attends_within_pictures: bool = False,
    ):
        spec = {}
        if draft_tokens:
            spec = dict(
                speculative_algorithm="FROZEN_KV_MTP",
                speculative_num_steps=draft_tokens - 1,
                speculative_eagle_topk=1,
                speculative_num_draft_tokens=draft_tokens,
            )
        self.config = get_context().override_server_args(
            device="cpu",
            attention_backend="torch_native",
            page_size=page_size,
            chunked_prefill_size=chunk,
            enable_mixed_chunk=mixed,
            disable_overlap_schedule=not overlap,
            max_running_requests=MAX_REQS,
            pp_max_micro_batch_size=MAX_REQS,
            # So that more requests are admitted than fit, and some are retracted.
            schedule_conservativeness=0.0,
            **spec,
        )
        self.config.install()

        self.device = "cpu"
        self.window = window
        self.page_size = page_size
        self.spec_algorithm = SpeculativeAlgorithm.from_string(
            get_spec().speculative_algorithm
        )
        self.model_config = SimpleNamespace(
            vocab_size=VOCAB_SIZE,
            context_len=CONTEXT_LEN,
            is_encoder_decoder=False,
            is_multimodal=False,
            attends_within_pictures=attends_within_pictures,
            think_end_ids=None,
            self_opened_think_start_ids=None,
        )
        self.req_to_token_pool = ReqToTokenPool(
            MAX_REQS,
            CONTEXT_LEN + get_req_to_token_extra_context_len(),
            "cpu",
            enable_memory_saver=False,
        )
        kv_pool = SWAKVPool(
            size=full_size,
            size_swa=swa_size,
            page_size=page_size,
            dtype=torch.float32,
            head_num=1,
            head_dim=1,
            swa_attention_layer_ids=[SWA_LAYER.layer_id],
            full_attention_layer_ids=[FULL_LAYER.layer_id],
            device="cpu",
        )
        self.token_to_kv_pool_allocator = SWATokenToKVPoolAllocator(
            full_size,
            swa_size,
            page_size,
            torch.float32,
            "cpu",
            kv_pool,
            need_sort=False,
        )
        self.tree_cache = UnifiedRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.req_to_token_pool,
                token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
                page_size=page_size,
                is_eagle=self.spec_algorithm.is_eagle(),
                sliding_window_size=window,
                chunked_prefill_size=chunk,
                tree_components=(ComponentType.FULL, ComponentType.SWA),
                tree_core_backend=core,
            )
        )
        self.worker = self.model_worker = IdWorker(
            kv_pool=kv_pool,
            req_to_token_pool=self.req_to_token_pool,
            window=window,
            draft_tokens=draft_tokens,
        )
        attn_backend = SimpleNamespace(needs_cpu_seq_lens=needs_cpu_seq_lens)
        self.tp_worker = SimpleNamespace(
            model_runner=SimpleNamespace(
                attn_backend=attn_backend, prefill_aware_swa=False
            )
        )
        self.draft_worker = None
        self.init_scheduler(full_size, swa_size, overlap)
        self.retracted = 0

    def init_scheduler(self, full_size: int, swa_size: int, overlap: bool):
        """What Scheduler.__init__ does after its workers."""
        self.full_tokens_per_layer = full_size
        self.swa_tokens_per_layer = swa_size
        self.sliding_window_size = self.window
        self.max_total_num_tokens = full_size
        self.max_running_requests = MAX_REQS
        self.max_req_len = min(CONTEXT_LEN - 1, full_size - 1)
        self.max_prefill_tokens = 4 * CONTEXT_LEN
        self.max_queued_requests = None
        self.max_new_tokens_limit = None
        self.enable_overlap = overlap
        self.enable_overlap_mlx = self.enable_pdmux = False
        self.is_generation = self.is_hybrid_swa = True
        self.is_hybrid_ssm = self.enable_unified_memory = False
        self.enable_hierarchical_cache = self.enable_hicache_storage = False
        self.enable_lmcache = self.enable_unified_cache_external_linker = False
        self.enable_hisparse = self.enable_lora = self.enable_fpm = False
        self.lora_drainer = None
        self.schedule_policy = "fcfs"
        self.enable_priority_scheduling = False
        self.abort_on_priority_when_disabled = False
        self.schedule_low_priority_values_first = False
        self.priority_scheduling_preemption_threshold = 0
        self.require_mlp_sync = self.attn_dp_enabled = False
        self.disaggregation_mode = DisaggregationMode.NULL
        self.hisparse_coordinator = self.decode_offload_manager = None
        self.mm_receiver = self.scripted_scheduler_hook = self.rust_server = None
        self.dllm_config = self.dynamic_chunk_sizer = None
        self.min_free_slots_delayer = self.truncation_align_size = None
        self.dllm_manager = SimpleNamespace(any_staging_reqs=lambda: False)
        self.scheduler_stage_metrics = SchedulerStageMetricsRecorder(enabled=False)
        self.metrics_collector = None
        self.pp_group = SimpleNamespace(is_last_rank=True)
        self.idle_sleeper = None
        self._war_barrier_enabled = False
        self._sched_idled = False
        self._pause_started_at, self._pause_intervals = None, deque()
        self.processed_tokens_counter = 0
        self.chunked_prefill_size = get_schedule().chunked_prefill_size
        self.is_mixed_chunk = get_schedule().enable_mixed_chunk
        self.chunked_req = self._pending_chunked_abort_req = None
        self.prefill_decode_interval = self._prefill_decode_interval_remaining = 0
        self.metrics_reporter = Quiet(
            enable_metrics=False,
            current_scheduler_metrics_enabled=False,
            num_generated_tokens=0,
            forward_ct_decode=0,
        )
        self.profiler_manager = self.output_streamer = Quiet()
        self.load_publisher = self.kv_events_publisher = Quiet()
        self.load_inquirer = Quiet(_get_num_pending_tokens=lambda chunk_deduct: 0)
        self.ipc_channels = SimpleNamespace(send_to_tokenizer=Quiet())
        self.grammar_manager = Quiet(grammar_queue=[])
        self.ngram_embedding_manager = Quiet(
            prepare_for_forward=lambda batch, chunked_req: batch
        )
        self.dp_attn_adapter = SchedulerDPAttnAdapter(
            model_runner=self.tp_worker.model_runner,
            req_to_token_pool=self.req_to_token_pool,
            token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
            tree_cache=self.tree_cache,
            offload_tags=set(),
            model_config=self.model_config,
            enable_overlap=overlap,
            spec_algorithm=self.spec_algorithm,
            get_require_mlp_sync=lambda: False,
        )
        self.forward_stream = torch.cpu.Stream()
        self.schedule_stream = torch.cpu.Stream()
        self._results = deque()

        self.init_running_status()
        self.init_schedule_policy()
        self.init_overlap()
        self.init_pool_stats_observer()
        self.init_invariant_checker()
        self.init_batch_result_processor()

    # The event loop, a turn at a time: it is left after one, and keeps its queue.
    def ingest_requests(self, stop_at_pause: bool = False):
        self.gracefully_exit = True

    @property
    def result_queue(self):
        return self._results

    @result_queue.setter
    def result_queue(self, queue):
        assert not queue

    def step(self) -> bool:
        """One turn of the event loop. Returns whether a batch ran."""
        self.gracefully_exit = False
        if self.enable_overlap:
            self.event_loop_overlap()
        else:
            self.event_loop_normal()
        return self.last_batch is not None

    # What only reports.
    def publish_load_snapshot(self, force: bool = False):
        pass

    def _record_step_counters(self, batch, result):
        pass

    def _add_request_to_queue(self, req, is_retracted=False):
        self.retracted += is_retracted
        super()._add_request_to_queue(req, is_retracted)

    def close(self):
        self.config.restore()

    def add_request(
        self, rid: str, prompt: List[int], max_new_tokens: int, stop: bool = False
    ) -> Req:
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            stop_token_ids=[STOP_TOKEN] if stop else None,
            temperature=0,
        )
        params.normalize(None)
        req = Req(rid, "", array("q", prompt), params, vocab_size=VOCAB_SIZE)
        self.init_req_max_new_tokens(req)
        self._add_request_to_queue(req)
        return req

    def evict(self, full: int, swa: int):
        return self.tree_cache.evict(EvictParams(num_tokens=full, swa_num_tokens=swa))

    def row(self, req: Req, end: int) -> List[int]:
        return self.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :end].tolist()

    def live_requests(self) -> List[Req]:
        """All requests that hold slots."""
        reqs = list(self.running_batch.reqs)
        if self.last_batch is not None:
            reqs += self.last_batch.reqs
        for batch, _ in self.result_queue:
            reqs += batch.reqs
        if self.chunked_req is not None:
            reqs.append(self.chunked_req)
        return list({id(r): r for r in reqs if r.kv.holds_kv}.values())

    def swa_held(self) -> int:
        """SWA slots that are neither free nor evictable."""
        allocator = self.token_to_kv_pool_allocator
        free = allocator.swa_available_size() + self.tree_cache.swa_evictable_size()
        return allocator.size_swa - free

    def has_work(self) -> bool:
        return bool(self.waiting_queue or self.result_queue or self.live_requests())


class PoolChecker:
    """What holds between two turns of the scheduler, whatever happened before."""

    def __init__(self, scheduler: CacheScheduler):
        self.scheduler = scheduler
        self.allocator = scheduler.token_to_kv_pool_allocator
        self.tree = scheduler.tree_cache

    def tree_slots(self, unlocked: bool = False, swa: bool = False) -> Set[int]:
        """Full slots of the tree's nodes: of all, or of those that no request locks; with
        swa of those whose SWA slots are there, or there and not locked."""
        walk = self.tree.tree_core.walk_for_kv_canary(unlocked, swa)
        return set(walk.slot_indices.tolist())

    @torch.inference_mode()
    def check(self):
        live = self.scheduler.live_requests()
        tree_full, tree_swa = self.tree_slots(), self.tree_slots(swa=True)
        mapping = self.allocator.full_to_swa_index_mapping.tolist()
        self.check_owners(live, tree_full, tree_swa, mapping)
        self.check_requests(live, tree_full, mapping)
        self.check_locks(live, tree_full, tree_swa)
        self.tree.sanity_check()
        if self.scheduler.last_batch is not None:
            self.scheduler.invariant_checker.self_check_during_busy()

    def check_owners(self, live, tree_full, tree_swa, mapping):
        """Every slot is free or has one owner, in both pools."""
        allocator, tree, page = self.allocator, self.tree, self.scheduler.page_size
        assert allocator.free_group is None
        assert not any(
            mapping[slot] for slot in tree_full - tree_swa
        ), "a tombstone holds SWA slots"

        full_owners, swa_owners = [tree_full], [[mapping[slot] for slot in tree_swa]]
        for req in live:
            start = req.kv.cache_protected_len
            row = self.scheduler.row(req, req.kv.kv_allocated_len)
            full_owners.append(row[start:])
            start = max(start, req.kv.get_evicted_seqlen(ComponentType.SWA))
            swa_owners.append([mapping[slot] for slot in row[start:]])

        for name, owners, sub, size in (
            ("full", full_owners, allocator.full_attn_allocator, allocator.size_full),
            ("swa", swa_owners, allocator.swa_attn_allocator, allocator.size_swa),
        ):
            pages = [{slot // page for slot in slots} for slots in owners]
            assert not any(0 in p for p in pages), f"{name}: slot 0 is held"
            everything = sub.get_all_free_pages().tolist()
            for p in pages:
                everything += p
            assert len(set(everything)) == len(
                everything
            ), f"{name}: a slot has two owners, or is free and held"
            assert len(everything) == size // page, f"{name}: a slot was lost"

        for counted, slots in (
            (tree.full_evictable_size() + tree.full_protected_size(), tree_full),
            (tree.swa_evictable_size() + tree.swa_protected_size(), tree_swa),
        ):
            assert counted == len(slots), "the tree counts its slots wrongly"
        # A page's slots that were allocated ahead keep their entry when it is freed.
        mapped = mapping[:-1]
        if page > 1:
            mapped = [mapping[slot] for slots in full_owners for slot in slots]
        mapped = [slot for slot in mapped if slot > 0]
        assert len(set(mapped)) == len(mapped), "two slots share a SWA slot"

    def check_requests(self, live, tree_full, mapping):
        """A running request still holds its whole prompt and its whole window."""
        page, window = self.scheduler.page_size, self.scheduler.window
        free = set(self.allocator.full_attn_allocator.get_all_free_pages().tolist())
        for req in live:
            kv, rid = req.kv, req.rid
            assert kv.cache_protected_len <= kv.kv_committed_len <= kv.kv_allocated_len
            row = self.scheduler.row(req, kv.kv_committed_len)
            assert free.isdisjoint(
                slot // page for slot in row
            ), f"{rid}: a slot is free"
            assert tree_full.issuperset(
                row[: kv.cache_protected_len]
            ), f"{rid}: its prefix is not the tree's"
            assert all(
                mapping[slot] > 0 for slot in row[max(0, len(row) - window) :]
            ), f"{rid}: its window is not held"

    def check_locks(self, live, tree_full, tree_swa):
        """The paths of the running requests are locked, and nothing else is."""
        core = self.tree.tree_core
        root = core.root_node_handle()
        paths, swa_paths, windows = set(), set(), set()
        for req in live:
            if req.lock is None:
                continue
            path = core.collect_full_device_indices(req.lock.node, root).tolist()
            paths.update(path)
            if not req.lock.swa_released:
                swa_paths.update(path)
                windows.update(path[max(0, len(path) - self.scheduler.window) :])
        locked = tree_full - self.tree_slots(unlocked=True)
        assert self.tree.full_protected_size() == len(locked)
        assert locked == paths, "a full lock was dropped, or is left"

        locked = tree_swa - self.tree_slots(unlocked=True, swa=True)
        assert self.tree.swa_protected_size() == len(locked)
        assert windows <= locked, "a SWA lock was dropped"
        # A lock begins at a node's start, up to a node before its window.
        assert locked <= swa_paths, "a SWA lock is left"

    @torch.inference_mode()
    def check_idle(self):
        """Nothing is held but by the tree, and without the tree all slots are free."""
        scheduler, tree, allocator = self.scheduler, self.tree, self.allocator
        assert not scheduler.has_work(), "a request never finished"
        assert scheduler.req_to_token_pool.available_size() == MAX_REQS
        self.check()
        assert tree.full_protected_size() == tree.swa_protected_size() == 0
        full_size, swa_size = allocator.size_full, allocator.size_swa
        assert allocator.full_available_size() + tree.full_evictable_size() == full_size
        assert allocator.swa_available_size() + tree.swa_evictable_size() == swa_size
        scheduler.evict(full_size, swa_size)
        assert not self.tree_slots()
        assert allocator.full_available_size() == full_size
        assert allocator.swa_available_size() == swa_size
