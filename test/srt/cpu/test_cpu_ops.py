"""The torch versions of sgl_kernel's CPU ops do what the Triton kernels do that other
devices run, and the CPU engine needs no sgl_kernel, whatever its CPU can.

The kernels run in Triton's interpreter, on random requests, trees and verdicts.
"""

import os
import random
import subprocess
import sys
import unittest
import unittest.mock

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"

import torch

from sglang.kernels.ops import cpu_ops
from sglang.kernels.ops.kvcache import cache_move
from sglang.kernels.ops.speculative import (
    cache_locs,
    eagle,
    multi_layer_eagle,
    spec_tree,
)
from sglang.srt.mem_cache import allocation
from sglang.srt.utils import next_power_of_2
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")

CASES = 20
POOL_LEN = 64

# On a CPU with AMX, whose ops the sgl_kernel of PyPI has nowhere.
WITH_AMX = """
import torch
torch.cpu._is_amx_tile_supported = lambda: True
from sglang.kernels.fused_op import _platform_key
from sglang.srt.arg_groups.overrides import _attention_backend_platform_fallbacks
from sglang.srt.layers import amx_utils, layernorm, linear, moe
from sglang.srt.runtime_context import get_platform
from sglang.srt.utils import common
from types import SimpleNamespace
assert common.is_amx_tile_supported
assert not common.cpu_has_amx_support() and not get_platform().has_amx
assert not layernorm._is_cpu_amx_available and _platform_key() == ""
args = SimpleNamespace(attention_backend="intel_amx", device="cpu")
print(_attention_backend_platform_fallbacks(args)["attention_backend"])
"""


class TestWithoutCPUBuild(CustomTestCase):
    def test_modules_import(self):
        """Those above and below are the ones that import an op of the CPU build."""
        self.assertIs(
            spec_tree.sgl_verify_tree_greedy_cpu, cpu_ops.verify_tree_greedy_cpu
        )
        self.assertIs(
            allocation.assign_req_to_token_pool_cpu,
            cpu_ops.assign_req_to_token_pool_cpu,
        )

    def test_amx_is_not_used(self):
        """A CPU with AMX takes the torch_native backend as one without does."""
        out = subprocess.run(
            [sys.executable, "-c", WITH_AMX], capture_output=True, text=True
        )
        self.assertEqual(out.returncode, 0, out.stderr)
        self.assertEqual(out.stdout.split()[-1], "torch_native")

    def test_op_of_the_cpu_build_is_taken(self):
        """A build that has an op is asked for it."""

        def some_op_cpu():
            pass

        class Ops:
            some_op_cpu = "of sgl_kernel"

        with (
            unittest.mock.patch.object(cpu_ops, "sgl_kernel", Ops),
            unittest.mock.patch.object(torch.ops, "sgl_kernel", Ops, create=True),
        ):
            self.assertEqual(
                cpu_ops._unless_in_sgl_kernel(some_op_cpu), "of sgl_kernel"
            )
            del Ops.some_op_cpu
            self.assertIs(cpu_ops._unless_in_sgl_kernel(some_op_cpu), some_op_cpu)


def _requests(rng: random.Random):
    """Rows of a pool, each with a range of positions (some empty)."""
    bs = rng.randint(1, 9)
    rows = torch.tensor(rng.sample(range(16), bs))
    start = torch.tensor([rng.randint(0, POOL_LEN - 8) for _ in range(bs)])
    end = start + torch.tensor([rng.randint(0, 8) for _ in range(bs)])
    pool = torch.randint(1, 1000, (16, POOL_LEN), dtype=torch.int32)
    return bs, rows, start, end, pool


