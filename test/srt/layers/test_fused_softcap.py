"""The softcap of the logits, fused with their cast to float32, against float64.

On CUDA where there is a GPU, else on CPU tensors in Triton's interpreter.
"""

import importlib
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Set for this module alone: servers that other tests start must not inherit it.
INTERPRET = {} if CUDA else {"TRITON_INTERPRET": "1"}
with mock.patch.dict(os.environ, INTERPRET):
    import triton
    import triton.language as tl

    import sglang.srt.layers.logits_processor as ops

    if not CUDA:
        # Another copy, so that other tests keep theirs.
        spec = importlib.util.find_spec(ops.__name__)
        ops = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(ops)

    @triton.jit
    def _tanh(x):
        return 2 * tl.sigmoid(2 * x) - 1


from sglang.test.ci.ci_register import (  # noqa: E402
    register_cpu_ci,
    register_cuda_ci,
)

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")
register_cuda_ci(est_time=15, suite="stage-b-test-1-gpu-small")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
CAP = 30.0


@pytest.fixture(autouse=True)
def _interpret(monkeypatch):
    """The interpreter has no libdevice."""
    if not CUDA:
        monkeypatch.setattr(ops, "libdevice", SimpleNamespace(tanh=_tanh))
    with mock.patch.dict(os.environ, INTERPRET):
        yield


def _logits(rows, columns, dtype, padding=0):
    """Small and large ones, in rows that are `padding` longer and NaN there."""
    gen = torch.Generator().manual_seed(rows)
    wide = torch.full((rows, columns + padding), float("nan"))
    scale = torch.logspace(-3, 2, columns)
    wide[:, :columns] = torch.randn(rows, columns, generator=gen) * scale
    return wide.to(dtype).to(DEVICE)[:, :columns]


def _check(got, logits):
    assert got.dtype == torch.float32 and got.shape == logits.shape
    expected = CAP * torch.tanh(logits.double() / CAP)
    assert (got.double() - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 1024), (2, 2500)])
def test_the_cast_changes_nothing(rows, columns, dtype, padding, buffer):
    """To the bit what the kernel makes of logits that were cast before."""
    logits = _logits(rows, columns, dtype, padding)
    before = logits.clone()
    cast = logits.float().contiguous()
    out = torch.full((rows, columns), 7.0, device=DEVICE) if buffer else None
    got = ops.fused_softcap(logits, CAP, out=out)
    assert out is None or got is out
    assert torch.equal(logits, before)
    _check(got, logits)
    assert torch.equal(got, ops.fused_softcap(cast, CAP))


@pytest.mark.parametrize("padding", [0, 5])
def test_float32_is_capped_in_place(padding):
    logits = _logits(3, 70, torch.float32, padding)
    before = logits.clone()
    assert ops.fused_softcap(logits, CAP) is logits
    _check(logits, before)


def test_columns_side_by_side():
    """As an all-gather over an uneven vocabulary leaves them."""
    logits = _logits(3, 70, torch.bfloat16)
    _check(ops.fused_softcap(logits.T.contiguous().T, CAP), logits)


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("cpu", [False, True])
def test_the_processor_caps_into_the_buffer(buffer, cpu, monkeypatch):
    """With and without the kernel: float32, cut to the vocabulary, capped."""
    monkeypatch.setattr(ops, "_is_cpu", cpu)
    monkeypatch.setattr(
        ops, "get_global_server_args", lambda: SimpleNamespace(rl_on_policy_target=None)
    )
    processor = object.__new__(ops.LogitsProcessor)
    torch.nn.Module.__init__(processor)
    processor.vocab_size, processor.final_logit_softcapping = 70, CAP
    processor.logit_scale, processor.use_fp32_lm_head = None, False
    processor.do_tensor_parallel_all_gather = False
    processor.do_tensor_parallel_all_gather_dp_attn = False
    out = torch.zeros(4, 70, device=DEVICE) if buffer else None
    hidden = _logits(4, 16, torch.bfloat16)
    lm_head = SimpleNamespace(weight=_logits(72, 16, torch.bfloat16))
    got = processor._get_logits(
        hidden, lm_head, SimpleNamespace(next_token_logits_buffer=out)
    )
    assert out is None or got.data_ptr() == out.data_ptr() or cpu
    _check(got, (hidden @ lm_head.weight.T)[:, :70])
