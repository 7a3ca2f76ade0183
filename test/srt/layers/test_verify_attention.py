"""The verify kernel of the Triton backend against a float64 oracle.

On CUDA where there is a GPU, else on CPU tensors in Triton's interpreter; the large
shapes and CUDA graphs need a GPU.
"""

import importlib
import os
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Set for this module alone: servers that other tests start must not inherit it.
INTERPRET = {} if CUDA else {"TRITON_INTERPRET": "1"}
with mock.patch.dict(os.environ, INTERPRET):
    from sglang.kernels.ops.attention import decode_attention
    from sglang.kernels.ops.attention import verify_attention as ops

    for _module in (decode_attention, ops):
        importlib.reload(_module)

from sglang.srt.layers.attention import triton_backend  # noqa: E402
from sglang.srt.layers.radix_attention import AttentionType  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from sglang.test.ci.ci_register import (  # noqa: E402
    register_cpu_ci,
    register_cuda_ci,
)

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")
register_cuda_ci(est_time=120, suite="stage-b-test-1-gpu-small")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
CORES = 132 if CUDA else 6
# bf16 and fp16 round q, k, v, p and the output; a sum of v of about 1 is what is left.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def needs_gpu(test):
    test = pytest.mark.skipif(not CUDA, reason="needs a GPU")(test)
    return pytest.mark.gpu(test)


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