class TestCPUOps(CustomTestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.rng = random.Random(0)

    def both(self, native, kernel, *outputs):
        """Run the op and the kernel on copies of `outputs`; all must be equal."""
        ours = [output.clone() for output in outputs]
        theirs = [output.clone() for output in outputs]
        native(*ours)
        kernel(*theirs)
        for a, b in zip(ours, theirs):
            self.assertEqual(a.tolist(), b.tolist())
        return ours

    def test_cache_locs(self):
        for _ in range(CASES):
            bs, rows, start, end, pool = _requests(self.rng)
            num = int((end - start).sum())
            self.both(
                lambda out: cpu_ops.assign_extend_cache_locs_cpu(
                    rows, pool, start, end, out, POOL_LEN
                ),
                lambda out: cache_locs.assign_extend_cache_locs[(bs,)](
                    rows, pool, start, end, out, POOL_LEN, next_power_of_2(bs)
                ),
                torch.full((num + 3,), -7),
            )
            slots = torch.randint(1, 1000, (num,))
            self.both(
                lambda pool: cpu_ops.assign_req_to_token_pool_cpu(
                    rows, pool, start, end, slots, POOL_LEN
                ),
                lambda pool: allocation.assign_req_to_token_pool[(bs,)](
                    rows, pool, start, end, slots, POOL_LEN, next_power_of_2(bs)
                ),
                pool,
            )
            topk, steps = self.rng.randint(1, 2), self.rng.randint(1, 4)
            self.both(
                lambda out: cpu_ops.assign_draft_cache_locs_contiguous_cpu(
                    rows, pool, start, out, POOL_LEN, topk, steps
                ),
                lambda out: cache_locs.assign_draft_cache_locs_contiguous[(bs,)](
                    rows, pool, start, out, POOL_LEN, topk, steps
                ),
                torch.full((bs * topk * steps,), -7),
            )

    def test_accepted(self):
        for _ in range(CASES):
            bs, width = self.rng.randint(1, 9), self.rng.randint(1, 5)
            tokens = torch.randint(1, 1000, (bs * width,))
            lens = torch.randint(1, width + 1, (bs,), dtype=torch.int32)
            self.both(
                lambda out: cpu_ops.fill_bonus_tokens_cpu(tokens, lens, out, width),
                lambda out: eagle.fill_bonus_tokens[(bs,)](tokens, lens, out, width),
                torch.full((bs,), -7),
            )
            index = torch.arange(bs * width).view(bs, width)
            index[torch.arange(width) >= lens[:, None]] = -1
            index, slots = index.flatten(), torch.randint(1, 1000, (bs * width,))
            self.both(
                lambda out: cpu_ops.fill_accept_out_cache_loc_cpu(index, slots, out),
                lambda out: eagle.fill_accept_out_cache_loc[(bs * width,)](
                    index, slots, out, next_power_of_2(bs * width)
                ),
                torch.full((bs * width,), -7),
            )

    def test_rotate_input_ids(self):
        for case in range(CASES):
            bs = self.rng.randint(1, 5)
            lens = torch.tensor([self.rng.randint(0, 9) for _ in range(bs)])
            start = lens.cumsum(0) - lens
            new = torch.randint(1, 1000, (bs, 1))
            select = start + torch.clamp(lens - 2, min=0) if case % 2 else None
            self.both(
                lambda ids: cpu_ops.rotate_input_ids_cpu(ids, start, lens, new, select),
                lambda ids: multi_layer_eagle.rotate_input_ids_kernel[(bs,)](
                    ids, start, lens, new, select, BLOCK_SIZE=16
                ),
                torch.randint(1, 1000, (int(lens.sum()) + 1,)),
            )

    def test_copy_all_layer_kv_cache(self):
        for _ in range(CASES):
            buffers = [torch.randn(32, 2, 8), torch.randn(32, 4).bfloat16()]
            num = self.rng.randint(1, 12)
            # Some slots are read and written.
            src = torch.tensor(self.rng.sample(range(32), num))
            tgt = torch.tensor(self.rng.sample(range(32), num))
            strides = torch.tensor([b[0].nbytes for b in buffers])

            def kernel(*buffers):
                cache_move.copy_all_layer_kv_cache_tiled[(2, 1)](
                    torch.tensor([b.data_ptr() for b in buffers], dtype=torch.uint64),
                    strides,
                    *(tgt, src, num, next_power_of_2(num)),
                    BYTES_PER_TILE=64,
                )

            self.both(
                lambda *buffers: cpu_ops.copy_all_layer_kv_cache_cpu(
                    torch.tensor([b.data_ptr() for b in buffers], dtype=torch.uint64),
                    *(strides, tgt, src),
                ),
                kernel,
                *buffers,
            )

    def test_tree(self):
        """Trees of EAGLE's shape, and greedy verdicts over them."""
        accepted = set()
        for case in range(4 * CASES):
            bs, topk = self.rng.randint(1, 3), self.rng.randint(1, 3)
            steps = self.rng.randint(1, 3)
            num_candidates = topk + (steps - 1) * topk * topk
            # Of some trees all is selected, and others have gaps.
            n = 1 + self.rng.choice(
                [num_candidates, self.rng.randint(1, num_candidates)]
            )
            selected = torch.stack(
                [torch.randperm(num_candidates)[: n - 1].sort()[0] for _ in range(bs)]
            )
            # Entry 0 is the bonus token; the others name candidates of a step before.
            parents = [
                [-1]
                + [
                    self.rng.randrange(max(0, topk + (step - 2) * topk * topk), end)
                    for step in range(1, steps)
                    for end in [topk + (step - 1) * topk * topk]
                    for _ in range(topk)
                ]
                for _ in range(bs)
            ]
            parents = torch.tensor(parents)
            seq_lens = torch.tensor([self.rng.randint(1, 9) for _ in range(bs)])
            mode = case % 2
            mask_len = n * n * bs + (0 if mode else int(seq_lens.sum()) * n)
            args = (topk, steps, n)
            outputs = self.both(
                lambda *out: cpu_ops.build_tree_kernel_efficient_cpu(
                    parents, selected, seq_lens, *out, *args, mode
                ),
                lambda *out: spec_tree.sgl_build_tree_kernel_triton(
                    *(parents, selected, seq_lens, *out, *args),
                    spec_tree.TreeMaskMode(mode),
                ),
                torch.ones(mask_len, dtype=torch.bool),
                torch.full((bs * n,), -1),
                *(torch.full((bs, n), -1) for _ in range(3)),
            )
            index, child, sibling = outputs[2:]
            tokens = torch.randint(0, 2, (bs, n))
            predicted = torch.randint(0, 2, (bs, n))
            _, _, count = self.both(
                lambda *out: cpu_ops.verify_tree_greedy_cpu(
                    *out, tokens, index, child, sibling, predicted
                ),
                lambda *out: spec_tree.verify_tree_greedy_triton(
                    *out, tokens, index, child, sibling, predicted
                ),
                torch.full((bs * n,), -7, dtype=torch.int32),
                torch.full((bs, steps + 1), -1, dtype=torch.int32),
                torch.full((bs,), -7, dtype=torch.int32),
            )
            accepted |= set(count.tolist())
        self.assertEqual(accepted, {0, 1, 2, 3})


if __name__ == "__main__":
    unittest.main()
