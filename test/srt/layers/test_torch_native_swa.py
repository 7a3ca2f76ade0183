"""The torch_native attention backend reads a sliding-window layer's keys and values
where the SWA pool keeps them.

SWAKVPool gives the layers with a window slots of their own. Here full slots go beyond
the SWA pool, no two requests' slots are in order, and what lies before a window is
evicted, its SWA slot another request's. The oracle is dense attention in float64.
"""

import os
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import torch

from sglang.srt.arg_groups import platform_hook
from sglang.srt.arg_groups.overrides import resolved_view
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.server_args import ServerArgs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))

from gemma4.checkpoint.configs import target_config  # noqa: E402
from gemma4.checkpoint.files import write_files  # noqa: E402
from gemma4.checkpoint.tiny import TINY  # noqa: E402

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
# A query sees this many keys before its own.
WINDOW = 7
FULL_SLOTS, SWA_SLOTS = 96, 40
SLIDING, FULL = 0, 1


def _dense(q, k, v, window: int):
    """Causal attention of the last `q.shape[0]` of `k.shape[0]` tokens.

    q: [new, HEADS, HEAD_DIM]; k, v: [tokens, KV_HEADS, HEAD_DIM].
    """
    k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * HEAD_DIM**-0.5
    positions = torch.arange(k.shape[0])
    distance = positions[-q.shape[0] :, None] - positions
    hidden = (distance < 0) | (distance > window) if window >= 0 else distance < 0
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


class TestTorchNativeSWA(CustomTestCase):
    kv_dtype = torch.float32

    def as_stored(self, values: torch.Tensor) -> torch.Tensor:
        """What the cache makes of keys or values."""
        return values

    def setUp(self):
        torch.manual_seed(0)
        self.pool = SWAKVPool(
            size=FULL_SLOTS,
            size_swa=SWA_SLOTS,
            page_size=1,
            dtype=self.kv_dtype,
            head_num=KV_HEADS,
            head_dim=HEAD_DIM,
            swa_attention_layer_ids=[SLIDING],
            full_attention_layer_ids=[FULL],
            device="cpu",
        )
        self.pool.register_mapping(torch.zeros(FULL_SLOTS + 2, dtype=torch.int64))
        self.backend = TorchNativeAttnBackend(
            SimpleNamespace(
                device="cpu",
                req_to_token_pool=SimpleNamespace(
                    req_to_token=torch.zeros(4, 64, dtype=torch.int32)
                ),
                token_to_kv_pool=self.pool,
            )
        )
        self.layers = {
            layer_id: RadixAttention(
                *(HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, layer_id),
                sliding_window_size=window,
            )
            for layer_id, window in ((SLIDING, WINDOW), (FULL, -1))
        }

    def write(self, prefix_lens, new_lens):
        """Fill the pools up to each prefix; returns the batch of what follows, and the
        keys and values of all tokens by layer and request."""
        lens = [p + n for p, n in zip(prefix_lens, new_lens)]
        # The last token's full slot is beyond the SWA pool.
        slots = 1 + torch.randperm(FULL_SLOTS - 1)[: sum(lens)]
        slots[-1] = FULL_SLOTS
        full = slots.split(lens)
        swa = iter((1 + torch.randperm(SWA_SLOTS)).tolist())
        mapping = self.pool.full_to_swa_index_mapping
        for slots, prefix in zip(full, prefix_lens):
            alive = slots[max(0, prefix - WINDOW) :]
            mapping[alive] = torch.tensor([next(swa) for _ in alive])
        cached = {}
        for layer_id, layer in self.layers.items():
            cached[layer_id] = []
            for req, (slots, prefix) in enumerate(zip(full, prefix_lens)):
                k, v = torch.randn(2, len(slots), KV_HEADS, HEAD_DIM)
                cached[layer_id].append((k, v))
                keep = slots[:prefix] if layer_id == FULL else slots[:prefix][-WINDOW:]
                buffers = self.pool.get_kv_buffer(layer_id)
                where = keep if layer_id == FULL else mapping[keep]
                for buffer, values in zip(buffers, (k, v)):
                    values = self.as_stored(values[prefix - len(keep) : prefix])
                    # Torch does not write FP8 by index.
                    kept = torch.float32 if buffer.dtype.itemsize == 4 else torch.uint8
                    buffer.view(kept)[where] = values.to(buffer.dtype).view(kept)
                self.backend.req_to_token_pool.req_to_token[req, : len(slots)] = slots
        batch = SimpleNamespace(
            lookahead=None,
            out_cache_loc=torch.cat([s[p:] for s, p in zip(full, prefix_lens)]),
            req_pool_indices=torch.arange(len(lens)),
            seq_lens=torch.tensor(lens),
            extend_prefix_lens=torch.tensor(prefix_lens),
            extend_seq_lens=torch.tensor(new_lens),
            encoder_lens=None,
            forward_mode=SimpleNamespace(is_target_verify=lambda: False),
        )
        self.backend.init_forward_metadata(batch)
        return batch, cached

    def check(self, forward, prefix_lens, new_lens):
        batch, cached = self.write(prefix_lens, new_lens)
        for layer_id, layer in self.layers.items():
            q = torch.randn(sum(new_lens), HEADS, HEAD_DIM)
            new = [
                torch.cat([kv[i][p:] for kv, p in zip(cached[layer_id], prefix_lens)])
                for i in (0, 1)
            ]
            out = forward(q.flatten(1), *new, layer, batch).view(q.shape)
            for got, queries, (k, v) in zip(
                out.split(new_lens), q.split(new_lens), cached[layer_id]
            ):
                k, v = self.as_stored(k), self.as_stored(v)
                expected = _dense(queries, k, v, layer.sliding_window_size)
                torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)

    def test_extend(self):
        for prefix_lens in ([0, 0], [3, 0], [30, WINDOW]):
            with self.subTest(prefix_lens=prefix_lens):
                self.setUp()
                self.check(self.backend.forward_extend, prefix_lens, [5, 9])

    def test_decode(self):
        for prefix_lens in ([0, 3, WINDOW], [30, 29, 20]):
            with self.subTest(prefix_lens=prefix_lens):
                self.setUp()
                self.check(self.backend.forward_decode, prefix_lens, [1, 1, 1])


class TestGemma4Accepts(CustomTestCase):
    def resolve(self, backend):
        tiny = TINY["tiny"]
        config = target_config(tiny, text_only=False, dtype="bfloat16")
        with tempfile.TemporaryDirectory() as folder:
            write_files(Path(folder), tiny, config, "flat")
            args = ServerArgs(
                model_path=folder, device="cpu", attention_backend=backend
            )
            args.resolve_once()
        self.assertEqual(resolved_view(args).attention_backend, "torch_native")

    def test_asked_for(self):
        self.resolve("torch_native")

    def test_default_of_an_arm_cpu(self):
        with mock.patch.object(platform_hook, "is_host_cpu_arm64", lambda: True):
            self.resolve(None)


if __name__ == "__main__":
    unittest.main()
