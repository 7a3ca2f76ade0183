"""A Triton backend of a target that verifies drafts, in Triton's interpreter."""

import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch

from sglang.srt import runtime_context
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.server_args import prepare_server_args
from sglang.srt.speculative import eagle_utils
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))
from gemma4.checkpoint import write_checkpoint  # noqa: E402

CONTEXT, DRAFT_TOKENS, WINDOW = 96, 4, 7
NUM_KV_HEADS, HEAD_DIM = 1, 64
SEQ_LENS = [5, 90, 33]


class VerifyCase(CustomTestCase):
    """Requests of SEQ_LENS tokens, whose slots lie anywhere in the pool."""

    @classmethod
    def setUpClass(cls):
        folders = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folders.cleanup)
        cls.target, cls.draft = f"{folders.name}/target", f"{folders.name}/draft"
        write_checkpoint(cls.target, "tiny", weights=False)
        write_checkpoint(cls.draft, "tiny", assistant=True, weights=False)

    def setUp(self):
        # The interpreter stands for a GPU, whose verify kernels read another mask.
        self.enterContext(mock.patch.object(eagle_utils, "_is_cpu", False))
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        max_bs = len(SEQ_LENS)
        width = CONTEXT + DRAFT_TOKENS
        slots = torch.randperm(max_bs * width, generator=generator) + 1
        self.req_to_token = slots.view(max_bs, width).to(torch.int32)
        self.pool = MHATokenToKVPool(
            size=max_bs * width,
            page_size=1,
            dtype=torch.float32,
            head_num=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            layer_num=1,
            device="cpu",
            enable_memory_saver=False,
        )
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer.normal_()

    def backend(self, topk=1, *argv) -> TritonAttnBackend:
        """The target's backend on a server that drafts."""
        args = prepare_server_args(
            [
                *("--model-path", self.target, "--device", "cpu"),
                *("--context-length", str(CONTEXT), "--dtype", "float32"),
                *("--speculative-algorithm", "NEXTN"),
                *("--speculative-draft-model-path", self.draft),
                *("--speculative-num-steps", str(DRAFT_TOKENS - 1)),
                *("--speculative-eagle-topk", str(topk)),
                *("--speculative-num-draft-tokens", str(DRAFT_TOKENS), *argv),
            ]
        )
        context = runtime_context.create_context(
            args, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=0)
        )
        self.enterContext(runtime_context.use_context(context))
        allocator = SimpleNamespace(get_kvcache=lambda: self.pool)
        translator = KVIndexTranslator(
            req_to_token=self.req_to_token,
            token_to_kv_pool_allocator=allocator,
            token_to_kv_pool=self.pool,
            page_size=1,
            device="cpu",
        )
        runner = SimpleNamespace(
            model_config=ModelConfig.from_server_args(args),
            req_to_token_pool=SimpleNamespace(
                size=len(SEQ_LENS), req_to_token=self.req_to_token
            ),
            token_to_kv_pool=self.pool,
            token_to_kv_pool_allocator=allocator,
            kv_index_translator=translator,
            kv_cache_dtype=torch.float32,
            sliding_window_size=WINDOW,
            page_size=1,
            device="cpu",
            gpu_id=0,
            is_draft_worker=False,
            decode_num_tokens_per_req=lambda: DRAFT_TOKENS,
        )
        backend = TritonAttnBackend(runner)
        bs = len(SEQ_LENS)
        backend.init_cuda_graph_state(bs, bs * DRAFT_TOKENS)
        return backend

    def batch(self, backend, custom_mask=None, seq_lens=SEQ_LENS):
        seq_lens = torch.tensor(seq_lens)
        req_pool_indices = torch.tensor([2, 0, 1])
        return SimpleNamespace(
            lookahead=None,
            forward_mode=ForwardMode.TARGET_VERIFY,
            batch_size=len(seq_lens),
            seq_lens=seq_lens,
            seq_lens_sum=seq_lens.sum().item(),
            req_pool_indices=req_pool_indices,
            kv_loc_plan=backend.kv_index_translator.plan(
                req_pool_indices=req_pool_indices,
                seq_lens=seq_lens,
                seq_lens_cpu=seq_lens,
                write_virtual=None,
            ),
            spec_info=SimpleNamespace(
                custom_mask=custom_mask, num_tokens_per_req=DRAFT_TOKENS
            ),
            extend_seq_lens_cpu=None,
            mha_one_shot=False,
            attn_attend_prefix_cache=None,
        )

    def replayed(self, backend, batch):
        """What a graph reads, after its buffers were filled for the batch."""
        bs = batch.batch_size
        backend._update_target_verify_buffers(
            batch.kv_loc_plan,
            bs,
            batch.seq_lens,
            batch.spec_info,
            batch.req_pool_indices,
        )
        return backend._build_cuda_graph_forward_metadata(
            bs, batch.forward_mode, batch.spec_info
        )
