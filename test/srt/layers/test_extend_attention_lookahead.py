"""Extend attention in which some tokens see a few behind their own, as those of a
picture do, against the definition, in float64.

The kernels are Hopper's, the general one and the one of deterministic inference. Without
a GPU they run in Triton's interpreter, and only the name of the hardware is made up.
"""

import os
import sys
import unittest
from pathlib import Path
from unittest import mock

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parent))
import test_extend_attention_hopper as hopper
from test_extend_attention_hopper import DEVICE, INTERPRET, TOLERANCE, Case, Inputs

# That module has loaded them for this machine.
extend_attention = hopper.extend_attention

register_cpu_ci(est_time=50, suite="stage-a-test-cpu")
register_cuda_ci(est_time=30, suite="stage-b-test-1-gpu-small")


def setUpModule():
    global ENVIRONMENT
    ENVIRONMENT = mock.patch.dict(os.environ, INTERPRET)
    ENVIRONMENT.start()


def tearDownModule():
    ENVIRONMENT.stop()


def _lookahead(case: Case, pictures) -> torch.Tensor:
    """As the backend gets it. `pictures` are (sequence, first, last) of new tokens."""
    starts = torch.tensor([0, *case.extend]).cumsum(0).tolist()
    lookahead = torch.zeros(sum(case.extend) + case.spare_rows, dtype=torch.int32)
    for sequence, first, last in pictures:
        for token in range(first, last + 1):
            lookahead[starts[sequence] + token] = last - token
    return lookahead


def _oracle(inputs: Inputs, pictures) -> torch.Tensor:
    """Attention in float64, one query at a time."""
    case, group = inputs.case, inputs.case.heads // inputs.case.kv_heads
    outs, new_begin, prefix_begin = [], 0, 0
    for sequence, (prefix, extend) in enumerate(zip(inputs.prefix, case.extend)):
        slots = inputs.kv_indices[prefix_begin : prefix_begin + prefix]
        new = slice(new_begin, new_begin + extend)
        keys = torch.cat([inputs.k_buffer[slots], inputs.k[new]]).double()
        values = torch.cat([inputs.v_buffer[slots], inputs.v[new]]).double()
        keys = keys.repeat_interleave(group, dim=1)
        values = values.repeat_interleave(group, dim=1)
        for token in range(extend):
            last = token
            for of, first, end in pictures:
                if of == sequence and first <= token <= end:
                    last = end
            begin = max(0, prefix + token - case.window) if case.window > 0 else 0
            seen = slice(begin, prefix + last + 1)
            query = inputs.q[new][token].double()
            scores = torch.einsum("hd,khd->hk", query, keys[seen]) * case.dim**-0.5
            if case.cap > 0:
                scores = case.cap * torch.tanh(scores / case.cap)
            if case.sinks:
                scores = torch.cat([scores, inputs.sinks.double()[:, None]], dim=1)
            probs = scores.softmax(-1)[:, : keys[seen].shape[0]]
            outs.append(torch.einsum("hk,khd->hd", probs, values[seen]))
        new_begin += extend
        prefix_begin += prefix
    return torch.stack(outs)


def _unified(inputs: Inputs, lookahead) -> torch.Tensor:
    """The kernel of deterministic inference, which reads new keys from the pool too."""
    case, num_new = inputs.case, sum(inputs.case.extend)
    first_new = len(inputs.k_buffer)
    starts = torch.tensor([0, *case.extend]).cumsum(0).tolist()
    prefix_starts = torch.tensor([0, *inputs.prefix]).cumsum(0).tolist()
    slots = []
    for i in range(len(case.extend)):
        slots.append(inputs.kv_indices[prefix_starts[i] : prefix_starts[i + 1]])
        slots.append(torch.arange(starts[i], starts[i + 1]) + first_new)
    lengths = [p + e for p, e in zip(inputs.prefix, case.extend)]
    o = torch.full_like(inputs.q, 7.0).to(DEVICE)
    extend_attention.extend_attention_fwd_unified(
        inputs.q.to(DEVICE),
        o,
        torch.cat([inputs.k_buffer, inputs.k]).to(DEVICE),
        torch.cat([inputs.v_buffer, inputs.v]).to(DEVICE),
        1.0,
        1.0,
        torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32),
        torch.cat(slots).to(DEVICE),
        torch.tensor(inputs.prefix, dtype=torch.int32, device=DEVICE),
        max(case.extend),
        logit_cap=case.cap,
        sliding_window_size=case.window,
        sinks=None if inputs.sinks is None else inputs.sinks.to(DEVICE),
        lookahead=lookahead.to(DEVICE),
    )
    assert (o[num_new:] == 7.0).all()
    return o.cpu()


def _general(inputs: Inputs, lookahead) -> torch.Tensor:
    with mock.patch.object(
        extend_attention, "can_use_extend_attention_hopper", return_value=False
    ):
        out, by_hopper = inputs.run(lookahead=lookahead.to(DEVICE))
    assert not by_hopper
    return out


def _hopper(inputs: Inputs, lookahead) -> torch.Tensor:
    out, by_hopper = inputs.run(lookahead=lookahead.to(DEVICE))
    assert by_hopper
    return out


KERNELS = {"hopper": _hopper, "general": _general, "unified": _unified}
# Blocks have 64 or 128 rows: pictures within one, over two, from the first token to the
# last one, two in a sequence, longer and shorter than the window.
CASES = {
    "one": (Case(window=33), [(1, 10, 30)]),
    "over blocks": (Case(extend=(5, 300), window=33), [(1, 100, 290)]),
    "all of it": (Case(extend=(40, 140), window=20), [(0, 0, 39), (1, 0, 139)]),
    "two": (Case(extend=(200,), prefix=(0,), window=64), [(0, 5, 60), (0, 61, 190)]),
    "one token": (Case(window=33), [(1, 69, 69)]),
    "none": (Case(window=33), []),
    "sinks": (Case(window=33, sinks=True), [(0, 0, 3), (1, 20, 60)]),
    "cap": (Case(window=33, cap=5.0), [(1, 20, 60)]),
    "head 256": (Case(window=33, dim=256), [(1, 20, 60)]),
    "spare rows": (Case(window=33, spare_rows=3), [(1, 50, 69)]),
}


class TestLookahead(CustomTestCase):
    def check(self, kernel, case, pictures, seed=0):
        inputs = Inputs(case, seed)
        out = KERNELS[kernel](inputs, _lookahead(case, pictures))
        expected = _oracle(inputs, pictures)
        error = (out[: len(expected)].double() - expected).abs()
        error /= expected.abs().clamp(min=1)
        self.assertLess(error.max().item(), TOLERANCE[case.dtype])

    def test_cases(self):
        for kernel in KERNELS:
            for name, (case, pictures) in CASES.items():
                with self.subTest(name, kernel=kernel):
                    self.check(kernel, case, pictures)

    @settings(max_examples=settings().max_examples // 5)
    @given(st.data())
    def test_any(self, data):
        extend = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=3))
        prefix = [data.draw(st.integers(0, 60)) for _ in extend]
        pictures = []
        for sequence, length in enumerate(extend):
            ends = data.draw(st.lists(st.integers(0, length - 1), max_size=6))
            ends = sorted(set(ends))
            pictures += [(sequence, a, b) for a, b in zip(ends[::2], ends[1::2])]
        case = Case(
            extend=tuple(extend),
            prefix=tuple(prefix),
            window=data.draw(st.integers(1, 80)),
        )
        self.check(data.draw(st.sampled_from(sorted(KERNELS))), case, pictures)


if __name__ == "__main__":
    unittest.main()
