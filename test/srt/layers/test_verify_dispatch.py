"""Where the Triton backend verifies with the verify kernel."""

import sys
from types import SimpleNamespace

import pytest
import torch
from verify_case import (  # noqa: F401
    CORES,
    DEVICE,
    TOLERANCE,
    Case,
    _interpret,
    ops,
)

from sglang.srt.layers.attention import triton_backend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci

register_cpu_ci(est_time=15, suite="stage-a-test-cpu")
register_cuda_ci(est_time=20, suite="stage-b-test-1-gpu-small")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def _forward_extend(case, mode, cuda=True, **changes):
    """TritonAttnBackend.forward_extend on a case, as the target verifies.

    Returns (output, name of the kernel that made it).
    """
    calls = []

    def recorded(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    backend = object.__new__(triton_backend.TritonAttnBackend)
    backend.verify_attention_fwd = recorded("verify", ops.verify_attention_fwd)
    backend.extend_attention_fwd = recorded("extend", lambda *args, **kwargs: None)
    backend._forward_extend_unified = recorded("unified", lambda *args, **kwargs: None)
    backend.use_verify_attention = cuda
    backend.use_verify_splitkv = backend.use_verify_shared_kv = False
    backend.use_mla = backend.use_dense_fp8_chunked_prefill = False
    backend.dllm_attention = None
    backend.dcp_size = backend.page_size = 1
    backend.device_core_count = CORES
    backend.enable_deterministic = changes.pop("deterministic", False)
    backend.allow_bidirectional_attention_in_extend = False
    step = case.num_draft
    indptr = torch.arange(len(case.lens) + 1, device=DEVICE) * step
    backend.forward_metadata = triton_backend.ForwardMetadata(
        attn_logits=None,
        attn_lse=None,
        max_extend_len=step,
        num_kv_splits=None,
        kv_indptr=case.kv_indptr,
        kv_indices=case.slots,
        qo_indptr=indptr.to(torch.int32),
        custom_mask=None,
        mask_indptr=None,
        window_kv_indptr=case.kv_indptr,
        window_kv_indices=case.slots,
        window_num_kv_splits=None,
        window_kv_offsets=None,
    )
    layer = SimpleNamespace(
        layer_id=0,
        tp_q_head_num=case.heads,
        qk_head_dim=case.q.shape[-1],
        v_head_dim=case.v_draft.shape[-1],
        scaling=case.q.shape[-1] ** -0.5,
        sliding_window_size=case.window,
        is_cross_attention=False,
        attn_type=changes.pop("attn_type", AttentionType.DECODER),
        logit_capping_method="tanh",
        logit_cap=0.0,
        k_scale=None,
        v_scale=None,
        xai_temperature_len=-1,
    )
    backend.token_to_kv_pool = SimpleNamespace(
        get_key_buffer=lambda layer_id: case.k_buffer,
        get_value_buffer=lambda layer_id: case.v_buffer,
    )
    batch = SimpleNamespace(
        lookahead=None,
        forward_mode=mode,
        extend_seq_lens_cpu=[step] * len(case.lens),
        mha_one_shot=False,
    )
    o = backend.forward_extend(
        case.q.flatten(1),
        case.k_draft,
        case.v_draft,
        layer,
        batch,
        save_kv_cache=False,
    )
    return o, calls


@pytest.mark.parametrize("window", [-1, 64])
def test_backend_verifies_with_the_kernel(window):
    case = Case([100, 0, 30], 4, 4, 2, 32, window=window, dtype=torch.float16)
    o, calls = _forward_extend(case, ForwardMode.TARGET_VERIFY)
    assert calls == ["verify"]
    o = o.view(*case.q.shape).to(torch.float64)
    assert (o - case.expected()).abs().max() <= TOLERANCE[torch.float16]


def test_what_the_kernel_does_not_cover():
    """Draft-extend, prefill, other GPUs, attention to what comes after, and batch
    invariance stay with the kernels that they had."""
    case = Case([40, 3], 4, 4, 2, 32, dtype=torch.float16)

    def kernel(mode=ForwardMode.TARGET_VERIFY, **changes):
        return _forward_extend(case, mode, **changes)[1]

    assert kernel() == ["verify"]
    assert kernel(mode=ForwardMode.DRAFT_EXTEND_V2) == ["extend"]
    assert kernel(mode=ForwardMode.EXTEND) == ["extend"]
    assert kernel(cuda=False) == ["extend"]
    assert kernel(attn_type=AttentionType.ENCODER_ONLY) == ["extend"]
    assert kernel(deterministic=True) == ["unified"]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
