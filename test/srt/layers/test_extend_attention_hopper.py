"""Extend attention on Hopper against the definition, in float64.

Without a GPU the kernels run in Triton's interpreter on small shapes, and only the name
of the hardware is made up; the shapes that only a GPU can do in time are marked ``gpu``.
"""

import importlib
import os
import sys
from dataclasses import dataclass
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
    from sglang.kernels.ops.attention import (
        decode_attention,
        extend_attention,
        extend_attention_hopper,
    )

    for _module in (decode_attention, extend_attention_hopper, extend_attention):
        importlib.reload(_module)

# Bounds on |o - oracle| / max(1, |oracle|): the operands' rounding. Probabilities
# are rounded to the values' dtype before the second product.
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 2e-2}

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
    window: int = -1
    sinks: bool = False
    cap: float = 0.0
    dtype: torch.dtype = torch.float16
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
        num_new = sum(case.extend)
        # As the backend does: of a window's prefix a request's last keys alone.
        kept = case.window if case.window > 0 else max(case.prefix)
        self.prefix = [min(n, kept) for n in case.prefix]

        def draw(*shape):
            return torch.randn(*shape, generator=gen).to(case.dtype)

        self.q = draw(num_new + case.spare_rows, case.heads, case.dim)
        self.k = draw(num_new, case.kv_heads, case.dim)
        self.v = draw(num_new, case.kv_heads, case.dim)
        num_slots = sum(self.prefix) + 7
        self.k_buffer = draw(num_slots, case.kv_heads, case.dim)
        self.v_buffer = draw(num_slots, case.kv_heads, case.dim)
        slots = torch.randperm(num_slots, generator=gen)
        self.kv_indices = slots[: sum(self.prefix)]
        # A slot that no request holds may contain anything
        self.k_buffer[slots[sum(self.prefix) :]] = float("nan")
        self.v_buffer[slots[sum(self.prefix) :]] = float("nan")
        self.sinks = torch.randn(case.heads, generator=gen) if case.sinks else None

    def oracle(self) -> torch.Tensor:
        """Attention in float64 from the definition, one sequence at a time."""
        case = self.case
        outs = []
        new_begin = prefix_begin = 0
        for prefix, extend in zip(self.prefix, case.extend):
            slots = self.kv_indices[prefix_begin : prefix_begin + prefix]
            new = slice(new_begin, new_begin + extend)
            keys = torch.cat([self.k_buffer[slots], self.k[new]]).double().to(DEVICE)
            values = torch.cat([self.v_buffer[slots], self.v[new]]).double().to(DEVICE)
            group = case.heads // case.kv_heads
            keys = keys.repeat_interleave(group, dim=1)
            values = values.repeat_interleave(group, dim=1)
            q_pos = prefix + torch.arange(extend)
            k_pos = torch.arange(prefix + extend)
            visible = q_pos[:, None] >= k_pos[None, :]
            if case.window > 0:
                visible &= q_pos[:, None] <= k_pos[None, :] + case.window
            for first in range(0, extend, ORACLE_ROWS):
                rows = slice(first, first + ORACLE_ROWS)
                queries = self.q[new][rows].double().to(DEVICE)
                scores = torch.einsum("qhd,khd->hqk", queries, keys)
                scores *= case.dim**-0.5
                if case.cap > 0:
                    scores = case.cap * torch.tanh(scores / case.cap)
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

    def run(self, **kwargs) -> tuple[torch.Tensor, bool]:
        """Returns the output, and whether the Hopper kernel wrote it."""
        case = self.case

        def indptr(lengths):
            return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(DEVICE)

        q, k, v = (x.to(DEVICE) for x in (self.q, self.k, self.v))
        if case.fused:
            sizes = [x[0].numel() for x in (q, k, v)]
            qkv = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)
            views = qkv.split(sizes, dim=1)
            q, k, v = (x.unflatten(1, y.shape[1:]) for x, y in zip(views, (q, k, v)))
        o = torch.full_like(q, 7.0)
        arguments = dict(
            q_extend=q,
            k_extend=k,
            v_extend=v,
            o_extend=o,
            k_buffer=self.k_buffer.to(DEVICE),
            v_buffer=self.v_buffer.to(DEVICE),
            # As the backend has them: of unlike types
            qo_indptr=indptr(case.extend).long(),
            kv_indptr=indptr(self.prefix),
            kv_indices=self.kv_indices.to(DEVICE),
            custom_mask=None,
            is_causal=True,
            mask_indptr=None,
            max_len_extend=max(case.extend),
            k_scale=1.0,
            v_scale=1.0,
            logit_cap=case.cap,
            sliding_window_size=case.window,
            sinks=None if self.sinks is None else self.sinks.to(DEVICE),
        )
        arguments.update(kwargs)
        hopper = extend_attention.extend_attention_fwd_hopper
        with (
            mock.patch.object(extend_attention, "_is_hopper", True),
            mock.patch.object(
                extend_attention, "extend_attention_fwd_hopper", side_effect=hopper
            ) as called,
        ):
            extend_attention.extend_attention_fwd(**arguments)
        return o.cpu(), called.called


