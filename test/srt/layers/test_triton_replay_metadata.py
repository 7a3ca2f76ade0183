"""What the Triton backend writes for a CUDA graph of decode or verification, against an
oracle in plain Python.

On CUDA where there is a GPU, else on CPU tensors in Triton's interpreter.
"""

import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import window_layer
from graph_replay import CONTEXT, DEVICE, SPLITS, WINDOW, Launches, Replay
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.layers.attention import triton_backend
from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")
register_cuda_ci(est_time=20, suite="stage-b-test-1-gpu-small")


@pytest.fixture(autouse=True, scope="module")
def _one_process():
    with window_layer.one_process():
        yield


LENGTHS = st.one_of(
    st.sampled_from([1, 2, 511, 512, 513, 1022, 1023, 1024, 1025, 2048, CONTEXT]),
    st.integers(1, CONTEXT),
)


@settings(max_examples=30)
@given(data=st.data())
def test_what_a_replay_writes(data):
    draw = data.draw
    verify = draw(st.booleans())
    # A request that decodes has a token; a verified one may have drafted tokens alone.
    lengths = st.one_of(st.just(0), LENGTHS) if verify else LENGTHS
    lengths = draw(st.lists(lengths, min_size=1, max_size=4))
    padding = draw(st.integers(0, 2))
    replay = Replay(
        len(lengths) + padding + draw(st.integers(0, 1)),
        drafts=draw(st.integers(1, 8)),
        heads=draw(st.sampled_from([(16, 2), (32, 8), (8, 8), (3, 1)])),
        window=draw(st.sampled_from([WINDOW, 1])),
        hybrid=draw(st.booleans()),
        splits=draw(st.sampled_from(SPLITS)),
    )
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    replay.check(lengths, verify, padding, dtype=dtype)


@pytest.mark.parametrize("verify", [False, True])
def test_many_requests(verify):
    """Few programs each, which take several blocks, or one of more than 256 requests."""
    for count in (130, 260):
        lengths = [1 + 7 * i % 97 for i in range(count)]
        lengths[3], lengths[-1] = CONTEXT, 1500
        Replay(count).check(lengths, verify)


@pytest.mark.parametrize("splits", SPLITS)
def test_kv_splits(splits):
    Replay(3, splits=splits).check([2000, 5, 1024], verify=False)


@pytest.mark.parametrize("verify", [False, True])
def test_a_shorter_batch_follows(verify):
    replay = Replay(3)
    replay.check([2000, 5, 1024], verify)
    replay.check([7, 1023], verify)


def test_custom_mask():
    replay = Replay(2)
    backend = replay.backend
    backend.verify_reads_mask = True
    backend._verify_mask = SimpleNamespace(
        buffer=torch.full((5000,), 2, dtype=torch.uint8, device=DEVICE)
    )
    mask = torch.arange(3000, device=DEVICE) % 2
    replay.update([300, 400], verify=True, mask=mask)
    assert backend._verify_mask.buffer[:3000].tolist() == mask.tolist()
    assert (backend._verify_mask.buffer[3000:] == 2).all()


@pytest.mark.parametrize("verify", [False, True])
def test_more_requests_than_the_buffers_hold(verify):
    replay = Replay(3)
    replay.backend.kv_indptr = replay.backend.kv_indptr[:3]
    with pytest.raises(AssertionError):
        replay.update([1, 2, 3], verify)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("verify", [False, True])
def test_a_replay_is_two_launches(verify, padding):
    """One for what is read, and one for where sliding layers write."""
    replay, launches = Replay(3), Launches()
    init = replay.backend.init_forward_metadata_out_graph

    def watched(batch):
        with launches:
            init(batch)

    kernels = dict(update_replay_metadata=mock.Mock(), map_write_slots=mock.Mock())
    with mock.patch.multiple(triton_backend, **kernels), mock.patch.object(
        replay.backend, "init_forward_metadata_out_graph", watched
    ):
        replay.update([5, 1500], verify, padding)
    assert [kernel.call_count for kernel in kernels.values()] == [1, 1]
    assert not launches.seen


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from sglang.kernels.ops.attention.replay_metadata import (
    _update_replay_metadata_kernel as kernel,
)


def compile_for_hopper(verify, window, hybrid, seq_lens_type, requests):
    none = ["qo_indptr", "mask_indptr"]
    if verify:
        none = ["num_kv_splits_ptr", "uneven_batch_ptr"]
    if not window:
        none += [name for name in kernel.arg_names if "window" in name]
    if not hybrid:
        none += ["token_mapping_ptr"]
    constants = dict.fromkeys(none, None) | dict(MAX_NUM_SEQ=requests)
    types = {}
    for name in kernel.arg_names:
        types[name] = "*i32" if name.endswith(("_ptr", "indptr")) else "i32"
    wide = ["req_pool_indices_ptr", "token_mapping_ptr"]
    wide += ["kv_indices_ptr", "window_kv_indices_ptr", "qo_indptr", "mask_indptr"]
    types |= dict.fromkeys(wide, "*i64") | dict(seq_lens_ptr=seq_lens_type)
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(types)
        if types[name].startswith("*")
    }
    constants = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    compile_kernel(
        ASTSource(kernel, types, constants, aligned), target=GPUTarget("cuda", 90, 32)
    )


compile_for_hopper(False, True, True, "*i32", 256)
compile_for_hopper(True, True, True, "*i64", 256)
compile_for_hopper(False, False, False, "*i64", 512)
compile_for_hopper(True, True, False, "*i32", 1024)
"""


def test_compiles_for_hopper_without_a_gpu():
    """With the backend's types, which the interpreter does not check."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
