"""Layers without keys and values of their own, in piecewise CUDA graphs of a prefill.

As Gemma 4's E2B and E4B have them: attention is handed no k and v, and reads another
layer's from the pool.
"""

import importlib.util
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from sglang.srt.compilation.piecewise_context_manager import set_forward_context
from sglang.srt.layers import radix_attention
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")

# The op is registered for a GPU; its function is in a copy of the module.
spec = importlib.util.spec_from_file_location("copy", radix_attention.__file__)
copy = importlib.util.module_from_spec(spec)
with mock.patch(
    "sglang.srt.utils.custom_op.register_custom_op", lambda **_: lambda op: op
):
    spec.loader.exec_module(copy)


@pytest.mark.parametrize("shared", [True, False])
def test_attention_of_the_graph_takes_a_batchs_own_rows(shared):
    seen = []

    def attend(q, k, v, layer, forward_batch, save_kv_cache):
        seen.append((k, v, len(forward_batch.out_cache_loc)))
        return 2 * q

    q, output = torch.randn(8, 4), torch.zeros(8, 4)
    k = v = None if shared else torch.randn(8, 1, 4)
    batch = SimpleNamespace(
        num_token_non_padded_cpu=5,
        out_cache_loc=torch.arange(8),
        out_cache_loc_swa=None,
        token_to_kv_pool=None,
        attn_backend=SimpleNamespace(forward=attend),
    )
    with set_forward_context(batch, [None], None, [], []):
        copy.unified_attention_with_output(q, k, v, output, not shared, 0)
    ((seen_k, seen_v, slots),) = seen
    assert slots == 5 and len(batch.out_cache_loc) == 8
    if shared:
        assert seen_k is None and seen_v is None
    else:
        assert torch.equal(seen_k, k[:5]) and torch.equal(seen_v, v[:5])
    assert torch.equal(output[:5], 2 * q[:5]) and not output[5:].any()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v"]))
