#!/usr/bin/env bash
# Triton 3.8.0: on Hopper the result of tl.sum (and so of gl.sum) counts as a number that
# may differ between threads. The reduction now ends in shuffles, which ptxas cannot know
# to be the same in all threads; 3.6.0 read its result from one place in shared memory.
# Where a loop of matrix products ends by it, the descriptors of the products no longer
# stay in uniform registers: R2UR moves them there between the products. A large kernel
# also synchronizes warps there and spills. So what a loop ends by is better loaded.
#
# Seen on 2026-11-30 with triton 3.6.0 and 3.8.0, R2UR between the 8 products (HGMMA):
#            end is loaded   end is a sum
#   3.6.0                0              0
#   3.8.0                0             28
#
# It compiles for Hopper and needs no GPU. Exits with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/loop.py" <<'PYTHON'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def loop(A, B, C, ends, BY_SUM: tl.constexpr):
    if BY_SUM:
        end = tl.sum(tl.load(ends + tl.arange(0, 128)))
    else:
        end = tl.load(ends)
    rows = tl.arange(0, 64)
    cols = tl.arange(0, 128)
    a = tl.load(A + rows[:, None] * 128 + cols[None, :])
    acc = tl.zeros([64, 64], tl.float32)
    for start in range(0, end, 64):
        b = tl.load(B + (start + rows)[:, None] * 128 + cols[None, :])
        acc += tl.dot(a, b.T)
    tl.store(C + rows[:, None] * 64 + rows[None, :], acc)


TYPES = dict(A="*bf16", B="*bf16", C="*fp32", ends="*i32", BY_SUM="constexpr")
ALIGNED = {(i,): [["tt.divisibility", 16]] for i in range(4)}


def moves(by_sum):
    compiled = triton.compile(
        ASTSource(loop, TYPES, {(4,): by_sum}, ALIGNED),
        target=GPUTarget("cuda", 90, 32),
        options=dict(num_warps=4),
    )
    names = re.findall(r"\t(?:@\S+ )?(\w+)", compiled.asm["sass"])
    products = [i for i, name in enumerate(names) if name == "HGMMA"]
    assert len(products) == 8, f"{len(products)} products"
    return names[products[0] : products[-1]].count("R2UR")


found = [moves(False), moves(True)]
print(f"triton {triton.__version__}: R2UR {found[0]} if loaded, {found[1]} if a sum")
if found != [int(n) for n in sys.argv[1:]]:
    raise SystemExit(f"not as seen, {sys.argv[1:]}: this finding is out of date")
PYTHON
export TRITON_CACHE_DIR="$folder/cache"
for seen in "3.6.0 0 0" "3.8.0 0 28"; do
    read -r version loaded summed <<<"$seen"
    "${PYTHON:-python3}" -m venv "$folder/$version"
    "$folder/$version/bin/python" -m pip --quiet install "triton==$version"
    "$folder/$version/bin/python" "$folder/loop.py" "$loaded" "$summed"
done
