"""Where the Gluon kernel for head size 512 is taken, and what Hopper's kernels become.

On Hopper the tests of test_extend_attention_hopper.py run it; Gluon has no interpreter.
"""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from test_extend_attention_hopper import (  # noqa: F401
    Case,
    Inputs,
    _interpret,
    check,
    extend_attention_hopper,
)

WIDE = Case(dim=512, heads=2, kv_heads=1, extend=(3,), prefix=(2,))


@pytest.mark.parametrize(
    "case,taken",
    [
        (WIDE, True),
        (replace(WIDE, dim=256), False),
        (replace(WIDE, dim=496), False),
        (replace(WIDE, window=2), False),
        (replace(WIDE, sinks=True), False),
        (replace(WIDE, cap=30.0), False),
    ],
    ids=str,
)
def test_where_it_is_taken(case, taken, monkeypatch):
    """It computes what it is given; all else stays with the Triton kernel."""
    fused = mock.Mock()
    monkeypatch.setattr(extend_attention_hopper, "_get_gluon_fwd", lambda: fused)
    if taken:
        Inputs(case).run()
    else:
        check(case)
    assert fused.called == taken


def test_without_gluon_the_triton_kernel_answers(monkeypatch, caplog):
    name = "sglang.kernels.ops.attention.extend_attention_gluon"
    monkeypatch.setitem(sys.modules, name, None)  # as if its import failed
    extend_attention_hopper._get_gluon_fwd.cache_clear()
    check(WIDE)
    check(WIDE)
    extend_attention_hopper._get_gluon_fwd.cache_clear()
    told = [r for r in caplog.records if "head size 512" in r.getMessage()]
    assert len(told) == 1


COMPILE = r"""
import json
import re
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel
from triton.experimental.gluon._runtime import GluonASTSource

from sglang.kernels.ops.attention import extend_attention_gluon as gluon
from sglang.kernels.ops.attention import extend_attention_hopper as hopper

TYPES = dict(kv_indices="*i64", qo_indptr="*i64", kv_indptr="*i32")
TYPES |= dict(lookahead_ptr="*i32")
TYPES |= dict.fromkeys(("qk_scale", "sm_scale"), "fp32")


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
    ptx = compiled.asm["ptx"]
    names = re.findall(r"\t(?:@\S+ )?(\w+)", compiled.asm["sass"])
    products = [i for i, name in enumerate(names) if name == "HGMMA"]
    among = names[products[0] : products[-1]]
    facts = dict(
        shared=compiled.metadata.shared,
        wgmma="wgmma.mma_async" in ptx,
        copies="cp.async.cg.shared.global" in ptx,
        descriptors="cp.async.bulk.tensor" in ptx,
        spills=names.count("LDL") + names.count("STL"),
        products=len(products),
        moves_among=among.count("R2UR"),
        syncs_among=among.count("WARPSYNC"),
    )
    print(json.dumps(facts))


if sys.argv[1] == "gluon":
    compile_for_hopper(
        GluonASTSource,
        gluon._fwd_kernel_gluon,
        HEAD_DIM=gluon.HEAD_DIM,
        BLOCK_M=gluon.BLOCK_M,
        BLOCK_N=gluon.BLOCK_N,
    )
else:
    window, lookahead = map(int, sys.argv[1].split())
    BLOCK_M, BLOCK_N, num_stages, _ = hopper._get_tiles(256)
    more = {}
    if "lookahead_ptr" in hopper._fwd_kernel_hopper.arg_names:
        more = dict(HAS_LOOKAHEAD=bool(lookahead))
        more |= {} if lookahead else dict(lookahead_ptr=None)
    compile_for_hopper(
        ASTSource,
        hopper._fwd_kernel_hopper,
        SLIDING_WINDOW_SIZE=window,
        LOGIT_CAP=0.0,
        HEAD_DIM=256,
        BLOCK_D=256,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        NUM_STAGES=num_stages,
        HAS_SINK=False,
        sink_ptr=None,
        **more,
    )
"""


@functools.cache
def facts(what):
    """Of a kernel compiled for Hopper with the backend's types, without a GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, what],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("what", ["gluon", "-1 0", "1023 0", "1023 1"])
def test_it_compiles_for_hopper_without_a_gpu(what):
    """Into the shared memory, with Hopper's instructions."""
    found = facts(what)
    assert found["shared"] <= 227 * 1024
    assert found["wgmma"]
    assert found["copies"]
    assert found["descriptors"] == (what == "gluon")


@pytest.mark.parametrize(
    "what,spills", [("gluon", 0), ("-1 0", 64), ("1023 0", 64), ("1023 1", 72)]
)
def test_products_take_their_operands_from_uniform_registers(what, spills):
    """Triton 3.8 takes a sum's or a maximum's result for one that may differ between
    threads. Where a loop ended by it, every product's descriptor was moved to the
    registers that wgmma wants, warps were synchronized between products, and more was
    spilled: head size 512 took 4.0 ms instead of 2.9.
    """
    found = facts(what)
    assert found["syncs_among"] == 0
    assert found["moves_among"] < found["products"] / 2
    assert found["spills"] <= spills


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [256, 512])
@pytest.mark.parametrize(
    "extend,prefix", [((2048,), (500,)), ((1000,) * 4, (0,) * 4)], ids=["one", "four"]
)
def test_the_same_bits_every_time(dim, extend, prefix):
    """Copies that overtake the products which read their buffers do so now and then."""
    case = Case(extend, prefix, heads=16, dim=dim, dtype=torch.bfloat16)
    inputs = Inputs(case)
    first, by_hopper = inputs.run()
    assert by_hopper
    for _ in range(40):
        assert torch.equal(inputs.run()[0], first)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