SMALL = {
    "a chain": dict(lens=[5, 0, 200], num_draft=4, heads=4, kv_heads=2, head_dim=32),
    "one token": dict(lens=[0], num_draft=1, heads=1, kv_heads=1, head_dim=64),
    "more rows than a tile": dict(
        lens=[90, 0], num_draft=16, heads=16, kv_heads=1, head_dim=32
    ),
    "a window, v narrower": dict(
        lens=[200, 63, 64, 65, 3],
        num_draft=5,
        heads=6,
        kv_heads=3,
        head_dim=64,
        v_head_dim=32,
        window=64,
    ),
    "a window narrower than the draft": dict(
        lens=[40, 2], num_draft=8, heads=2, kv_heads=1, head_dim=32, window=3
    ),
    "views of one projection": dict(
        lens=[70, 1, 200],
        num_draft=4,
        heads=4,
        kv_heads=2,
        head_dim=64,
        v_head_dim=32,
        window=64,
        fused=True,
    ),
    "full layers of Gemma 4": dict(
        lens=[130, 33], num_draft=4, heads=16, kv_heads=2, head_dim=512
    ),
    "not a power of two": dict(
        lens=[100], num_draft=3, heads=3, kv_heads=1, head_dim=80
    ),
    "everything else": dict(
        lens=[100, 7],
        num_draft=4,
        heads=4,
        kv_heads=2,
        head_dim=32,
        window=50,
        sinks=1,
        logit_cap=5.0,
        sm_scale=0.3,
    ),
    "two scales": dict(
        lens=[200, 3],
        num_draft=4,
        heads=4,
        kv_heads=2,
        head_dim=64,
        k_scale=0.5,
        v_scale=1.5,
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_small(name):
    Case(**SMALL[name], dtype=torch.bfloat16 if CUDA else torch.float32).check()


@settings(max_examples=40 if CUDA else 10, deadline=None)
@given(st.data())
def test_any_shape(data):
    draw = data.draw
    window = draw(st.sampled_from([-1, -1, 1, 17, 64]))
    Case(
        lens=draw(st.lists(st.integers(0, 150), min_size=1, max_size=4)),
        num_draft=draw(st.integers(1, 9)),
        kv_heads=draw(st.integers(1, 2)),
        heads=2 * draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([16, 32, 48, 64])),
        window=window,
        sinks=draw(st.booleans()),
        dtype=torch.float16 if CUDA else torch.float32,
        seed=draw(st.integers(0, 99)),
    ).check()


def test_parts_of_the_requests_do_not_overlap():
    """Lengths at which a prefix ends just where a split does, or one before or after."""
    unit = ops._MIN_SPLIT_LEN
    lens = [0, 1, unit - 1, unit, unit + 1, 0, 2 * unit, 5 * unit - 1, 0]
    dtype = torch.float16 if CUDA else torch.float32
    Case(lens, 2, 2, 1, 16, dtype=dtype, seed=3).check()
    Case([unit] * 5, 2, 2, 1, 16, dtype=dtype, seed=4).check()


@pytest.mark.parametrize("programs_per_core, share", [(1, 0.9), (2, 0.8)])
def test_splits(programs_per_core, share):
    """That share of what can run at once does, with the fewest splits."""
    for cores in (1, 6, 132):
        for tiles in (1, 2, 16, 64, 160, 640, 5000):
            splits = ops._get_splits_per_seq(tiles, cores, programs_per_core)
            at_once = cores * programs_per_core
            for n in range(1, splits + 1):
                rounds = -(-tiles * n // at_once)
                busy = tiles * n >= share * rounds * at_once
                assert busy == (n == splits), (cores, tiles, n)


def _forward_extend(case, mode, cuda=True, **changes):
    """TritonAttnBackend.forward_extend on a case, as the target verifies.

    Returns (output, name of the kernel that made it).
    """
    calls = []

    def recorded(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    backend = object.__new__(triton_backend.TritonAttnBackend)
    backend.verify_attention_fwd = recorded("verify", ops.verify_attention_fwd)
    backend.extend_attention_fwd = recorded("extend", lambda *args, **kwargs: None)
    backend._forward_extend_unified = recorded("unified", lambda *args, **kwargs: None)
    backend.use_verify_attention = cuda
    backend.use_verify_splitkv = backend.use_verify_shared_kv = False
    backend.use_mla = backend.use_dense_fp8_chunked_prefill = False
    backend.dllm_attention = None
    backend.dcp_size = backend.page_size = 1
    backend.device_core_count = CORES
    backend.enable_deterministic = changes.pop("deterministic", False)
    backend.allow_bidirectional_attention_in_extend = False
    step = case.num_draft
    indptr = torch.arange(len(case.lens) + 1, device=DEVICE) * step
    backend.forward_metadata = triton_backend.ForwardMetadata(
        attn_logits=None,
        attn_lse=None,
        max_extend_len=step,
        num_kv_splits=None,
        kv_indptr=case.kv_indptr,
        kv_indices=case.slots,
        qo_indptr=indptr.to(torch.int32),
        custom_mask=None,
        mask_indptr=None,
        window_kv_indptr=case.kv_indptr,
        window_kv_indices=case.slots,
        window_num_kv_splits=None,
        window_kv_offsets=None,
    )
    layer = SimpleNamespace(
        layer_id=0,
        tp_q_head_num=case.heads,
        qk_head_dim=case.q.shape[-1],
        v_head_dim=case.v_draft.shape[-1],
        scaling=case.q.shape[-1] ** -0.5,
        sliding_window_size=case.window,
        is_cross_attention=False,
        attn_type=changes.pop("attn_type", AttentionType.DECODER),
        logit_capping_method="tanh",
        logit_cap=0.0,
        k_scale=None,
        v_scale=None,
        xai_temperature_len=-1,
    )
    backend.token_to_kv_pool = SimpleNamespace(
        get_key_buffer=lambda layer_id: case.k_buffer,
        get_value_buffer=lambda layer_id: case.v_buffer,
    )
    batch = SimpleNamespace(
        lookahead=None,
        forward_mode=mode,
        extend_seq_lens_cpu=[step] * len(case.lens),
        mha_one_shot=False,
    )
    o = backend.forward_extend(
        case.q.flatten(1),
        case.k_draft,
        case.v_draft,
        layer,
        batch,
        save_kv_cache=False,
    )
    return o, calls


@pytest.mark.parametrize("window", [-1, 64])
def test_backend_verifies_with_the_kernel(window):
    case = Case([100, 0, 30], 4, 4, 2, 32, window=window, dtype=torch.float16)
    o, calls = _forward_extend(case, ForwardMode.TARGET_VERIFY)
    assert calls == ["verify"]
    o = o.view(*case.q.shape).to(torch.float64)
    assert (o - case.expected()).abs().max() <= TOLERANCE[torch.float16]


def test_what_the_kernel_does_not_cover():
    """Draft-extend, prefill, other GPUs, attention to what comes after, and batch
    invariance stay with the kernels that they had."""
    case = Case([40, 3], 4, 4, 2, 32, dtype=torch.float16)

    def kernel(mode=ForwardMode.TARGET_VERIFY, **changes):
        return _forward_extend(case, mode, **changes)[1]

    assert kernel() == ["verify"]
    assert kernel(mode=ForwardMode.DRAFT_EXTEND_V2) == ["extend"]
    assert kernel(mode=ForwardMode.EXTEND) == ["extend"]
    assert kernel(cuda=False) == ["extend"]
    assert kernel(attn_type=AttentionType.ENCODER_ONLY) == ["extend"]
    assert kernel(deterministic=True) == ["unified"]


LARGE = [
    dict(lens=[100] * 128, num_draft=1, heads=8, kv_heads=8, head_dim=64),
    dict(lens=[0, 1, 7, 70000, 333], num_draft=4, heads=16, kv_heads=2, head_dim=512),
    dict(lens=[9000] * 3, num_draft=4, heads=16, kv_heads=8, head_dim=256, window=1023),
    dict(
        lens=[5000, 0, 64, 1022, 1023, 1024],
        num_draft=4,
        heads=16,
        kv_heads=8,
        head_dim=256,
        window=1023,
    ),
    dict(
        lens=list(range(0, 2560, 20)),
        num_draft=4,
        heads=16,
        kv_heads=8,
        head_dim=256,
        window=1023,
    ),
    dict(lens=[900, 0, 17], num_draft=16, heads=16, kv_heads=1, head_dim=128),
    dict(lens=[300, 4000], num_draft=16, heads=16, kv_heads=2, head_dim=512),
    dict(lens=[300, 4000], num_draft=8, heads=32, kv_heads=2, head_dim=256),
    dict(
        lens=[900, 40], num_draft=3, heads=8, kv_heads=8, head_dim=192, v_head_dim=128
    ),
    dict(lens=[900, 40], num_draft=7, heads=8, kv_heads=2, head_dim=80),
    dict(lens=[31, 2000], num_draft=4, heads=32, kv_heads=8, head_dim=128, sinks=1),
    dict(
        lens=[900, 3000],
        num_draft=4,
        heads=16,
        kv_heads=8,
        head_dim=256,
        window=1023,
        fused=True,
    ),
    dict(lens=[900], num_draft=4, heads=16, kv_heads=2, head_dim=512, fused=True),
]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("i", range(len(LARGE)))
def test_large(i, dtype):
    Case(**LARGE[i], dtype=dtype).check()


@needs_gpu
@pytest.mark.parametrize("i", [1, 3, 10])
@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_kv(i, kv_dtype):
    case = {**LARGE[i], "kv_dtype": kv_dtype, "k_scale": 0.7, "v_scale": 1.3}
    Case(**case, dtype=torch.bfloat16).check()


@needs_gpu
@pytest.mark.parametrize("window", [-1, 255])
def test_cuda_graph(window):
    """A graph that was captured at one set of lengths serves others."""
    shape = dict(num_draft=4, heads=16, kv_heads=8, head_dim=256, window=window)
    shape["dtype"] = torch.bfloat16
    case = Case([1] * 6, **shape)
    room = torch.zeros(60000, dtype=case.slots.dtype, device=DEVICE)
    room[: len(case.slots)] = case.slots
    k, v = (
        torch.zeros(60000, *b.shape[1:]).to(b) for b in (case.k_buffer, case.v_buffer)
    )
    case.slots, case.k_buffer, case.v_buffer = room, k, v
    case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run()
    for lens in ([0] * 6, [3000, 0, 1, 40000, 255, 256], [1000] * 6):
        other = Case(lens, **shape, seed=len(lens))
        for name in ("q", "k_draft", "v_draft", "kv_indptr"):
            getattr(case, name).copy_(getattr(other, name))
        room[: len(other.slots)] = other.slots
        k[: len(other.k_buffer)], v[: len(other.v_buffer)] = (
            other.k_buffer,
            other.v_buffer,
        )
        graph.replay()
        assert (out - other.expected()).abs().max() <= TOLERANCE[torch.bfloat16]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
