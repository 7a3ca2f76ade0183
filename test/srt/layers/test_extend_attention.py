"""The extend attention kernels against the definition, in float64.

Without a GPU the kernels run in Triton's interpreter on small shapes; the
shapes that only a GPU can do in time are marked ``gpu``.
"""

import importlib
import os
from dataclasses import dataclass, replace
from typing import Optional
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
    from sglang.srt.layers.attention.triton_ops import extend_attention

    extend_attention = importlib.reload(extend_attention)

# Bounds on |o - oracle| / max(1, |oracle|): the operands' rounding. Probabilities
# are rounded to the values' dtype before the second product.
TOLERANCE = {torch.float32: 5e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}

ORACLE_ROWS = 512  # at once, so that the scores of 65,536 keys fit


@pytest.fixture(autouse=True, scope="module")
def _interpret():
    with mock.patch.dict(os.environ, INTERPRET):
        yield


@dataclass(frozen=True)
class Case:
    extend: tuple = (5, 70)
    prefix: tuple = (3, 40)
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    v_dim: Optional[int] = None
    window: int = -1
    causal: bool = True
    mask: Optional[str] = None  # "tree", "image" or "all" (prefix included)
    sinks: bool = False
    cap: float = 0.0
    temperature_len: int = -1
    k_scale: float = 1.0
    v_scale: float = 1.0
    dtype: torch.dtype = torch.float16
    kv_dtype: Optional[torch.dtype] = None
    unified: bool = False
    spare_rows: int = 0  # rows of q beyond the last sequence, as a padded batch has
    fused: bool = False  # q, k and v are views of one projection's output

    def __str__(self):
        changed = [
            f"{name}={value}"
            for name, value in vars(self).items()
            if value != getattr(Case, name)
        ]
        return ", ".join(changed) or "plain"


