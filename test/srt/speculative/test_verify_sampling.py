"""Sampling with drafts keeps the target's distribution, in spec v1 and v2.

Verification is the workers' own, of a chain of drafts. The logits are given: many rows
share those of a position, so that the tokens at a position, of all rows that accepted
the drafts before it, are draws from one distribution. That is compared with the
target's own, computed in float64, by a chi-square test. Its threshold lets a correct
implementation fail once in ten million runs; the seed is fixed besides.
"""

import sys
from types import SimpleNamespace

import pytest
import torch

from sglang.srt.distributed import (
    init_distributed_environment,
    initialize_model_parallel,
)
from sglang.srt.distributed.parallel_state import (
    destroy_distributed_environment,
    destroy_model_parallel,
    model_parallel_is_initialized,
)
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import TOP_K_ALL, SamplingParams
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.srt.speculative.eagle_utils import build_tree_kernel_efficient
from sglang.srt.speculative.frozen_kv_mtp_info import FrozenKVMTPVerifyInput
from sglang.test.ci.ci_register import register_cuda_ci
from sglang.test.test_utils import find_available_port

register_cuda_ci(est_time=20, suite="stage-b-test-1-gpu-small")

CUDA = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA, reason="sampling verifies greedily without a GPU"),
]

DEVICE = "cuda"
VOCAB, STEPS = 24, 3
DRAFT_TOKENS = STEPS + 1
SEQ_LEN = 2
ROWS, BATCHES = 128, 64  # rows of a setting in a batch
# With fewer rows than that a position is not compared.
MIN_ROWS = 200
# (temperature, top-k, top-p)
SETTINGS = [
    (1.0, TOP_K_ALL, 1.0),
    (0.6, TOP_K_ALL, 1.0),
    (1.7, TOP_K_ALL, 1.0),
    (1.0, TOP_K_ALL, 0.8),
    (1.0, 6, 1.0),
    (1.3, 12, 0.9),
]
MIN_P_VALUE = 1e-9


def target_probs(logits: torch.Tensor, temperature, top_k, top_p) -> torch.Tensor:
    """The distribution of [position, vocabulary] logits that is sampled, float64."""
    probs = torch.softmax(logits.double() / temperature, dim=-1)
    ordered, order = probs.sort(dim=-1, descending=True)
    ordered[:, top_k:] = 0
    ordered /= ordered.sum(dim=-1, keepdim=True)
    ordered[ordered.cumsum(dim=-1) - ordered >= top_p] = 0
    probs = torch.zeros_like(probs).scatter_(1, order, ordered)
    return probs / probs.sum(dim=-1, keepdim=True)


def p_value(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """How likely draws from `probs` are to be at least as far from it as `counts`."""
    if counts[probs == 0].any():
        return 0.0
    expected = probs * counts.sum()
    # What is rarer than the chi-square distribution allows for is one class.
    rare = expected < 20
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device=DEVICE))
    if model_parallel_is_initialized():  # by another test of this process
        yield
        return
    init_distributed_environment(
        world_size=1,
        rank=0,
        local_rank=0,
        distributed_init_method=f"tcp://127.0.0.1:{find_available_port(22000)}",
        backend="gloo",
    )
    initialize_model_parallel()
    yield
    destroy_model_parallel()
    destroy_distributed_environment()


def verify_input_and_batch(drafts: torch.Tensor):
    """What a worker verifies: the `drafts` [STEPS] in ROWS rows of each setting."""
    bs = len(SETTINGS) * ROWS
    chain = torch.arange(STEPS, device=DEVICE).repeat(bs, 1)
    seq_lens = torch.full((bs,), SEQ_LEN, device=DEVICE)
    mask, positions, index, next_token, next_sibling, draft_token = (
        build_tree_kernel_efficient(
            torch.zeros(bs, dtype=torch.int64, device=DEVICE),
            chain - 1,
            chain,
            drafts.repeat(bs, 1),
            seq_lens,
            bs * SEQ_LEN,
            1,
            STEPS,
            DRAFT_TOKENS,
        )
    )
    verify_input = FrozenKVMTPVerifyInput(
        draft_token=draft_token,
        custom_mask=mask,
        positions=positions,
        retrieve_index=index,
        retrieve_next_token=next_token,
        retrieve_next_sibling=next_sibling,
        retrieve_cum_len=None,
        spec_steps=STEPS,
        topk=1,
        draft_token_num=DRAFT_TOKENS,
        capture_hidden_mode=CaptureHiddenMode.FULL,
        seq_lens_sum=bs * SEQ_LEN,
        seq_lens_cpu=seq_lens.cpu(),
    )

    def of_each_row(values, dtype):
        return torch.tensor(values, dtype=dtype, device=DEVICE).repeat_interleave(ROWS)

    temperatures, top_ks, top_ps = zip(*SETTINGS)
    sampling_info = SamplingBatchInfo(
        temperatures=of_each_row(temperatures, torch.float32)[:, None],
        top_ks=of_each_row(top_ks, torch.int32),
        top_ps=of_each_row(top_ps, torch.float32),
        min_ps=torch.zeros(bs, device=DEVICE),
        is_all_greedy=False,
        need_top_p_sampling=True,
        need_top_k_sampling=True,
        need_min_p_sampling=False,
        vocab_size=VOCAB,
        penalizer_orchestrator=SimpleNamespace(is_required=False),
        device=DEVICE,
    )
    batch = SimpleNamespace(
        forward_mode=ForwardMode.TARGET_VERIFY,
        device=DEVICE,
        input_ids=draft_token,
        seq_lens=seq_lens,
        seq_lens_cpu=seq_lens.cpu(),
        sampling_info=sampling_info,
    )
    return verify_input, batch


