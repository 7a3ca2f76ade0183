"""What the launch that normalizes Gemma 4's q, k and v stores in the KV pool, and when.

On CUDA where there is a GPU, else on CPU tensors in Triton's interpreter.
"""

import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gemma4_fused_qkv_norm import (  # noqa: F401, the fixture interprets
    CUDA,
    DEVICE,
    DTYPES,
    Case,
    _interpret,
    attend,
    needs_gpu,
)
from tiny_gemma4 import ask_model, load_model

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
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
    """Slots of a layer hold k and v to the bit, and all others NaN; slot 0, that of a
    CUDA graph's padding, is left alone."""
    expected = {}
    for buffer, x in zip(pool.get_kv_buffer(layer_id), (k, v)):
        expected[id(buffer)] = torch.full_like(buffer, float("nan"))
        expected[id(buffer)][slots[slots > 0]] = x[slots > 0]
    for buffer in buffers(pool):
        want = expected.get(id(buffer), torch.full_like(buffer, float("nan")))
        assert torch.equal(bits(buffer), bits(want))


def layer(layer_id):
    return SimpleNamespace(layer_id=layer_id)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("tokens, padding", [(0, 0), (1, 0), (7, 0), (3, 2), (0, 1)])
@pytest.mark.parametrize("layer_id", [SLIDING, FULL])
def test_stores_what_set_kv_buffer_stores(layer_id, tokens, padding, dtype):
    heads, kv_heads, D = POOL_SHAPES[layer_id]
    rng = np.random.default_rng(tokens)
    full, sliding = (
        torch.from_numpy(
            np.concatenate([rng.permutation(n)[:tokens] + 1, np.zeros(padding, int)])
        ).to(DEVICE)
        for n in (SLOTS, SLIDING_SLOTS)
    )
    sliding = sliding.to(torch.int32)
    slots = (sliding if layer_id == SLIDING else full).long()
    loc_info = KVWriteLoc(full, sliding)

    case = Case((tokens + padding, heads, kv_heads, D), dtype, seed=tokens)
    without = case.run()
    pool, other = (
        new_pool(dtype, POOL_SHAPES[SLIDING][1:], POOL_SHAPES[FULL][1:])
        for _ in range(2)
    )
    target = pool.get_store_target(layer(layer_id), loc_info, dtype)
    case.check(store_target=target)
    k, v = case.new_kv()
    check_stored(pool, layer_id, slots, k, v)
    for got, want in zip(case.run(store_target=target), without):
        np.testing.assert_array_equal(got, want)
    if len(full):
        # Copied, since its kernel loads what is aligned.
        other.set_kv_buffer(layer(layer_id), loc_info, k.clone(), v.clone())
        if not CUDA:  # its kernel there is the one that leaves slot 0 alone
            for buffer in other.get_kv_buffer(layer_id):
                buffer[0] = float("nan")
        check_stored(other, layer_id, slots, k, v)


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
    index = data.draw(st.sampled_from([torch.int32, torch.int64]))
    case.check(store_target=(*pool.get_kv_buffer(SLIDING), slots.to(index)))
    check_stored(pool, SLIDING, slots, *case.new_kv())


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
    case.check(store_target=(k_buffer, v_buffer, slots.to(index)))
    for buffer, x in zip((k_buffer, v_buffer), case.new_kv()):
        assert torch.equal(bits(buffer[slots]), bits(x))
        assert (~buffer[..., 0].isnan()).sum() == x[..., 0].numel()


class OtherSWAKVPool(SWAKVPool):
    def set_kv_buffer(self, *args, **kwargs):
        super().set_kv_buffer(*args, **kwargs)


class OtherMHATokenToKVPool(MHATokenToKVPool):
    def _store_kv_layer(self, *args, **kwargs):
        super()._store_kv_layer(*args, **kwargs)


def _stores(folder: str, port: int) -> list:
    """For each layer, and each reason against it: whether the launch that normalizes k
    and v stores them, and whether attention is to."""
    from sglang.srt.layers import radix_attention

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
    hidden_states = torch.randn(len(loc), config.hidden_size)

    def ask(
        layer,
        *,
        on_cuda=True,
        triton=True,
        mode=ForwardMode.DECODE,
        real_tokens=None,
        out_cache_loc=loc,
        swa_loc=swa_loc,
        dtype=torch.float32,
        dcp_size=1,
        **kwargs,
    ):
        attention = layers[layer].self_attn
        pool = new_pool(dtype, *shapes, (sliding, full), "cpu", **kwargs)
        forward_batch = SimpleNamespace(
            forward_mode=mode,
            out_cache_loc=out_cache_loc,
            out_cache_loc_is_physical=False,
            global_num_token_non_padded_cpu=real_tokens,
        )
        backend = object.__new__(TritonAttnBackend if triton else AttentionBackend)
        # What get_store_target asks of a backend that ModelRunner made.
        vars(backend).update(
            token_to_kv_pool=pool,
            forward_metadata=SimpleNamespace(swa_out_cache_loc=swa_loc),
            dcp_size=dcp_size,
            dllm_attention=None,
        )
        (_, k, v), save_kv_cache = attend(
            attention, hidden_states, on_cuda, forward_batch, backend
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
                "stored": {
                    "decode": ask(layer),
                    "extend": ask(layer, mode=ForwardMode.EXTEND),
                    "verify": ask(layer, mode=ForwardMode.TARGET_VERIFY, real_tokens=3),
                    "as many real tokens": ask(
                        layer, mode=ForwardMode.EXTEND, real_tokens=5
                    ),
                },
                "left to attention": {
                    "CPU": ask(layer, on_cuda=False),
                    "another backend": ask(layer, triton=False),
                    "slots of other tokens": ask(layer, out_cache_loc=loc[:3]),
                    "idle": ask(layer, mode=ForwardMode.IDLE),
                    "padding": ask(layer, mode=ForwardMode.EXTEND, real_tokens=3),
                    "another dtype": ask(layer, dtype=torch.float16),
                    "another pool": ask(layer, cls=OtherSWAKVPool),
                    "other pools in it": ask(
                        layer, token_to_kv_pool_class=OtherMHATokenToKVPool
                    ),
                    "split context": ask(layer, dcp_size=2),
                },
            }
        )
        if layer in sliding:
            found[-1]["left to attention"]["no slots of the window"] = ask(
                layer, swa_loc=None
            )
        for reason, patched in {
            "no rotary embedding": mock.patch.object(attention, "can_fuse_rope", False),
            "graph of a prefill": mock.patch.object(
                radix_attention, "is_in_prefill_graph_scope", lambda: True
            ),
            "torch.compile": mock.patch.object(
                torch.compiler, "is_compiling", lambda: True
            ),
        }.items():
            with patched:
                found[-1]["left to attention"][reason] = ask(layer)
        # As the MTP assistant's layers are bound to those of its target.
        with mock.patch.multiple(
            attention, is_kv_shared_layer=True, kv_shared_layer_index=0
        ):
            found[-1]["shared KV"] = ask(layer)
    return found


def test_who_stores_k_and_v(tmp_path):
    layers = ask_model(_stores, tmp_path / "tiny")

    assert len(layers) > 1
    for layer in layers:
        assert set(layer["stored"].values()) == {(True, False)}, layer
        assert set(layer["left to attention"].values()) == {(False, True)}, layer
        assert layer["shared KV"] == (False, False)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
