"""Where the Gluon kernel for head size 512 is taken, and that Hopper's kernels compile.

On Hopper the tests of test_extend_attention.py run it; Gluon has no interpreter.
"""

import os
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from test_extend_attention import (  # noqa: F401
    Case,
    Inputs,
    _interpret,
    check,
    extend_attention,
)

WIDE = Case(dim=512, heads=2, kv_heads=1, extend=(3,), prefix=(2,))


@pytest.mark.parametrize(
    "case,taken",
    [
        (WIDE, True),
        (replace(WIDE, window=2), True),
        (replace(WIDE, dtype=torch.bfloat16), True),
        (replace(WIDE, dtype=torch.float32), False),
        (replace(WIDE, kv_dtype=torch.float8_e5m2), False),
        (replace(WIDE, dim=256), False),
        (replace(WIDE, v_dim=256), False),
        (replace(WIDE, causal=False), False),
        (replace(WIDE, mask="tree"), False),
        (replace(WIDE, sinks=True), False),
        (replace(WIDE, cap=30.0), False),
        (replace(WIDE, temperature_len=2), False),
        (replace(WIDE, k_scale=0.5), False),
        (replace(WIDE, v_scale=2.0), False),
        (replace(WIDE, unified=True), False),
    ],
    ids=str,
)
def test_where_the_hopper_kernel_is_taken(case, taken, monkeypatch):
    """It computes what it is given; all else stays with the Triton kernel."""
    fused = mock.Mock()
    monkeypatch.setattr(extend_attention, "_is_hopper", True)
    monkeypatch.setattr(
        extend_attention, "extend_attention_fwd_gluon", fused, raising=False
    )
    if taken or case.kv_dtype:
        # What 8 bits leave of a few keys is tested with more of them.
        Inputs(case).run()
    else:
        check(case)
    assert fused.called == taken


def test_the_hopper_kernel_stays_out_elsewhere():
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        assert extend_attention._is_hopper
    else:
        assert not extend_attention._is_hopper


COMPILE = """
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel
from triton.experimental.gluon._runtime import GluonASTSource

from sglang.srt.layers.attention.triton_ops import extend_attention as triton_ops
from sglang.srt.layers.attention.triton_ops import extend_attention_gluon as gluon

TYPES = dict(kv_indices="*i64", qo_indptr="*i64", kv_indptr="*i32", prefix_lens="*i32")
TYPES |= dict.fromkeys(
    ("qk_scale", "sm_scale", "k_scale", "v_scale", "sm_scale_withk"), "fp32"
)


def compile_for_hopper(source, kernel, **constants):
    types = {}
    for name in kernel.arg_names:
        tensor = name[0] in "QKVO"
        types[name] = TYPES.get(name, "*bf16" if tensor else "i32")
        if name in constants:
            types[name] = "constexpr"
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(types)
        if types[name].startswith("*") or name.startswith("stride")
    }
    constants = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    compiled = compile_kernel(
        source(kernel, types, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options=dict(num_warps=8),
    )
    assert compiled.metadata.shared <= 227 * 1024, compiled.metadata.shared
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert "cp.async.cg.shared.global" in compiled.asm["ptx"]


window = int(sys.argv[1])
compile_for_hopper(
    GluonASTSource,
    gluon._fwd_kernel_gluon,
    SLIDING_WINDOW_SIZE=window,
    HEAD_DIM=gluon.HEAD_DIM,
    BLOCK_M=gluon.BLOCK_M,
    BLOCK_N=gluon.BLOCK_N,
)
common = dict(SLIDING_WINDOW_SIZE=window, logit_cap=0.0, xai_temperature_len=-1)
common |= dict(Lq=256, Lv=256, BLOCK_DMODEL=256, BLOCK_DPE=0, BLOCK_DV=256)
common |= dict(BLOCK_M=128, BLOCK_N=64, NUM_STAGES=2, IS_CAUSAL=True)
common |= dict(mask_ptr=None, mask_indptr=None, sink_ptr=None)
common |= dict(USE_CUSTOM_MASK=False, HAS_SINK=False)
compile_for_hopper(
    ASTSource,
    triton_ops._fwd_kernel,
    **common,
    PREFIX_BLOCK_N=64,
    PREFIX_NUM_STAGES=2,
    SKIP_PREFIX_CUSTOM_MASK=True,
    STORE_TRANSPOSE=False,
    window_kv_offset_ptr=None,
)
compile_for_hopper(ASTSource, triton_ops._fwd_kernel_unified, **common)
"""


@pytest.mark.parametrize("window", [-1, 1023])
def test_extend_compiles_for_hopper_without_a_gpu(window):
    """With the backend's types, into the shared memory, with Hopper's instructions."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(window)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
