"""What the launch that normalizes Gemma 4's q, k and v stores in the KV pool, and when.

On CUDA where there is a GPU, else on CPU tensors in Triton's interpreter.
"""

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gemma4_fused_qkv_norm import (  # noqa: F401, the fixture interprets
    DEVICE,
    DTYPES,
    Case,
    _interpret,
    attend,
    needs_gpu,
)
from tiny_gemma4 import ask_model, load_model

from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci

register_cpu_ci(est_time=40, suite="stage-a-test-cpu")
register_cuda_ci(est_time=40, suite="stage-b-test-1-gpu-small")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
# Layers 0 and 2 are sliding, 1 is full.
SLIDING, FULL = 2, 1
POOL_SHAPES = {SLIDING: (16, 8, 256), FULL: (16, 2, 512)}
SLOTS, SLIDING_SLOTS = 40, 20


def new_pool(
    dtype, sliding, full, layers=([0, 2], [1]), device=DEVICE, cls=SWAKVPool, **kwargs
) -> SWAKVPool:
    """A pool full of NaN; `sliding` and `full` are KV heads and their size."""
    pool = cls(
        size=SLOTS,
        size_swa=SLIDING_SLOTS,
        page_size=1,
        dtype=dtype,
        head_num=full[0],
        head_dim=full[1],
        swa_head_num=sliding[0],
        swa_head_dim=sliding[1],
        swa_v_head_dim=sliding[1],
        v_head_dim=full[1],
        swa_attention_layer_ids=layers[0],
        full_attention_layer_ids=layers[1],
        enable_kvcache_transpose=False,
        device=device,
        **kwargs,
    )
    for buffer in buffers(pool):
        buffer.fill_(float("nan"))
    return pool


def buffers(pool) -> list:
    pools = pool.full_kv_pool, pool.swa_kv_pool
    return [buffer for p in pools for buffer in (*p.k_buffer, *p.v_buffer)]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