class Inputs:
    """Random tensors of a case, with the prefix in shuffled slots of the pool."""

    def __init__(self, case: Case, seed: int = 0):
        self.case = case
        gen = torch.Generator().manual_seed(seed)
        v_dim = case.v_dim or case.dim
        kv_dtype = case.kv_dtype or case.dtype
        num_new = sum(case.extend)
        if case.window > 0:
            # As update_sliding_window_buffer does: a request's last keys alone.
            self.prefix = [min(n, case.window) for n in case.prefix]
        else:
            self.prefix = list(case.prefix)

        def draw(*shape):
            return torch.randn(*shape, generator=gen)

        self.q = draw(num_new + case.spare_rows, case.heads, case.dim).to(case.dtype)
        self.k = draw(num_new, case.kv_heads, case.dim).to(case.dtype)
        self.v = draw(num_new, case.kv_heads, v_dim).to(case.dtype)
        num_slots = sum(self.prefix) + num_new + 7
        self.k_buffer = draw(num_slots, case.kv_heads, case.dim).to(kv_dtype)
        self.v_buffer = draw(num_slots, case.kv_heads, v_dim).to(kv_dtype)
        self.slots = torch.randperm(num_slots, generator=gen)
        self.kv_indices = self.slots[: sum(self.prefix)]
        self.new_slots = self.slots[sum(self.prefix) : sum(self.prefix) + num_new]
        if case.unified:
            self.k_buffer[self.new_slots] = self.k.to(kv_dtype)
            self.v_buffer[self.new_slots] = self.v.to(kv_dtype)
        # A slot that no request holds may contain anything
        free = self.slots[sum(self.prefix) + num_new :]
        self.k_buffer[free] = float("nan")
        self.v_buffer[free] = float("nan")
        self.sinks = draw(case.heads) if case.sinks else None
        self.offsets = [
            max(full - kept, 0) if case.mask else 0
            for full, kept in zip(case.prefix, self.prefix)
        ]
        if case.unified:
            self.offsets = [0] * len(self.prefix)
        self.masks = None
        if case.mask:
            self.masks = [
                self.make_mask(gen, offset + prefix, extend)
                for offset, prefix, extend in zip(
                    self.offsets, self.prefix, case.extend
                )
            ]

    def make_mask(self, gen, prefix, extend):
        rows = torch.arange(extend)
        mask = torch.ones(extend, prefix + extend, dtype=torch.bool)
        mask = mask.tril(diagonal=prefix)
        if self.case.mask == "tree":
            new = torch.rand(extend, extend, generator=gen) < 0.5
            new[rows, rows] = True
            mask[:, prefix:] = new.tril()
        elif self.case.mask == "image":
            # A span whose tokens all see each other, across row blocks
            begin, end = extend // 4, extend - extend // 8
            mask[begin:end, prefix + begin : prefix + end] = True
        elif self.case.mask == "all":
            mask = torch.rand(extend, prefix + extend, generator=gen) < 0.5
            mask[rows, prefix + rows] = True
        return mask

    def oracle(self):
        """Attention in float64 from the definition, one sequence at a time."""
        case = self.case
        outs = []
        new_begin = prefix_begin = 0
        for i, (prefix, extend) in enumerate(zip(self.prefix, case.extend)):
            slots = self.kv_indices[prefix_begin : prefix_begin + prefix]
            new = slice(new_begin, new_begin + extend)
            new_k, new_v = self.k[new].double(), self.v[new].double()
            if case.unified:
                new_k = self.k_buffer[self.new_slots[new]].double() * case.k_scale
                new_v = self.v_buffer[self.new_slots[new]].double() * case.v_scale
            keys = torch.cat([self.k_buffer[slots].double() * case.k_scale, new_k])
            values = torch.cat([self.v_buffer[slots].double() * case.v_scale, new_v])
            keys, values = keys.to(DEVICE), values.to(DEVICE)
            group = case.heads // case.kv_heads
            keys = keys.repeat_interleave(group, dim=1)
            values = values.repeat_interleave(group, dim=1)

            visible = torch.ones(extend, prefix + extend, dtype=torch.bool)
            q_pos = prefix + torch.arange(extend)
            k_pos = torch.arange(prefix + extend)
            if case.mask:
                visible = self.masks[i][:, self.offsets[i] :].clone()
                if case.mask != "all" and not case.unified:
                    visible[:, :prefix] = True
            elif case.causal:
                visible &= q_pos[:, None] >= k_pos[None, :]
            if case.window > 0:
                visible &= q_pos[:, None] <= k_pos[None, :] + case.window
            for first in range(0, extend, ORACLE_ROWS):
                rows = slice(first, first + ORACLE_ROWS)
                queries = self.q[new][rows].double().to(DEVICE)
                scores = torch.einsum("qhd,khd->hqk", queries, keys)
                scores *= case.dim**-0.5
                if case.cap > 0:
                    scores = case.cap * torch.tanh(scores / case.cap)
                if case.temperature_len > 0:
                    scale = self.temperature(q_pos[rows])
                    scores *= scale.to(DEVICE)[None, :, None]
                scores.masked_fill_(~visible[rows].to(DEVICE), float("-inf"))
                if case.sinks:
                    sink = self.sinks.double().to(DEVICE)[:, None, None]
                    sink = sink.expand(-1, scores.shape[1], 1)
                    scores = torch.cat([scores, sink], dim=-1)
                probs = torch.softmax(scores, dim=-1)[..., : prefix + extend]
                outs.append(torch.einsum("hqk,khd->qhd", probs, values).cpu())
            new_begin += extend
            prefix_begin += prefix
        return torch.cat(outs)

    def temperature(self, q_pos):
        """A factor for queries beyond temperature_len; the variants have their own."""
        length = float(self.case.temperature_len)
        if self.case.unified:
            return torch.where(q_pos >= length, length / (q_pos + 1.0), 1.0)
        scale = torch.log2(q_pos.double()) / torch.log2(torch.tensor(length))
        return torch.where(q_pos > length, scale, 1.0)

    def run(self):
        case = self.case

        def indptr(lengths):
            return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(DEVICE)

        q, k, v = (x.to(DEVICE) for x in (self.q, self.k, self.v))
        if case.fused:
            sizes = [x[0].numel() for x in (q, k, v)]
            qkv = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)
            views = qkv.split(sizes, dim=1)
            q, k, v = (x.unflatten(1, y.shape[1:]) for x, y in zip(views, (q, k, v)))
        k_buffer, v_buffer = self.k_buffer.to(DEVICE), self.v_buffer.to(DEVICE)
        o = torch.full((*q.shape[:2], v.shape[-1]), 7.0, dtype=case.dtype).to(DEVICE)
        # As the backend has them: of unlike types
        qo_indptr, kv_indptr = indptr(case.extend).long(), indptr(self.prefix)
        kv_indices = self.kv_indices.to(DEVICE)
        mask = mask_indptr = offsets = None
        if case.mask:
            mask = torch.cat([m.flatten() for m in self.masks]).to(DEVICE)
            mask_indptr = indptr([m.numel() for m in self.masks])
            offsets = torch.tensor(self.offsets, dtype=torch.int32, device=DEVICE)
        sinks = None if self.sinks is None else self.sinks.to(DEVICE)
        common = dict(
            logit_cap=case.cap,
            sliding_window_size=case.window,
            sinks=sinks,
            xai_temperature_len=case.temperature_len,
        )
        if case.unified:
            indptr_all, indices_all, prefix_lens = (
                extend_attention.build_unified_kv_indices(
                    kv_indptr,
                    kv_indices,
                    qo_indptr[:-1],
                    qo_indptr.diff().to(torch.int32),
                    self.new_slots.to(DEVICE),
                    len(case.extend),
                )
            )
            extend_attention.extend_attention_fwd_unified(
                q,
                o,
                k_buffer,
                v_buffer,
                case.k_scale,
                case.v_scale,
                qo_indptr,
                indptr_all,
                indices_all,
                prefix_lens.to(torch.int32),
                max(case.extend),
                custom_mask=mask,
                mask_indptr=mask_indptr,
                is_causal=case.causal,
                **common,
            )
        else:
            extend_attention.extend_attention_fwd(
                q,
                k,
                v,
                o,
                k_buffer,
                v_buffer,
                qo_indptr,
                kv_indptr,
                kv_indices,
                mask,
                case.causal,
                mask_indptr,
                max(case.extend),
                case.k_scale,
                case.v_scale,
                skip_prefix_custom_mask=case.mask != "all",
                window_kv_offsets=offsets,
                **common,
            )
        return o.cpu()