def spec_v2(verify_input, batch, logits_output) -> list:
    predict, accept_lens, _ = verify_input.sample(batch, logits_output)
    rows = predict.view(-1, DRAFT_TOKENS).tolist()
    return [row[:n] for row, n in zip(rows, accept_lens.tolist())]


def spec_v1(verify_input, batch, logits_output) -> list:
    bs = len(batch.seq_lens)
    params = SamplingParams(max_new_tokens=100, ignore_eos=True)
    params.normalize(None)
    batch.reqs = [
        Req(str(i), "", [0] * SEQ_LEN, params, vocab_size=VOCAB) for i in range(bs)
    ]
    batch.model_config = SimpleNamespace(think_end_id=None)
    batch.spec_info = SimpleNamespace(hidden_states=None)
    batch.req_pool_indices = torch.arange(bs, device=DEVICE)
    batch.req_to_token_pool = ReqToTokenPool(
        bs, SEQ_LEN + DRAFT_TOKENS, DEVICE, enable_memory_saver=False
    )
    allocator = TokenToKVPoolAllocator(
        bs * DRAFT_TOKENS, torch.float32, DEVICE, None, need_sort=False
    )
    batch.out_cache_loc = allocator.alloc(bs * DRAFT_TOKENS)
    verify_input.verify(batch, logits_output, allocator, page_size=1)
    answers = [req.output_ids for req in batch.reqs]
    assert allocator.available_size() == bs * DRAFT_TOKENS - sum(map(len, answers))
    return answers


@pytest.mark.parametrize("choice", [0, 2], ids=["good drafts", "poor drafts"])
@pytest.mark.parametrize("verify", [spec_v1, spec_v2])
def test_tokens_are_draws_from_the_target(verify, choice):
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(DRAFT_TOKENS, VOCAB, generator=generator)
    drafts = logits[:-1].argsort(dim=-1, descending=True)[:, choice]
    torch.manual_seed(0)
    answers = [[] for _ in SETTINGS]
    for _ in range(BATCHES):
        verify_input, batch = verify_input_and_batch(drafts.to(DEVICE))
        logits_output = LogitsProcessorOutput(
            next_token_logits=logits.to(DEVICE).repeat(len(batch.seq_lens), 1)
        )
        verified = verify(verify_input, batch, logits_output)
        for i, rows in enumerate(answers):
            rows += verified[i * ROWS : (i + 1) * ROWS]

    for setting, rows in zip(SETTINGS, answers):
        probs = target_probs(logits, *setting)
        compared = 0
        for position in range(DRAFT_TOKENS):
            if len(rows) < MIN_ROWS:
                break
            drawn = torch.tensor([row[position] for row in rows])
            counts = torch.bincount(drawn, minlength=VOCAB).double()
            p = p_value(counts, probs[position])
            assert p > MIN_P_VALUE, (
                f"temperature, top-k, top-p {setting}, token {position + 1}: p = {p}; "
                f"drawn {(counts / counts.sum()).tolist()}, target "
                f"{probs[position].tolist()}"
            )
            compared += 1
            if position < STEPS:
                # A run goes on behind its draft, and only there.
                draft = drafts[position].item()
                longer = [len(row) > position + 1 for row in rows]
                assert longer == [row[position] == draft for row in rows]
                rows = [row for row, more in zip(rows, longer) if more]
        assert compared >= 2


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
