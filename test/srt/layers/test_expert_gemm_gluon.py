"""Both products of experts in Gluon: that they compile for Hopper, and what they compute.

Gluon has no interpreter; the tests marked `gpu` run what was compiled.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from expert_inputs import KINDS, SHAPES, Products, layer

from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9

register_cpu_ci(est_time=40, suite="stage-a-test-cpu")
register_cuda_ci(est_time=60, suite="stage-b-test-1-gpu-small")

COMPILE = """
import sys
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sglang.kernels.ops.moe import expert_gemm_gluon as m


class Compile:
    kernel = m.expert_gemm_kernel

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.compile(*args, grid=grid, **kwargs)

    def compile(self, *args, **kwargs):
        compiled = self.kernel.warmup(*args, **kwargs)
        assert compiled.metadata.shared <= 227 * 1024, compiled.metadata.shared
        with open(sys.argv.pop(1), "w") as f:
            f.write(compiled.asm["ptx"])


driver.set_active(
    SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
)
m.expert_gemm_kernel = Compile()
m._num_programs = lambda device: 132
empty = lambda *size: torch.empty(size, dtype=torch.bfloat16)
h, (*sorting, counter) = empty(1024, 704), torch.zeros((4, 1024), dtype=torch.int32)
m.expert_product(
    empty(64, 2816), empty(2, 1408, 2816), h, sorting, counter, 512, 8, True
)
m.expert_product(
    h, empty(2, 2816, 704), empty(1024, 2816), sorting, counter, 512, 8, False
)
"""


def test_they_compile_for_hopper_without_a_gpu(tmp_path):
    """Without spills, and so that products need not wait for each other."""
    import triton.backends.nvidia

    up, down = tmp_path / "up.ptx", tmp_path / "down.ptx"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, "-c", COMPILE, up, down], check=True, env=environment
    )
    ptxas = os.path.join(triton.backends.nvidia.__path__[0], "bin", "ptxas")
    for ptx, columns in (up, {"256", "128"}), (down, {"256"}):
        products = re.findall(r"wgmma\.mma_async\S+m64n(\d+)", ptx.read_text())
        assert set(products) == columns
        done = subprocess.run(
            [ptxas, "-v", "-arch=sm_90a", ptx, "-o", tmp_path / "kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        )
        said = done.stdout + done.stderr
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said
        assert "serializ" not in said, said  # products, by waiting for each
        assert int(re.search(r"Used (\d+) registers", said)[1]) <= 168


def error(got, want):
    """Of the worst row and of all, relative to the root mean square."""
    d = (got.double() - want).square().mean(-1).sqrt() / want.square().mean().sqrt()
    return d.max().item(), d.square().mean().sqrt().item()


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="Hopper")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens,shape", SHAPES)
def test_against_float64(tokens, kind, shape):
    """What bfloat16 leaves of gates, values and sums, and the same bits each time."""
    from sglang.kernels.ops.moe.expert_gemm_gluon import BLOCK_M, expert_product

    products = Products(*layer(tokens, kind, 0, torch.bfloat16, **shape), BLOCK_M.value)
    first = products.call(expert_product)
    for _ in range(2):
        assert all(map(torch.equal, first, products.call(expert_product)))
    for got, want in zip(first, (products.gated, products.down)):
        worst, mean = error(got, want)
        assert worst < 0.015 and mean < 0.006


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