def check(case: Case, seed: int = 0):
    check_inputs(Inputs(case, seed))


def check_inputs(inputs: Inputs):
    case = inputs.case
    out = inputs.run()
    expected = inputs.oracle()
    num_new = sum(case.extend)
    error = (out[:num_new].double() - expected).abs() / expected.abs().clamp(min=1)
    tolerance = TOLERANCE[case.dtype]
    if case.kv_dtype is not None:
        tolerance = 0.2  # queries and probabilities are rounded to 8 bits as well
    assert error.max() < tolerance, f"{case}: off by {error.max():.3g}"
    # Rows that belong to no sequence are not written.
    assert (out[num_new:] == 7.0).all()


WINDOWS = [-1, 0, 1, 127, 1023]
FEATURES = [
    Case(),
    Case(causal=False),
    Case(causal=False, window=9),
    Case(window=1),
    Case(window=33),
    Case(window=33, sinks=True),
    Case(mask="tree"),
    Case(mask="tree", window=9, prefix=(30, 11)),
    Case(mask="image", extend=(5, 100)),
    Case(mask="image", extend=(5, 100), window=20),
    Case(mask="all"),
    Case(sinks=True),
    Case(cap=30.0),
    Case(cap=5.0, temperature_len=16),
    Case(temperature_len=16),
    Case(k_scale=0.5, v_scale=2.0),
    Case(dim=80),
    Case(dim=192, v_dim=128),
    Case(fused=True),
    Case(fused=True, window=33, dim=192, v_dim=128),
    Case(heads=8, kv_heads=1, prefix=(0, 0)),
    Case(extend=(1, 0, 66, 1), prefix=(90, 4, 0, 0), spare_rows=3),
]


@pytest.mark.parametrize("unified", [False, True], ids=["", "unified"])
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_against_float64(case, unified):
    if unified and case.mask == "tree" and case.window > 0:
        case = replace(case, window=-1)  # the backend never asks for it
    check(replace(case, unified=unified))


