"""One sliding-window layer on the Triton backend, with real pools and real kernels, for
the tests of what such a layer reads.

On CUDA where there is a GPU, else on CPU tensors in Triton's interpreter.
"""

import contextlib
import importlib
import os
import sys
from types import SimpleNamespace
from unittest import mock

import torch
from transformers import PretrainedConfig

from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.layers.attention import triton_backend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache import kv_index_translator
from sglang.srt.mem_cache.kv_loc_plan import KVLocPlan
from sglang.srt.mem_cache.memory_pool import (
    MHATokenToKVPool,
    ReqToTokenPool,
)
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import (
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.runtime_context import get_server_args
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.test.test_utils import published_topology

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Set here alone: servers that other tests start must not inherit it.
INTERPRET = {} if CUDA else {"TRITON_INTERPRET": "1"}

KERNELS = "sglang.kernels.ops"
ATTENTION = [f"{KERNELS}.attention.{name}_attention" for name in ("decode", "extend")]
# Who holds kernels by name.
HOLDERS = kv_index_translator, triton_backend


@contextlib.contextmanager
def one_process():
    """A process that may build backends, and whose kernels run where it is: without a
    GPU private copies of them do, on CPU tensors."""
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(published_topology(device=DEVICE, triton_attention_num_kv_splits=2))
        if CUDA:
            yield
            return
        enter(mock.patch.dict(os.environ, INTERPRET))
        enter(mock.patch.object(sys.modules["sglang.kernels"], "ops"))
        enter(mock.patch.dict(sys.modules))
        for name in [name for name in sys.modules if name.startswith(KERNELS)]:
            del sys.modules[name]
        for holder in HOLDERS:
            for name, held in list(vars(holder).items()):
                module = getattr(held, "__module__", None) or ""
                if module.startswith(KERNELS):
                    copy = getattr(importlib.import_module(module), held.__name__)
                    enter(mock.patch.object(holder, name, copy))
        for name in ATTENTION:
            importlib.import_module(name)
        yield


class WindowLayer:
    """A layer of 2 query heads on 1 KV head, and requests that have `room` tokens each.

    `window` is what the layer and the model runner are given: how many tokens before
    its own a token attends to. The slots of the requests' tokens are whole pages in an
    order drawn at random; with `hybrid`, the layer has a pool of its own, whose slots
    are others.
    """

    HEADS, DIM = 2, 16

    def __init__(self, window, rows, room, *, page=1, hybrid=True, drafts=0, topk=1):
        self.window, self.rows, self.drafts, self.topk = window, rows, drafts, topk
        generator = torch.Generator().manual_seed(rows * room)
        pages = -(-room // page)
        count = rows * pages + 1  # the first page is for padding

        def slots():
            order = torch.randperm(count - 1, generator=generator) + 1
            return (order[:, None] * page + torch.arange(page)).view(rows, -1)[:, :room]

        full = slots()
        self.slots = slots() if hybrid else full
        pool = dict(
            size=count * page,
            page_size=page,
            dtype=torch.float32,
            head_num=1,
            head_dim=self.DIM,
            device=DEVICE,
        )
        if hybrid:
            pool = SWAKVPool(
                **pool,
                size_swa=count * page,
                swa_attention_layer_ids=[0],
                full_attention_layer_ids=[1],
            )
            mapping = torch.full((count * page + 1,), -1)
            mapping[full] = self.slots
            mapping[0] = 0
            pool.register_mapping(mapping.to(DEVICE))
        else:
            pool = MHATokenToKVPool(**pool, layer_num=2, enable_memory_saver=False)
        # Rows in an order that is not the batch's; row 0 is for padding.
        requests = ReqToTokenPool(rows, room, DEVICE, enable_memory_saver=False)
        self.req_pool_indices = torch.arange(rows, 0, -1, device=DEVICE)
        requests.req_to_token[self.req_pool_indices] = full.int().to(DEVICE)
        self.requests = requests
        allocator = SimpleNamespace()
        self.translator = kv_index_translator.KVIndexTranslator(
            req_to_token=requests.req_to_token,
            token_to_kv_pool_allocator=allocator,
            token_to_kv_pool=pool,
            page_size=page,
            device=DEVICE,
        )
        self.runner = SimpleNamespace(
            req_to_token_pool=requests,
            token_to_kv_pool=pool,
            token_to_kv_pool_allocator=allocator,
            kv_index_translator=self.translator,
            sliding_window_size=window,
            page_size=page,
            device=DEVICE,
            gpu_id=0,
            dtype=torch.float32,
            kv_cache_dtype=torch.float32,
            is_draft_worker=bool(drafts),
            spec_algorithm=SpeculativeAlgorithm.NONE,
            decode_num_tokens_per_req=lambda: 1,
            server_args=get_server_args(),
            model_config=SimpleNamespace(
                attention_arch=AttentionArch.MHA,
                context_len=room,
                head_dim=self.DIM,
                v_head_dim=self.DIM,
                swa_v_head_dim=self.DIM,
                is_encoder_decoder=False,
                hf_config=PretrainedConfig(architectures=["X"]),
                get_max_num_attention_heads=lambda: self.HEADS,
                get_num_kv_heads=lambda *sizes: 1,
                linear_attn_registry_result=None,
            ),
        )
        self.layer = RadixAttention(
            self.HEADS, self.DIM, 1.0, 1, layer_id=0, sliding_window_size=window
        )
        if drafts:
            self.backend = triton_backend.TritonMultiStepDraftBackend(
                self.runner, topk, drafts
            )
            self.backend.page_size = page  # of the server, which is none
        else:
            self.backend = triton_backend.TritonAttnBackend(self.runner)

    def batch(self, mode, lengths, **more):
        """A forward of the first requests, each `lengths` tokens long with those of
        the forward itself."""
        lengths = torch.tensor(lengths, device=DEVICE)
        rows = self.req_pool_indices[: len(lengths)]
        batch = ForwardBatch(
            forward_mode=mode,
            batch_size=len(lengths),
            input_ids=None,
            req_pool_indices=rows,
            seq_lens=lengths,
            out_cache_loc=None,
            seq_lens_sum=None,
            positions=lengths.repeat_interleave(self.topk),
            **more,
        )
        batch.kv_loc_plan = self.plan(rows, lengths, None)
        return batch

    def plan(self, rows, lengths, written):
        return KVLocPlan(
            source=self.translator,
            req_pool_indices=rows,
            seq_lens=lengths,
            seq_lens_cpu=lengths.cpu(),
            write_virtual=written,
        )

    def write(self, batch, starts):
        """Let `batch` write the tokens from `starts` on."""
        rows = self.requests.req_to_token[batch.req_pool_indices]
        ends = batch.seq_lens.tolist()
        written = [row[a:b] for row, a, b in zip(rows, starts, ends)]
        plan = self.plan(batch.req_pool_indices, batch.seq_lens, torch.cat(written))
        plan.bind(batch, self.translator)
        return batch

    def extend(self, lengths, prefixes):
        counts = [a - b for a, b in zip(lengths, prefixes)]
        batch = self.batch(
            ForwardMode.EXTEND,
            lengths,
            extend_prefix_lens=torch.tensor(prefixes, device=DEVICE),
            extend_prefix_lens_cpu=prefixes,
            extend_seq_lens=torch.tensor(counts, device=DEVICE),
            extend_seq_lens_cpu=counts,
            extend_start_loc=None,
        )
        return self.write(batch, prefixes)

    def decode(self, lengths):
        batch = self.batch(ForwardMode.DECODE, lengths)
        return self.write(batch, [length - 1 for length in lengths])


def listed(indptr, indices):
    """The rows of a list of slots as the kernels read it."""
    indptr, indices = indptr.tolist(), indices.tolist()
    return [indices[a:b] for a, b in zip(indptr, indptr[1:])]
