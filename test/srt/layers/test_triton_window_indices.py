"""The Triton backend lists the keys of sliding windows without the host waiting for
the device, which alone knows how many they are.
"""

from types import SimpleNamespace

import pytest
import torch
import window_layer
from torch.utils._python_dispatch import TorchDispatchMode
from window_layer import WindowLayer, listed

from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")
register_cuda_ci(est_time=10, suite="stage-b-test-1-gpu-small")

WINDOW, ROOM = 6, 24
LENGTHS = [1, WINDOW, WINDOW + 1, 2 * WINDOW + 3]


class NoWait(TorchDispatchMode):
    """Fails where a tensor's value is asked for, as `item()` does and sizes do."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op is not torch.ops.aten._local_scalar_dense.default, "the host waits"
        return op(*args, **kwargs or {})


@pytest.fixture(autouse=True, scope="module")
def _one_process():
    with window_layer.one_process():
        yield


def prepare(mode):
    """A layer, and a batch of `mode` for requests of which so much is in the cache."""
    layer = WindowLayer(WINDOW, len(LENGTHS), ROOM)
    if mode.is_decode():
        return layer, layer.decode(LENGTHS)
    if mode.is_target_verify():
        batch = layer.batch(mode, LENGTHS)
        batch.spec_info = SimpleNamespace(num_tokens_per_req=2, custom_mask=None)
        return layer, batch
    return layer, layer.extend([length + 2 for length in LENGTHS], LENGTHS)


modes = pytest.mark.parametrize(
    "mode",
    [ForwardMode.DECODE, ForwardMode.TARGET_VERIFY, ForwardMode.EXTEND],
    ids=lambda mode: mode.name.lower(),
)


@modes
def test_no_size_is_asked_of_the_device(mode):
    layer, batch = prepare(mode)
    with NoWait():
        layer.backend.init_forward_metadata(batch)
    found = layer.backend.forward_metadata
    rows = listed(found.window_kv_indptr, found.window_kv_indices)
    for row, slots, length in zip(rows, layer.slots, LENGTHS):
        assert len(row) >= min(length, WINDOW)
        assert row == slots[:length].tolist()[-len(row) :]


@modes
@pytest.mark.gpu
def test_the_host_does_not_wait(mode):
    layer, batch = prepare(mode)
    layer.backend.init_forward_metadata(batch)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.backend.init_forward_metadata(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
