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
from typing import Dict, Iterable, List

import torch

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
    """In the model worker's place: writes sequence ids to the KV pools, and checks them."""

    def __init__(self, *, kv_pool, req_to_token_pool, window: int):
        self.kv_pool = kv_pool
        self.req_to_token = req_to_token_pool.req_to_token
        self.window = window
        self.sequences = SequenceIds()
        # rid -> all tokens, with those sampled that the host may not know yet.
        self.tokens: Dict[str, List[int]] = {}

    def forward_batch_generation(
        self, batch: ScheduleBatch, on_publish=None, **kwargs
    ) -> GenerationBatchResult:
        return self.forward_target(batch)

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
        needs_cpu_seq_lens: bool = True,
        attends_within_pictures: bool = False,
    ):
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
            **self.spec_args(),
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
        self.worker = self.model_worker = self.make_worker(
            kv_pool=kv_pool,
            req_to_token_pool=self.req_to_token_pool,
            window=window,
        )
        attn_backend = SimpleNamespace(needs_cpu_seq_lens=needs_cpu_seq_lens)
        self.tp_worker = SimpleNamespace(
            model_runner=SimpleNamespace(
                attn_backend=attn_backend, prefill_aware_swa=False
            )
        )
        self.draft_worker = None
        self.init_scheduler(full_size, swa_size, overlap)

    def spec_args(self) -> dict:
        """The server's arguments for speculative decoding."""
        return {}

    def make_worker(self, **kwargs) -> IdWorker:
        return IdWorker(**kwargs)

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

    def has_work(self) -> bool:
        return bool(self.waiting_queue or self.result_queue or self.live_requests())
