"""The Triton backend hands new keys and values to its kernels where they are, views of a
fused projection's output, and copies those whose loads would be narrower."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import window_layer
from window_layer import DEVICE, WindowLayer

from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")
register_cuda_ci(est_time=10, suite="stage-b-test-1-gpu-small")

LENGTHS, PREFIXES = [9, 26, 3], [0, 7, 2]
TOKENS = sum(LENGTHS) - sum(PREFIXES)
HEADS, DIM = WindowLayer.HEADS, WindowLayer.DIM
WIDTH = (HEADS + 2) * DIM


@pytest.fixture(autouse=True, scope="module")
def _one_process():
    with window_layer.one_process():
        yield


def projected(width=WIDTH, first=0, step=1):
    """q, k and v in the output of one projection that has `width` columns."""
    torch.manual_seed(0)
    columns = torch.randn(TOKENS, width, device=DEVICE)[:, first:]
    columns = columns[:, : WIDTH * step : step]
    q, k, v = columns.split([HEADS * DIM, DIM, DIM], dim=-1)
    return q, k.unflatten(-1, (1, DIM)), v.unflatten(-1, (1, DIM))


def extend(q, k, v):
    """What a prefill answers, and where the keys and values that its kernel got are."""
    layer = WindowLayer(6, len(LENGTHS), max(LENGTHS))
    batch = layer.extend(LENGTHS, PREFIXES)
    layer.backend.init_forward_metadata(batch)
    kernel = mock.Mock(wraps=layer.backend.extend_attention_fwd)
    with mock.patch.object(layer.backend, "extend_attention_fwd", kernel):
        out = layer.backend.forward_extend(
            q.contiguous(), k, v, layer.layer, batch, save_kv_cache=False
        )
    return out, kernel.call_args.args[1:3]


def is_at(x, y):
    return (x.data_ptr(), x.stride()) == (y.data_ptr(), y.stride())


def test_a_prefill_reads_views():
    q, k, v = projected()
    assert not k.is_contiguous()
    out, read = extend(q, k, v)
    copied, _ = extend(q, k.contiguous(), v.contiguous())
    assert is_at(read[0], k) and is_at(read[1], v)
    assert torch.equal(out, copied)


def test_a_verify_reads_views():
    q, k, v = projected()
    drafted = TOKENS // len(LENGTHS)
    q, k, v = (x[: drafted * len(LENGTHS)] for x in (q, k, v))
    layer = WindowLayer(6, len(LENGTHS), max(LENGTHS) + drafted)
    info = SimpleNamespace(num_tokens_per_req=drafted, custom_mask=None)
    batch = layer.batch(ForwardMode.TARGET_VERIFY, LENGTHS, spec_info=info)
    layer.backend.init_forward_metadata(batch)
    kernel = mock.Mock()
    with mock.patch.multiple(
        layer.backend,
        create=True,
        use_verify_attention=True,
        verify_attention_fwd=kernel,
    ):
        layer.backend.forward_extend(
            q.contiguous(), k, v, layer.layer, batch, save_kv_cache=False
        )
    read = kernel.call_args.args[1:3]
    assert is_at(read[0], k) and is_at(read[1], v)


@pytest.mark.parametrize(
    "how",
    [
        dict(width=WIDTH + 16, first=1),
        dict(width=WIDTH + 5),
        dict(width=2 * WIDTH, step=2),
    ],
    ids=["address", "stride of tokens", "stride of elements"],
)
def test_what_would_load_narrowly_is_copied(how):
    q, k, v = projected(**how)
    out, read = extend(q, k, v)
    copied, _ = extend(q, k.contiguous(), v.contiguous())
    assert not is_at(read[0], k) and not is_at(read[1], v)
    assert all(x.is_contiguous() for x in read)
    assert torch.equal(out, copied)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
