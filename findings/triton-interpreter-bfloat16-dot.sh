#!/usr/bin/env bash
# Triton 3.8.0: in the interpreter (TRITON_INTERPRET=1) tl.dot of two bfloat16 tiles
# multiplies the 16 bits that stand for the numbers, not the numbers. float16 and
# float32 tiles are multiplied right. So a kernel that only ever sees bfloat16 on a GPU
# cannot be tested in the interpreter in that type: test it in float16.
#
# Seen on 2026-11-29 with triton 3.8.0 and torch 2.13.0, largest error of a product of
# two 16 x 16 tiles of normal numbers:
#   float16   1.9e-06
#   bfloat16  2.6e+10
#
# Exits with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet install torch==2.13.0 numpy
"$folder/venv/bin/python" -m pip --quiet install --no-deps triton==3.8.0
cat >"$folder/dot.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def dot(A, B, C, N: tl.constexpr):
    i = tl.arange(0, N)
    tile = i[:, None] * N + i[None, :]
    tl.store(C + tile, tl.dot(tl.load(A + tile), tl.load(B + tile)))


print("triton", triton.__version__, "torch", torch.__version__)
errors = {}
for dtype in (torch.float16, torch.bfloat16):
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 16).to(dtype)
    c = torch.empty(16, 16)
    dot[(1,)](a, b, c, 16)
    errors[dtype] = (c - a.float() @ b.float()).abs().max().item()
    print(f"{dtype}: largest error {errors[dtype]:.1e}")
assert errors[torch.float16] < 1e-4, "float16 is no longer right"
assert errors[torch.bfloat16] > 1, "bfloat16 is right now: this finding is out of date"
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/dot.py"