def check(case: Case, seed: int = 0):
    inputs = Inputs(case, seed)
    out, by_hopper = inputs.run()
    assert by_hopper
    expected = inputs.oracle()
    num_new = sum(case.extend)
    error = (out[:num_new].double() - expected).abs() / expected.abs().clamp(min=1)
    assert error.max() < TOLERANCE[case.dtype], f"{case}: off by {error.max():.3g}"
    # Rows that belong to no sequence are not written.
    assert (out[num_new:] == 7.0).all()


FEATURES = [
    Case(),
    Case(window=1),
    Case(window=33),
    Case(window=33, sinks=True),
    Case(sinks=True),
    Case(cap=30.0),
    Case(cap=5.0, window=33),
    Case(dim=80),
    Case(fused=True),
    Case(fused=True, window=33, dim=128),
    Case(heads=8, kv_heads=1, prefix=(0, 0)),
    Case(extend=(1, 0, 66, 1), prefix=(90, 4, 0, 0), spare_rows=3),
]


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_against_float64(case):
    check(case)


@given(data=st.data())
def test_any_batch(data):
    """Lengths around the tiles' edges, with every pair of bounds that meets there."""
    batch = data.draw(st.integers(1, 3))
    lengths = st.sampled_from([0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129])
    extend = data.draw(st.lists(lengths, min_size=batch, max_size=batch).filter(any))
    prefix = data.draw(st.lists(lengths, min_size=batch, max_size=batch))
    case = Case(
        extend=tuple(extend),
        prefix=tuple(prefix),
        heads=2,
        kv_heads=data.draw(st.sampled_from([1, 2])),
        dim=16,
        window=data.draw(st.sampled_from([-1, 1, 31, 32, 33, 64, 95, 128])),
        sinks=data.draw(st.booleans()),
    )
    check(case, seed=data.draw(st.integers(0, 9)))


@pytest.mark.parametrize(
    "name,value",
    [
        ("custom_mask", "all"),
        ("is_causal", False),
        ("xai_temperature_len", 16),
        ("k_scale", 0.5),
        ("skip_prefix", True),
        ("lse_extend", "lse"),
    ],
)
def test_what_it_does_not_know_goes_to_the_general_kernel(name, value):
    """Asks for what only the general kernel computes; that it ran is all that is
    checked, as its answers are not ours."""
    case = Case(extend=(5,), prefix=(3,), dim=16)
    kwargs = {name: value}
    if value == "all":
        mask = torch.ones(5, 8, dtype=torch.bool).tril(3).flatten().to(DEVICE)
        indptr = torch.tensor([0, mask.numel()], device=DEVICE)
        kwargs = dict(custom_mask=mask, mask_indptr=indptr)
    elif value == "lse":
        kwargs = dict(lse_extend=torch.empty(5, case.heads, device=DEVICE))
    out, by_hopper = Inputs(case).run(**kwargs)
    assert not by_hopper
    assert not (out == 7.0).all(dim=-1).any()


@pytest.mark.parametrize(
    "dim", [64, *(pytest.param(dim, marks=pytest.mark.gpu) for dim in (256, 512))]
)
def test_what_is_no_number_stays_in_its_sequence(dim):
    """Tiles that reach into the next sequence's keys weigh them with 0, and 0 times
    what is no number is none."""
    case = Case(extend=(70, 90, 33), prefix=(40, 30, 0), dim=dim)
    inputs = Inputs(case)
    inputs.k[70:160] = inputs.v[70:160] = float("nan")
    out, by_hopper = inputs.run()
    assert by_hopper
    error = (out.double() - inputs.oracle()).abs()
    others = torch.cat([error[:70], error[160:]])
    assert others.max() < TOLERANCE[case.dtype]


GPU_LENGTHS = [
    ((8192,), (0,)),
    ((300, 1, 77, 1024), (0, 4100, 33, 2048)),
    ((1,) * 64, tuple(37 * i for i in range(64))),
    ((16,), (65536,)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [-1, 1, 127, 1023])
@pytest.mark.parametrize("extend,prefix", GPU_LENGTHS, ids=["8192", "mix", "64", "64k"])
@pytest.mark.parametrize(
    "dim,heads,kv_heads",
    [(64, 8, 8), (96, 8, 4), (128, 8, 2), (256, 8, 4), (512, 8, 1)],
)
def test_on_gpu(dim, heads, kv_heads, extend, prefix, window):
    if extend == (8192,):
        heads, kv_heads = max(1, heads // kv_heads), 1
    check(
        Case(
            extend=extend,
            prefix=prefix,
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
            window=window,
            dtype=torch.bfloat16,
        )
    )


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
