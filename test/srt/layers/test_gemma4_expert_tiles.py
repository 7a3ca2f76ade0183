"""The tiles of Gemma-4-26B-A4B's experts on an H200 are found, for the Triton that is
pinned, and are tiles that it can hold."""

import sys
from unittest import mock

import pytest
import torch

from sglang.srt.layers.moe.moe_runner import triton_utils
from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe_triton_config
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import published_topology

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")

EXPERTS, WIDTH, HIDDEN, TOPK = 128, 704, 2816, 8
SHARED = 227 * 1024  # bytes a block may have on Hopper
RESERVED = 1024
# Where the pre-sorted, padded rows of the descriptor loads begin to pay.
SORTED_FROM = 2048


@pytest.fixture(autouse=True)
def _on_an_h200(monkeypatch):
    monkeypatch.delenv("SGLANG_MOE_CONFIG_DIR", raising=False)
    monkeypatch.setattr(
        fused_moe_triton_config, "get_device_name", lambda: "NVIDIA H200"
    )
    fused_moe_triton_config.get_moe_configs.cache_clear()
    with published_topology(device="cpu"):
        yield
    fused_moe_triton_config.get_moe_configs.cache_clear()


def tiles(tokens):
    """Those of both projections, as the layer asks for them."""
    with mock.patch.object(triton_utils, "get_config", lambda: None):
        up, (down, _) = fused_moe_triton_config.try_get_optimal_moe_config(
            (EXPERTS, 2 * WIDTH, HIDDEN),
            (EXPERTS, HIDDEN, WIDTH),
            TOPK,
            None,
            tokens,
            return_down_config=True,
        )
    return up, down


def test_the_files_are_of_this_triton(caplog):
    tiles(1)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize("tokens", [1, 7, 80, 300, 1024, 1500, 2048, 8192, 16384])
def test_what_a_batch_is_given(tokens):
    up, down = tiles(tokens)
    # Both projections read one sorting of the rows.
    assert up["BLOCK_SIZE_M"] == down["BLOCK_SIZE_M"]
    assert not up.get("USE_TMA")
    assert bool(down.get("USE_TMA")) == (tokens > (1024 + SORTED_FROM) // 2)
    rows = tokens * TOPK / EXPERTS
    assert 16 <= up["BLOCK_SIZE_M"] <= max(16, 4 * rows)
    for tile in (up, down):
        m, n, k = (tile[f"BLOCK_SIZE_{x}"] for x in "MNK")
        room = SHARED - RESERVED
        assert (m + n) * k * tile["num_stages"] * torch.bfloat16.itemsize <= room
        assert m * n / (32 * tile["num_warps"]) <= 128  # accumulators of a thread


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
