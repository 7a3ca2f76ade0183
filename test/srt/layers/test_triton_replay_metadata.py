"""What the Triton backend writes for a CUDA graph of decode or verification, against an
oracle in plain Python.

On CUDA where there is a GPU, else on CPU tensors in Triton's interpreter.
"""

import importlib.util
import math
import os
import subprocess
import sys
from itertools import accumulate
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Set for this module alone: servers that other tests start must not inherit it.
INTERPRET = {} if CUDA else {"TRITON_INTERPRET": "1"}
from sglang.srt.layers.attention import triton_backend  # noqa: E402

if not CUDA:
    # Another copy, so that other tests keep theirs.
    with mock.patch.dict(os.environ, INTERPRET):
        spec = importlib.util.find_spec(triton_backend.__name__)
        triton_backend = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(triton_backend)

from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from sglang.test.ci.ci_register import (  # noqa: E402
    register_cpu_ci,
    register_cuda_ci,
)

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")
register_cuda_ci(est_time=20, suite="stage-b-test-1-gpu-small")

WINDOW, CONTEXT, SLOTS = 1023, 3100, 2**14
CORES, MOST, TILE = 132, 8, 256
UNWRITTEN, AROUND = -7, 4096


@pytest.fixture(autouse=True, scope="module")
def _interpret():
    with mock.patch.dict(os.environ, INTERPRET):
        yield


def _backend(
    rows, drafts=4, heads=(16, 2), window=WINDOW, hybrid=True, splits="dynamic"
):
    """A backend whose graphs hold `rows` requests, and whose buffers nobody wrote."""
    backend = object.__new__(triton_backend.TritonAttnBackend)
    generator = torch.Generator().manual_seed(rows)
    mapping = torch.randperm(SLOTS, generator=generator).to(DEVICE)
    allocator = SimpleNamespace(full_to_swa_index_mapping=mapping)
    # A verify step writes beyond the context, a draft behind it reads that.
    pool = torch.randint(SLOTS, (rows, CONTEXT + 3 * drafts), generator=generator)
    vars(backend).update(
        device=DEVICE,
        skip_prefill=False,
        num_head=heads[0],
        num_kv_head=heads[1],
        v_head_dim=1,
        swa_v_head_dim=None,
        sliding_window_size=window,
        max_context_len=CONTEXT,
        max_kv_splits=MOST,
        scale_kv_splits=True,
        device_core_count=0 if splits == "no cores" else CORES,
        static_kv_splits=splits == "static",
        enable_deterministic=splits == "deterministic",
        split_tile_size=TILE if splits == "deterministic" else None,
        num_draft_tokens=drafts,
        req_to_token=pool.to(DEVICE, torch.int32),
        token_to_kv_pool_allocator=allocator if hybrid else object(),
        window_kv_indptr=None,
    )
    backend.kv_indptr = torch.zeros(rows + 1, dtype=torch.int32)
    backend.qo_indptr = backend.mask_indptr = torch.zeros(rows + 1, dtype=torch.int64)
    if window:
        backend.window_kv_indptr = backend.kv_indptr
    backend.init_cuda_graph_state(rows, rows * drafts)
    for name, buffer in _buffers(backend).items():
        # Between two others, so that what is written beside it is seen.
        room = torch.full((len(buffer) + 2 * AROUND,), UNWRITTEN, dtype=buffer.dtype)
        buffer = room.to(DEVICE)[AROUND:-AROUND]
        if name.endswith("indptr"):
            buffer[0] = 0
        setattr(backend, name, buffer)
    return backend


def _buffers(backend):
    names = ["kv_indptr", "cuda_graph_kv_indices", "cuda_graph_num_kv_splits"]
    if not backend.skip_prefill:
        names += ["qo_indptr", "mask_indptr"]
    if backend.sliding_window_size:
        names += ["window_kv_indptr", "cuda_graph_window_kv_indices"]
        names += ["cuda_graph_window_num_kv_splits", "cuda_graph_window_kv_offsets"]
    return {name: getattr(backend, name) for name in names}