def check_stored(pool, layer_id, slots, k, v):
    """Slots of a layer hold k and v to the bit, and all others NaN. Of tokens that
    share slot 0, the padding of a CUDA graph, any may have come last."""
    expected = {}
    for buffer, x in zip(pool.get_kv_buffer(layer_id), (k, v)):
        expected[id(buffer)] = torch.full_like(buffer, float("nan"))
        expected[id(buffer)][slots] = x
        assert not buffer[slots].isnan().any()
    for buffer in buffers(pool):
        want = expected.get(id(buffer), torch.full_like(buffer, float("nan")))
        assert torch.equal(bits(buffer[1:]), bits(want[1:]))
        assert buffer[0].isnan().all() == want[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("precomputed", [True, False])
@pytest.mark.parametrize("tokens, padding", [(0, 0), (1, 0), (7, 0), (3, 2), (0, 1)])
@pytest.mark.parametrize("layer", [SLIDING, FULL])
def test_stores_k_and_v_in_their_slots(layer, tokens, padding, precomputed, dtype):
    """As set_kv_buffer does, in the layer's own slots, found as the pool finds them:
    precomputed for the batch, or from the allocator's mapping."""
    heads, kv_heads, D = POOL_SHAPES[layer]
    rng = np.random.default_rng(tokens)
    # Slots of full layers, and which slots of sliding layers they map to.
    loc = np.concatenate([rng.permutation(SLOTS)[:tokens] + 1, np.zeros(padding, int)])
    mapping = np.zeros(SLOTS + 1, int)
    mapping[loc[:tokens]] = rng.permutation(SLIDING_SLOTS)[:tokens] + 1
    slots = torch.from_numpy(mapping[loc] if layer == SLIDING else loc).to(DEVICE)
    loc, mapping = (torch.from_numpy(x).to(DEVICE) for x in (loc, mapping))

    def pool_that_knows_its_slots():
        pool = new_pool(dtype, POOL_SHAPES[SLIDING][1:], POOL_SHAPES[FULL][1:])
        pool.register_mapping(mapping)
        if precomputed:
            pool.set_swa_loc(pool.translate_loc_from_full_to_swa(loc))
        return pool

    case = Case((tokens + padding, heads, kv_heads, D), dtype, seed=tokens)
    without = case.run()
    pool, other = pool_that_knows_its_slots(), pool_that_knows_its_slots()
    k_buffer, v_buffer = pool.get_kv_buffer(layer)
    cache_loc = pool.get_cache_loc(layer, loc)
    assert cache_loc.dtype == (torch.int32 if layer == SLIDING else torch.int64)
    stored = dict(k_buffer=k_buffer, v_buffer=v_buffer, cache_loc=cache_loc)
    case.check(**stored)
    check_stored(pool, layer, slots, case.k, case.v)
    for got, want in zip(case.run(**stored), without):
        np.testing.assert_array_equal(got, want)
    if len(loc):
        # Copied, since its kernel loads what is aligned.
        k, v = case.k.clone(), case.v.clone()
        other.set_kv_buffer(SimpleNamespace(layer_id=layer), loc, k, v)
    check_stored(other, layer, slots, case.k, case.v)


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_stores_any_shape(data):
    shape = (
        data.draw(st.integers(0, 5)),
        data.draw(st.integers(1, 9)),
        data.draw(st.integers(1, 5)),
        2 * data.draw(st.integers(1, 80)),
    )
    dtype = data.draw(st.sampled_from(DTYPES))
    case = Case(shape, dtype, seed=data.draw(st.integers(0, 2**32 - 1)))
    pool = new_pool(dtype, shape[2:], (1, 2))
    slots = data.draw(st.permutations(range(1, SLIDING_SLOTS + 1)))[: case.M]
    slots = torch.tensor(slots, dtype=torch.int64, device=DEVICE)
    k_buffer, v_buffer = pool.get_kv_buffer(SLIDING)
    index = data.draw(st.sampled_from([torch.int32, torch.int64]))
    case.check(k_buffer=k_buffer, v_buffer=v_buffer, cache_loc=slots.to(index))
    check_stored(pool, SLIDING, slots, case.k, case.v)


@needs_gpu
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_stores_beyond_two_billion_elements(index):
    case = Case((2, 16, 2, 512), torch.bfloat16)
    shape = (2**31 // (2 * 512) + 3, 2, 512)
    k_buffer, v_buffer = (
        torch.full(shape, float("nan"), dtype=case.dtype, device=DEVICE)
        for _ in range(2)
    )
    slots = torch.tensor([shape[0] - 1, 1], device=DEVICE)
    case.check(k_buffer=k_buffer, v_buffer=v_buffer, cache_loc=slots.to(index))
    for buffer, x in ((k_buffer, case.k), (v_buffer, case.v)):
        assert torch.equal(bits(buffer[slots]), bits(x))
        assert (~buffer[..., 0].isnan()).sum() == x[..., 0].numel()


class OtherSWAKVPool(SWAKVPool):
    pass


class OtherMHATokenToKVPool(MHATokenToKVPool):
    pass


def _stores(folder: str, port: int) -> list:
    """For each layer, and each reason against it: whether the launch that normalizes k
    and v stores them, and whether attention is to."""
    from sglang.srt.compilation.piecewise_context_manager import set_forward_context
    from sglang.srt.server_args import get_global_server_args

    model, config = load_model(folder, port)
    layers = model.model.layers
    sliding, full = (
        [i for i, kind in enumerate(config.layer_types) if kind == f"{name}_attention"]
        for name in ("sliding", "full")
    )
    shapes = [
        (attention.num_kv_heads, attention.head_dim)
        for attention in (layers[sliding[0]].self_attn, layers[full[0]].self_attn)
    ]
    loc = torch.tensor([9, 3, 0, 17, 0])
    swa_loc = torch.tensor([5, 2, 0, 6, 0], dtype=torch.int32)
    triton = mock.Mock(spec=TritonAttnBackend)
    hidden_states = torch.randn(len(loc), config.hidden_size)

    def ask(
        layer, *, on_cuda=True, backend=triton, out_cache_loc=loc, dtype=None, **kwargs
    ):
        attention = layers[layer].self_attn
        pool = new_pool(
            dtype or torch.float32, *shapes, (sliding, full), "cpu", **kwargs
        )
        pool.set_swa_loc(swa_loc)
        forward_batch = SimpleNamespace(
            token_to_kv_pool=pool, attn_backend=backend, out_cache_loc=out_cache_loc
        )
        (_, k, v), save_kv_cache = attend(
            attention, hidden_states, forward_batch, on_cuda
        )
        stored = not all(buffer.isnan().all() for buffer in buffers(pool))
        if stored:
            slots = swa_loc.long() if layer in sliding else loc
            check_stored(pool, layer, slots, k, v)
        return stored, save_kv_cache

    found = []
    for layer in range(len(layers)):
        attention = layers[layer].self_attn
        found.append(
            {
                "CPU": ask(layer, on_cuda=False),
                "another backend": ask(layer, backend=object()),
                "no slots": ask(layer, out_cache_loc=None),
                "another dtype": ask(layer, dtype=torch.float16),
                "another pool": ask(layer, cls=OtherSWAKVPool),
                "other pools in it": ask(
                    layer, token_to_kv_pool_class=OtherMHATokenToKVPool
                ),
            }
        )
        for reason, patched in {
            "": nullcontext(),
            "scales": mock.patch.object(attention.attn, "k_scale", 1.0),
            "no rotary embedding": mock.patch.object(attention, "can_fuse_rope", False),
            "piecewise CUDA graph": set_forward_context(None, [], None, [], []),
            "context parallel": mock.patch.object(
                get_global_server_args(), "enable_prefill_context_parallel", True
            ),
            # As the MTP assistant's layers are bound to those of its target.
            "shared KV": mock.patch.multiple(
                attention, is_kv_shared_layer=True, kv_shared_layer_index=0
            ),
        }.items():
            with patched:
                found[-1][reason] = ask(layer)
    return found


def test_who_stores_k_and_v(tmp_path):
    layers = ask_model(_stores, tmp_path / "tiny")

    assert len(layers) > 1
    for layer in layers:
        assert layer.pop("") == (True, False)
        assert layer.pop("shared KV") == (False, False)
        assert set(layer.values()) == {(False, True)}, layer


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
