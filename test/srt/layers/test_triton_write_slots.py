"""Where sliding layers write in a CUDA graph of decode or verification: one launch says it,
against an oracle in plain Python."""

import sys
from unittest import mock

import pytest
import window_layer
from graph_replay import Replay

from sglang.srt.layers.attention import triton_backend
from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci

register_cpu_ci(est_time=15, suite="stage-a-test-cpu")
register_cuda_ci(est_time=10, suite="stage-b-test-1-gpu-small")


@pytest.fixture(autouse=True, scope="module")
def _in_one_process():
    with window_layer.one_process():
        yield


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("verify", [False, True])
def test_write_slots_are_mapped_in_one_launch(verify, padding):
    """A shorter batch follows a longer one."""
    kernel = triton_backend.map_write_slots
    with mock.patch.object(
        triton_backend, "map_write_slots", side_effect=kernel
    ) as called:
        replay = Replay(4)
        replay.check([5, 1500], verify, padding)
        replay.check([1024], verify, padding)
    assert called.call_count == 2


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