def _num_kv_splits(backend, lengths):
    heads, kv_heads = backend.num_head, backend.num_kv_head
    most = backend.get_max_kv_splits(len(lengths))
    if backend.enable_deterministic:
        return [-(-length // TILE) for length in lengths]
    if backend.static_kv_splits or not backend.device_core_count:
        return [most] * len(lengths)
    longest, shortest = max(lengths), min(lengths)
    # Lengths that differ by less than a fifth are taken as equal.
    if longest < 1.25 * shortest:
        shortest = longest
    growth = np.log2(np.float32(longest) / np.float32(64))
    programs = len(lengths) * -(-heads // min(16, heads // kv_heads))
    cores = int(np.float32(CORES) * max(growth, np.float32(1)))
    chunks = [
        math.ceil(longest / min(math.ceil(wanted), most))
        for wanted in (longest / shortest, cores / programs)
    ]
    return [max(math.ceil(length / chunk) for chunk in chunks) for length in lengths]


def _expected(backend, lengths, rows, verify):
    """What each buffer holds afterwards."""
    count, drafts = len(lengths), backend.num_draft_tokens
    expected = {name: buffer.tolist() for name, buffer in _buffers(backend).items()}

    def write(name, values, first=0):
        expected[name][first : first + len(values)] = values

    kept = [backend.req_to_token[r, :n].tolist() for r, n in zip(rows, lengths)]
    write("kv_indptr", list(accumulate(lengths)), 1)
    write("cuda_graph_kv_indices", [slot for slots in kept for slot in slots])
    if verify:
        seen = [drafts * (drafts + length) for length in lengths]
        write("mask_indptr", list(accumulate(seen)), 1)
        write("qo_indptr", [drafts * i for i in range(1, count + 1)], 1)
    else:
        write("cuda_graph_num_kv_splits", _num_kv_splits(backend, lengths))
    if backend.sliding_window_size:
        # Those before a decoded token and its own; a drafted token's own is not cached.
        seen = backend.sliding_window_size + (not verify)
        windows = [slots[-seen:] for slots in kept]
        inside = [len(window) for window in windows]
        slots = [slot for window in windows for slot in window]
        allocator = backend.token_to_kv_pool_allocator
        if isinstance(allocator, SimpleNamespace):
            mapping = allocator.full_to_swa_index_mapping.tolist()
            slots = [mapping[slot] for slot in slots]
        write("window_kv_indptr", list(accumulate(inside)), 1)
        write("cuda_graph_window_kv_indices", slots)
        if verify:
            before = [length - n for length, n in zip(lengths, inside)]
            write("cuda_graph_window_kv_offsets", before)
        else:
            splits = _num_kv_splits(backend, inside)
            write("cuda_graph_window_num_kv_splits", splits)
    return expected


def _update(
    backend, lengths, rows, verify, dtype=torch.int32, capture=False, mask=None
):
    mode = ForwardMode.TARGET_VERIFY if verify else ForwardMode.DECODE
    count = len(lengths)
    # The graph runner's buffers are longer than the batch.
    lens = torch.tensor([*lengths, 1, 1], dtype=dtype, device=DEVICE)
    indices = torch.tensor([*rows, 0, 0], device=DEVICE)
    lens, indices = lens[:count], indices[:count]
    info = None if mask is None else SimpleNamespace(custom_mask=mask)
    if capture:
        tokens = count * (backend.num_draft_tokens if verify else 1)
        backend.init_forward_metadata_capture_cuda_graph(
            count, tokens, indices, lens, None, mode, info
        )
    else:
        backend.init_forward_metadata_replay_cuda_graph(
            count, indices, lens, sum(lengths), None, mode, info, None
        )


def _check(backend, lengths, rows, verify, **how):
    expected = _expected(backend, lengths, rows, verify)
    _update(backend, lengths, rows, verify, **how)
    for name, buffer in _buffers(backend).items():
        assert buffer.tolist() == expected[name], name
        for beside in (buffer._base[:AROUND], buffer._base[-AROUND:]):
            assert (beside == UNWRITTEN).all(), name


LENGTHS = st.one_of(
    st.sampled_from([1, 2, 511, 512, 513, 1022, 1023, 1024, 1025, 2048, CONTEXT]),
    st.integers(1, CONTEXT),
)


SPLITS = ["dynamic", "static", "no cores", "deterministic"]


@given(data=st.data())
def test_what_a_replay_writes(data):
    draw = data.draw
    verify, window = draw(st.booleans()), draw(st.sampled_from([WINDOW, 1, None]))
    # A request that decodes has a token; a verified one may have drafted tokens alone.
    lengths = st.one_of(st.just(0), LENGTHS) if verify else LENGTHS
    lengths = draw(st.lists(lengths, min_size=1, max_size=5))
    rows = draw(st.permutations(range(len(lengths))))
    padding = draw(st.integers(0, 2))
    spare = draw(st.integers(0, 1))
    backend = _backend(
        len(lengths) + padding + spare,
        drafts=draw(st.integers(1, 8)),
        heads=draw(st.sampled_from([(16, 2), (32, 8), (8, 8), (3, 1)])),
        window=window,
        hybrid=draw(st.booleans()),
        splits=draw(st.sampled_from(SPLITS)),
    )
    fill = backend.get_cuda_graph_seq_len_fill_value()
    _check(
        backend,
        lengths + [fill] * padding,
        rows + [0] * padding,
        verify,
        dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        capture=draw(st.booleans()),
    )


@pytest.mark.parametrize("verify", [False, True])
def test_many_requests(verify):
    """Few programs each, which take several blocks, or one of more than 256 requests."""
    for count in (130, 260):
        lengths = [1 + 7 * i % 97 for i in range(count)]
        lengths[3], lengths[-1] = CONTEXT, 1500
        _check(_backend(count), lengths, list(range(count))[::-1], verify)


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("window", [WINDOW, None])
def test_kv_splits(splits, window):
    backend = _backend(3, window=window, splits=splits)
    _check(backend, [2000, 5, 1024], [1, 0, 2], verify=False)


@pytest.mark.parametrize("verify", [False, True])
def test_drafted_beyond_the_context(verify):
    for rows in (1, 3):
        backend = _backend(rows)
        _check(backend, [CONTEXT + 12] * rows, list(range(rows)), verify)


@pytest.mark.parametrize("verify", [False, True])
def test_a_shorter_batch_follows(verify):
    backend = _backend(3)
    _check(backend, [2000, 5, 1024], [1, 0, 2], verify)
    _check(backend, [7, 1023], [2, 1], verify)


def test_draft_of_several_branches():
    """Its backend does not prefill, and has a row a branch."""
    backend = _backend(4, drafts=1)
    backend.skip_prefill = True
    del backend.qo_indptr, backend.mask_indptr
    _check(backend, [9, 9, 1500, 1500], [1, 1, 0, 0], verify=False)


@pytest.mark.parametrize("capture", [False, True])
def test_custom_mask(capture):
    backend = _backend(2)
    backend.cuda_graph_custom_mask.fill_(2)
    mask = torch.arange(3000, device=DEVICE) % 2 == 1
    _check(backend, [300, 400], [1, 0], True, mask=mask, capture=capture)
    assert backend.cuda_graph_custom_mask[:3000].tolist() == mask.tolist()
    assert (backend.cuda_graph_custom_mask[3000:] == 2).all()


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("window", [WINDOW, None])
def test_what_a_graph_is_captured_with(verify, window):
    """The buffers that replays write, as long as the batch where that matters."""
    backend = _backend(4, window=window)
    _update(backend, [5, 2000], [3, 1], verify, capture=True)
    metadata = backend.forward_metadata
    fields = {"kv_indptr": 3, "kv_indices": None}
    if window:
        fields |= {"window_kv_indptr": 3, "window_kv_indices": None}
        fields |= {"window_num_kv_splits": None}
    if verify:
        fields |= {"qo_indptr": 3, "mask_indptr": 3}
        if window:
            fields |= {"window_kv_offsets": None}
    else:
        fields |= {"num_kv_splits": None}
    for name in ("kv", "qo", "mask", "window_kv"):
        fields.setdefault(f"{name}_indptr", 0)
    for name, length in fields.items():
        found = getattr(metadata, name)
        if length == 0:
            assert found is None
            continue
        buffer = getattr(backend, f"cuda_graph_{name}", getattr(backend, name, None))
        assert found.data_ptr() == buffer.data_ptr()
        assert found.shape[0] == (length or buffer.shape[0])


@pytest.mark.parametrize("verify", [False, True])
def test_more_requests_than_the_buffers_hold(verify):
    backend = _backend(2)
    backend.kv_indptr = torch.zeros(9, dtype=torch.int32, device=DEVICE)
    with pytest.raises((AssertionError, RuntimeError)):
        _update(backend, [1, 2, 3], [0, 1, 0], verify)


@pytest.mark.parametrize("verify", [False, True])
def test_a_replay_is_one_launch(verify):
    backend = _backend(2)
    kernel = mock.MagicMock()
    launched = []

    class Launches(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            launched.append(func)
            return func(*args, **(kwargs or {}))

    mode = ForwardMode.TARGET_VERIFY if verify else ForwardMode.DECODE
    rows, lengths = torch.arange(2, device=DEVICE), torch.ones(2, device=DEVICE)
    with mock.patch.object(triton_backend, "update_cuda_graph_metadata_triton", kernel):
        with Launches():
            backend.init_forward_metadata_replay_cuda_graph(
                2, rows, lengths, 2, None, mode, None, None
            )
    assert kernel.__getitem__.return_value.call_count == 1
    assert not launched


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from sglang.srt.layers.attention.triton_backend import (
    update_cuda_graph_metadata_triton as kernel,
)


def compile_for_hopper(verify, window, hybrid, seq_lens_type, requests):
    none = ["qo_indptr", "mask_indptr"]
    if verify:
        none = ["num_kv_splits_ptr"]
    if not window:
        none += [name for name in kernel.arg_names if "window" in name]
    if not hybrid:
        none += ["full_to_swa_index_mapping_ptr"]
    constants = dict.fromkeys(none, None)
    constants |= dict(req_to_token_ptr_stride=262144, MAX_NUM_SEQ=requests)
    types = {}
    for name in kernel.arg_names:
        types[name] = "*i32" if name.endswith(("_ptr", "indptr")) else "i32"
    wide = ["req_pool_indices_ptr", "full_to_swa_index_mapping_ptr"]
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
