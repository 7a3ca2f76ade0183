"""The KV slots of sliding windows as the Triton backend lists them: those of the last
tokens, in the pool of the sliding layers, found without the GPU being waited for.

On CUDA where there is a GPU, else on CPU tensors in Triton's interpreter.
"""

import importlib
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Set for this module alone: servers that other tests start must not inherit it.
INTERPRET = {} if CUDA else {"TRITON_INTERPRET": "1"}
with mock.patch.dict(os.environ, INTERPRET):
    import sglang.srt.layers.attention.utils as utils

    utils = importlib.reload(utils)

import sglang.srt.layers.attention.triton_backend as backend  # noqa: E402
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool  # noqa: E402
from sglang.srt.mem_cache.swa_memory_pool import (  # noqa: E402
    SWAKVPool,
    SWATokenToKVPoolAllocator,
)
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from sglang.srt.server_args import (  # noqa: E402
    ServerArgs,
    set_global_server_args_for_scheduler,
)
from sglang.test.ci.ci_register import (  # noqa: E402
    register_cpu_ci,
    register_cuda_ci,
)

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")
register_cuda_ci(est_time=10, suite="stage-b-test-1-gpu-small")

WINDOW, CONTEXT, POOL = 1023, 2600, 8192


@pytest.fixture(autouse=True, scope="module")
def _interpret():
    kernel = "create_flashinfer_kv_indices_triton"
    with mock.patch.dict(os.environ, INTERPRET):
        with mock.patch.object(backend, kernel, getattr(utils, kernel)):
            yield


class Requests:
    """Requests whose slots the real allocator gave out of shuffled pools."""

    def __init__(self, lengths, hybrid=True):
        set_global_server_args_for_scheduler(
            ServerArgs(model_path="dummy", device=DEVICE)
        )
        pool = SWAKVPool(
            size=POOL,
            size_swa=POOL,
            page_size=1,
            dtype=torch.float32,
            head_num=1,
            head_dim=1,
            swa_attention_layer_ids=[0],
            full_attention_layer_ids=[1],
            enable_kvcache_transpose=False,
            device=DEVICE,
        )
        allocator = SWATokenToKVPoolAllocator(
            POOL, POOL, 1, torch.float32, DEVICE, pool, False
        )
        # A slot of one pool is not that of the other by chance.
        order = torch.randperm(POOL, generator=torch.Generator().manual_seed(0))
        free = allocator.swa_attn_allocator.free_pages
        allocator.swa_attn_allocator.free_pages = free[order.to(DEVICE)]
        rows = ReqToTokenPool(len(lengths), CONTEXT, DEVICE, enable_memory_saver=False)
        # Rows that are not those of the batch, in an order that is not the batch's.
        self.req_pool_indices = torch.arange(len(lengths), 0, -1, device=DEVICE) - 1
        self.slots = []
        for row, length in zip(self.req_pool_indices.tolist(), lengths):
            slots = allocator.alloc(length) if length else []
            if length:
                rows.req_to_token[row, :length] = slots.to(torch.int32)
                if hybrid:
                    slots = allocator.translate_loc_from_full_to_swa(slots)
                slots = slots.tolist()
            self.slots.append(slots)
        self.req_to_token = rows.req_to_token
        self.seq_lens = torch.tensor(lengths, device=DEVICE)
        self.allocator = allocator if hybrid else object()
        self.indptr = torch.full((len(lengths) + 1,), -7, device=DEVICE)
        self.indptr[0] = 0

    def listed(self, graph):
        count = len(self.slots)
        args = [WINDOW, self.seq_lens, self.req_pool_indices, count]
        if graph:
            indices = torch.full((count * WINDOW,), -7, device=DEVICE)
            found = backend.update_sliding_window_buffer_cuda_graph(
                self.indptr, indices, self.req_to_token, *args, self.allocator
            )
        else:
            found = backend.update_sliding_window_buffer(
                self.indptr, self.req_to_token, *args, DEVICE, self.allocator
            )
        return found

    def check(self, graph):
        indptr, indices, lens, starts = self.listed(graph)
        windows = [slots[-WINDOW:] for slots in self.slots]
        assert lens.tolist() == [len(window) for window in windows]
        assert starts.tolist() == [
            len(slots) - len(window) for slots, window in zip(self.slots, windows)
        ]
        assert indptr[0] == 0
        for i, window in enumerate(windows):
            assert indices[indptr[i] : indptr[i + 1]].tolist() == window


@given(
    lengths=st.lists(
        st.sampled_from([0, 1, 2, 511, 512, 513, 1022, 1023, 1024, 1025, 2047]),
        min_size=1,
        max_size=4,
    ),
    hybrid=st.booleans(),
    graph=st.booleans(),
)
def test_slots_are_those_of_the_last_tokens(lengths, hybrid, graph):
    Requests(lengths, hybrid).check(graph)


@given(
    lengths=st.lists(
        st.sampled_from([1, 2, 1022, 1023, 1024, 1025, 2047]), min_size=1, max_size=3
    ),
    hybrid=st.booleans(),
    decode=st.booleans(),
)
def test_a_token_attends_to_the_window_before_it(lengths, hybrid, decode):
    requests = Requests(lengths, hybrid)
    triton = object.__new__(backend.TritonAttnBackend)
    vars(triton).update(
        **dict(device=DEVICE, num_head=1, num_kv_head=1, v_head_dim=1),
        **dict(max_kv_splits=1, static_kv_splits=True, enable_deterministic=False),
        **dict(scale_kv_splits=False, swa_v_head_dim=None, split_tile_size=None),
        **dict(device_core_count=0, sliding_window_size=WINDOW),
        kv_indptr=torch.zeros_like(requests.indptr),
        qo_indptr=torch.zeros_like(requests.indptr),
        window_kv_indptr=requests.indptr,
        req_to_token=requests.req_to_token,
        token_to_kv_pool_allocator=requests.allocator,
    )
    triton.init_forward_metadata(
        SimpleNamespace(
            forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
            batch_size=len(lengths),
            spec_info=None,
            req_pool_indices=requests.req_pool_indices,
            seq_lens=requests.seq_lens,
            seq_lens_sum=sum(lengths),
            extend_prefix_lens=requests.seq_lens,
            extend_prefix_lens_cpu=lengths,
            extend_seq_lens=torch.ones_like(requests.seq_lens),
            extend_seq_lens_cpu=[1] * len(lengths),
        )
    )
    found = triton.forward_metadata
    indptr, indices = found.window_kv_indptr.tolist(), found.window_kv_indices.tolist()
    for i, slots in enumerate(requests.slots):
        # The key of a decoded token is cached, that of one to be extended is not yet.
        position = len(slots) - 1 if decode else len(slots)
        seen = [slot for k, slot in enumerate(slots) if k >= position - WINDOW]
        assert indices[indptr[i] : indptr[i + 1]] == seen


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_the_host_does_not_wait(graph):
    requests = Requests([1, 700, 2500])
    requests.listed(graph)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        requests.listed(graph)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    requests.check(graph)
