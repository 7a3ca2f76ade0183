"""How many tiles decode attention has in flight, and that they fit a Hopper GPU."""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

from sglang.kernels.ops.attention import decode_attention
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")


@pytest.mark.parametrize(
    "hopper, k_size, v_size, dtype, stages",
    [
        (True, 512, 512, torch.bfloat16, 3),
        (True, 512, 512, torch.float8_e4m3fn, 3),
        (True, 256, 256, torch.bfloat16, 2),
        (True, 576, 512, torch.bfloat16, 2),
        (False, 512, 512, torch.bfloat16, 2),
    ],
)
def test_stages(hopper, k_size, v_size, dtype, stages, monkeypatch):
    monkeypatch.setattr(decode_attention, "is_sm90_supported", lambda: hopper)
    launched = {}
    kernel = mock.MagicMock()  # for want of a GPU, its launch is looked at
    kernel.__getitem__.return_value = lambda *_, **options: launched.update(options)
    monkeypatch.setattr(decode_attention, "_fwd_grouped_kernel_stage1", kernel)
    k = torch.zeros(4, 2, k_size, dtype=dtype)
    v = torch.zeros(4, 2, v_size, dtype=dtype)
    q = torch.zeros(1, 16, k_size)
    indices = torch.zeros(4, dtype=torch.int64)
    decode_attention._decode_grouped_att_m_fwd(
        *(q, k, v, torch.zeros(1, 16, 8, v_size), torch.zeros(1, 16, 8)),
        *(torch.tensor([0, 4]), indices, torch.tensor([1]), 8, 1.0, 0.0),
    )
    assert launched["num_stages"] == stages


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from sglang.kernels.ops.attention import decode_attention

kernel = decode_attention._fwd_grouped_kernel_stage1
constants = dict(
    kv_group_num=8, q_head_num=16, BLOCK_DMODEL=512, BLOCK_DPE=0, BLOCK_DV=512,
    BLOCK_N=32, BLOCK_H=16, MIN_BLOCK_KV=32, logit_cap=0.0, xai_temperature_len=-1,
    Lk=512, Lv=512, HAS_MLA=False, USE_PDL=False, IS_GFX1250=False, PAGE_SIZE=1,
    SCORE_MOD=None,
)
types, values = {}, {}
POINTERS = dict(Q="*bf16", K_Buffer="*bf16", V_Buffer="*bf16", kv_indptr="*i32")
POINTERS |= dict(kv_indices="*i64", Att_Out="*fp32", Att_Lse="*fp32")
POINTERS |= dict(num_kv_splits="*i32", sm_scale_withk="fp32")
for index, name in enumerate(kernel.arg_names):
    if name in constants or name in {p.name for p in kernel.params if p.is_constexpr}:
        types[name], values[index,] = "constexpr", constants.get(name)
    elif name not in POINTERS and not name.startswith("stride"):
        types[name], values[index,] = "constexpr", None
    else:
        types[name] = POINTERS.get(name, "i32")
aligned = {
    (index,): [["tt.divisibility", 16]]
    for index, name in enumerate(types)
    if types[name].startswith("*") or name.startswith("stride")
}
compiled = compile(
    ASTSource(kernel, types, values, aligned),
    target=GPUTarget("cuda", 90, 32),
    options=dict(num_warps=4, num_stages=3),
)
print(compiled.metadata.shared)
"""


def test_two_blocks_fit_a_multiprocessor():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    shared = int(done.stdout.split()[-1])
    assert shared <= 227 * 1024 // 2  # two blocks a multiprocessor


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
