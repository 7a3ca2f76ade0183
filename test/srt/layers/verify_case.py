"""Inputs of a verify step and its answer in float64, for the tests of the verify kernel.

On CUDA where there is a GPU, else on CPU tensors in Triton's interpreter.
"""

import importlib
import os
from unittest import mock

import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Set for this module alone: servers that other tests start must not inherit it.
INTERPRET = {} if CUDA else {"TRITON_INTERPRET": "1"}
with mock.patch.dict(os.environ, INTERPRET):
    from sglang.kernels.ops.attention import decode_attention
    from sglang.kernels.ops.attention import verify_attention as ops

    for _module in (decode_attention, ops):
        importlib.reload(_module)

CORES = 132 if CUDA else 6
# bf16 and fp16 round q, k, v, p and the output; a sum of v of about 1 is what is left.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True, scope="module")
def _interpret():
    with mock.patch.dict(os.environ, INTERPRET):
        yield


class Case:
    """Inputs of a verify step, and the answer in float64.

    lens: length of each sequence before the draft. A window leaves its last `window`
    tokens in kv_indices, as the backend does. Slots that no sequence holds are NaN.
    fused: q, k and v of the draft are views of one projection's output.
    """

    def __init__(
        self,
        lens,
        num_draft,
        heads,
        kv_heads,
        head_dim,
        v_head_dim=None,
        window=-1,
        dtype=torch.float32,
        kv_dtype=None,
        fused=False,
        seed=0,
        **options,
    ):
        cpu = torch.Generator().manual_seed(seed)
        random = torch.Generator(device=DEVICE).manual_seed(seed)
        v_head_dim = v_head_dim or head_dim
        self.lens, self.num_draft, self.window = lens, num_draft, window
        self.heads, self.kv_heads, self.dtype = heads, kv_heads, dtype
        self.options = dict(options)
        batch = len(lens)

        def normal(*shape):
            return torch.randn(*shape, generator=random, device=DEVICE).to(dtype)

        self.kept = [min(n, window) if window > 0 else n for n in lens]
        used = sum(self.kept)
        num_slots = used + 7
        self.slots = torch.randperm(num_slots, generator=cpu)[:used].to(DEVICE)
        k = torch.full((num_slots, kv_heads, head_dim), float("nan"), device=DEVICE)
        v = torch.full((num_slots, kv_heads, v_head_dim), float("nan"), device=DEVICE)
        k[self.slots] = normal(used, kv_heads, head_dim).float()
        v[self.slots] = normal(used, kv_heads, v_head_dim).float()
        self.k_buffer = k.to(kv_dtype or dtype)
        self.v_buffer = v.to(kv_dtype or dtype)
        tokens = batch * num_draft
        self.q = normal(tokens, heads, head_dim)
        self.k_draft = normal(tokens, kv_heads, head_dim)
        self.v_draft = normal(tokens, kv_heads, v_head_dim)
        if fused:
            qkv = (self.q, self.k_draft, self.v_draft)
            rows = torch.cat([x.flatten(1) for x in qkv], dim=1)
            views = rows.split([x[0].numel() for x in qkv], dim=1)
            self.q, self.k_draft, self.v_draft = (
                view.unflatten(1, x.shape[1:]) for view, x in zip(views, qkv)
            )
        self.sinks = normal(heads).float() if self.options.pop("sinks", 0) else None

        self.kv_indptr = self._indptr(self.kept, torch.int32)

    @staticmethod
    def _indptr(counts, dtype):
        indptr = torch.zeros(len(counts) + 1, dtype=dtype, device=DEVICE)
        indptr[1:] = torch.tensor(counts).cumsum(0)
        return indptr

    def run(self):
        o = torch.full(
            (*self.q.shape[:2], self.v_draft.shape[-1]),
            float("nan"),
            dtype=self.dtype,
            device=DEVICE,
        )
        options = dict(self.options)
        ops.verify_attention_fwd(
            self.q,
            self.k_draft,
            self.v_draft,
            o,
            self.k_buffer,
            self.v_buffer,
            self.kv_indptr,
            self.slots,
            self.num_draft,
            CORES,
            options.pop("k_scale", 1.0),
            options.pop("v_scale", 1.0),
            options.pop("sm_scale", self.q.shape[-1] ** -0.5),
            sliding_window_size=self.window,
            sinks=self.sinks,
            **options,
        )
        return o

    def expected(self):
        """One sequence at a time, one softmax a (token, head)."""
        options, f64 = self.options, torch.float64
        scale = options.get("sm_scale") or self.q.shape[-1] ** -0.5
        group = self.heads // self.kv_heads
        out, start = [], 0
        for i, kept in enumerate(self.kept):
            slots = self.slots[start : start + kept]
            start += kept
            rows = slice(i * self.num_draft, (i + 1) * self.num_draft)
            k = self.k_buffer[slots].to(f64) * options.get("k_scale", 1.0)
            v = self.v_buffer[slots].to(f64) * options.get("v_scale", 1.0)
            k = torch.cat([k, self.k_draft[rows].to(f64)]).repeat_interleave(group, 1)
            v = torch.cat([v, self.v_draft[rows].to(f64)]).repeat_interleave(group, 1)
            logits = torch.einsum("qhd,khd->hqk", self.q[rows].to(f64), k) * scale
            cap = options.get("logit_cap", 0.0)
            if cap > 0:
                logits = cap * torch.tanh(logits / cap)
            position = kept + torch.arange(self.num_draft, device=DEVICE)
            sees = torch.ones(self.num_draft, kept + self.num_draft, dtype=torch.bool)
            sees = sees.tril(kept).to(DEVICE)
            if self.window > 0:
                key = torch.arange(kept + self.num_draft, device=DEVICE)
                sees &= position[:, None] - key <= self.window
            logits = logits.masked_fill(~sees, float("-inf"))
            if self.sinks is not None:
                sink = self.sinks.to(f64)[:, None, None]
                logits = torch.cat([logits, sink.expand(-1, self.num_draft, 1)], -1)
            weights = logits.softmax(-1)[..., : kept + self.num_draft]
            out.append(torch.einsum("hqk,khd->qhd", weights, v))
        return torch.cat(out)

    def check(self):
        got, expected = self.run().to(torch.float64), self.expected()
        # NaN, which an unused slot would give, is not close either.
        close = (got - expected).abs() <= TOLERANCE[self.dtype]
        assert close.all(), (
            f"{(~close).sum()} of {close.numel()} values differ, the first at "
            f"{(~close).nonzero()[0].tolist()}"
        )