@given(data=st.data())
def test_any_batch(data):
    """Lengths around the tiles' edges, with every pair of bounds that meets there."""
    batch = data.draw(st.integers(1, 3))
    lengths = st.sampled_from([0, 1, 2, 31, 32, 33, 63, 64, 65, 100])
    extend = data.draw(st.lists(lengths, min_size=batch, max_size=batch).filter(any))
    prefix = data.draw(st.lists(lengths, min_size=batch, max_size=batch))
    unified = data.draw(st.booleans())
    case = Case(
        extend=tuple(extend),
        prefix=tuple(prefix),
        heads=2,
        kv_heads=data.draw(st.sampled_from([1, 2])),
        dim=16,
        window=data.draw(st.sampled_from([-1, 1, 31, 32, 33, 64, 95])),
        causal=data.draw(st.booleans()),
        sinks=data.draw(st.booleans()),
        unified=unified,
    )
    check(case, seed=data.draw(st.integers(0, 9)))


def test_mask_of_more_than_two_to_the_31_elements():
    """The last rows of a long chunk behind a long prefix, of which the window is left."""
    inputs = Inputs(Case(extend=(256,), prefix=(16,), window=16, mask="all"))
    (mask,) = inputs.masks
    inputs.offsets = [2**31 // len(mask)]
    # Little of it is ever touched before it is copied.
    wide = torch.empty(len(mask), inputs.offsets[0] + mask.shape[1], dtype=torch.bool)
    wide[:, inputs.offsets[0] :] = mask
    inputs.masks = [wide]
    check_inputs(inputs)


@pytest.mark.gpu  # NumPy's products, in the interpreter, depend on a row's place
def test_chunks_do_not_change_the_unified_answer():
    """A row's sum is taken in one order, wherever the chunks of a prompt end."""
    whole = Inputs(Case(extend=(96,), prefix=(0,), unified=True))
    expected = whole.run()
    for cut in (1, 31, 64, 95):
        part = Inputs(Case(extend=(96 - cut,), prefix=(cut,), unified=True))
        part.q = whole.q[cut:]
        part.k_buffer, part.v_buffer = whole.k_buffer, whole.v_buffer
        part.kv_indices = whole.new_slots[:cut]
        part.new_slots = whole.new_slots[cut:]
        assert torch.equal(part.run(), expected[cut:]), cut


GPU_LENGTHS = [
    ((8192,), (0,)),
    ((300, 1, 77, 1024), (0, 4100, 33, 2048)),
    ((1,) * 64, tuple(37 * i for i in range(64))),
    ((16,), (65536,)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("extend,prefix", GPU_LENGTHS, ids=["8192", "mix", "64", "64k"])
@pytest.mark.parametrize(
    "dim,v_dim,heads,kv_heads",
    [
        (64, 64, 8, 8),
        (96, 96, 8, 4),
        (128, 128, 8, 2),
        (192, 128, 4, 4),
        (256, 256, 8, 4),
        (512, 512, 8, 1),
        (576, 512, 16, 1),
    ],
)
def test_on_gpu(dim, v_dim, heads, kv_heads, extend, prefix, window):
    if extend == (8192,):
        heads, kv_heads = max(1, heads // kv_heads), 1
    case = Case(
        extend=extend,
        prefix=prefix,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        v_dim=v_dim,
        window=window,
        dtype=torch.bfloat16,
    )
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dim,unified", [(128, False), (512, False), (256, True)])
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features_on_gpu(case, dim, unified):
    if unified and case.mask == "tree" and case.window > 0:
        case = replace(case, window=-1)
    long = dict(extend=(300, 129), prefix=(700, 65)) if len(case.extend) == 2 else {}
    check(replace(case, dim=dim, v_dim=None, unified=unified, **long))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256, 512])
@pytest.mark.parametrize("window", [-1, 127])
def test_fp8_cache_on_gpu(dim, window):
    check(
        Case(
            extend=(40, 200),
            prefix=(600, 65),
            dim=dim,
            window=window,
            k_scale=0.5,
            v_scale=2.0,
            dtype=torch.bfloat16,
            kv_dtype=torch.float8_e4m3fn,
        )
    )
