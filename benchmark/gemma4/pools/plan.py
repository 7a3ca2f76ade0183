"""How many requests fit in the KV pools of a hybrid sliding-window model.

Pool sizes are the server's: a model's folder goes through its argument parser and its
pool configurator. It needs nothing of the package around it, as it travels with the
tests of patches.
"""

import contextlib
import dataclasses
import logging
from typing import Iterator, Optional


class PlanError(Exception):
    """What was asked cannot be planned; the message is one sentence for the user."""


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests that run at once: tokens in, tokens out, and how many of them."""

    input_len: int
    output_len: int
    num_requests: Optional[int]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What else of a server's arguments the pools depend on."""

    page_size: int = 1
    tp_size: int = 1
    chunked_prefill_size: int = 8192
    draft_tokens: int = 0
    kv_cache_dtype: str = "auto"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Both pools at one ratio. Sizes in tokens, `*_bytes_per_token` in bytes.

    `*_requests` is how many requests of the load fit in the pool at once.
    """

    ratio: float
    full_bytes_per_token: int
    swa_bytes_per_token: int
    full_tokens: int
    swa_tokens: int
    full_tokens_per_request: int
    swa_tokens_per_request: int
    swa_tokens_prefilling: int
    full_requests: int
    swa_requests: int

    @property
    def requests(self) -> int:
        return min(self.full_requests, self.swa_requests)

    @property
    def binds(self) -> str:
        return "full" if self.full_requests <= self.swa_requests else "swa"


def swa_tokens_per_request(
    load: Load, window: int, page_size: int, eviction_interval: int, draft_tokens: int
) -> int:
    """Most SWA slots that a request holds while it decodes.

    The radix cache locks the prompt's window until the request ends; a last chunk
    shorter than the window locks the leaf before it as well, which is not counted.
    Generated tokens leave the pool once `eviction_interval` of them lie a page beyond
    the window.
    """
    held = page_size + window + eviction_interval + draft_tokens
    locked = min(load.input_len, -(-window // page_size) * page_size)
    return locked + min(load.output_len + draft_tokens, held)


@contextlib.contextmanager
def kv_cache_configurator(server_args) -> Iterator:
    """Yields the `KVCacheConfigurator` of a server with these arguments.

    It is the one of the first tensor parallel rank, without a model and its weights.
    The server's configuration is published while it is in use.
    """
    import torch

    from sglang.srt import runtime_context
    from sglang.srt.configs.model_config import AttentionArch, ModelConfig
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
    from sglang.srt.model_executor.model_runner_components import (
        layer_setup,
        spec_aux_hidden_state,
    )
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    context = runtime_context.create_context(
        server_args, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=0)
    )
    with runtime_context.use_context(context):
        model_config = ModelConfig.from_server_args(server_args)
        spec_algorithm = SpeculativeAlgorithm.from_string(
            runtime_context.get_spec().speculative_algorithm
        )
        worker = dict(model_config=model_config, is_draft_worker=False)
        dtypes = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
        dtype_name = runtime_context.get_model().kv_cache_dtype
        window = getattr(model_config.hf_text_config, "sliding_window", None)
        yield KVCacheConfigurator(
            **worker,
            device="cpu",
            gpu_id=0,
            attn_dp_size=1,
            pp_size=1,
            pp_group=None,
            model=None,
            server_args=server_args,
            kv_cache_dtype=dtypes.get(dtype_name, model_config.dtype),
            kv_cache_dtype_str=dtype_name,
            model_dtype=model_config.dtype,
            page_size=runtime_context.get_schedule().page_size,
            # A token attends to itself and to window - 1 tokens before it.
            sliding_window_size=window and window - 1,
            spec_algorithm=spec_algorithm,
            post_capture_kv_active=False,
            spec_aux_config=spec_aux_hidden_state.resolve_spec_aux_hidden_state_config(
                **worker, server_args=server_args, spec_algorithm=spec_algorithm
            ),
            is_hybrid_swa=model_config.is_hybrid_swa,
            is_hybrid_swa_compress=False,
            use_mla_backend=model_config.attention_arch == AttentionArch.MLA,
            layer_info=layer_setup.resolve_layer_indices(**worker, model=None),
            forward_stream=None,
            req_to_token_pool=None,
            token_to_kv_pool_allocator=None,
            memory_pool_config=None,
        )


def plan(
    folder: str, kv_bytes: int, ratio: Optional[float], load: Load, layout: Layout
) -> Plan:
    """Size both pools as a server would and count the requests that fit.

    Raises:
        PlanError: the model has no second pool, or the pools are too small.
    """
    from sglang.srt.environ import envs
    from sglang.srt.model_executor import pool_configurator
    from sglang.srt.server_args import prepare_server_args

    argv = ["--model-path", folder, "--device", "cpu", "--log-level", "warning"]
    argv += ["--tp-size", str(layout.tp_size), "--page-size", str(layout.page_size)]
    argv += ["--kv-cache-dtype", layout.kv_cache_dtype]
    if ratio is not None:
        argv += ["--swa-full-tokens-ratio", str(ratio)]
    server_args = prepare_server_args(argv)
    logging.getLogger(pool_configurator.__name__).setLevel(logging.WARNING)
    with kv_cache_configurator(server_args) as configurator:
        if not configurator.is_hybrid_swa:
            arch = configurator.model_config.hf_config.architectures[0]
            raise PlanError(f"{arch} has one KV pool, so there is no ratio to plan.")
        pools = pool_configurator.create_memory_pool_configurator(configurator)
        try:
            config = pools.calculate_pool_sizes(kv_bytes, layout.page_size)
        except (RuntimeError, ValueError):
            raise PlanError(
                f"{kv_bytes / 1e9:.2f} GB is too little for a window of the KV cache; "
                "give it more memory."
            ) from None

    page = layout.page_size
    window = configurator.sliding_window_size
    full_per_request = load.input_len + load.output_len + layout.draft_tokens
    full_per_request = -(-full_per_request // page) * page
    swa_per_request = swa_tokens_per_request(
        load,
        window,
        page,
        max(1, envs.SGLANG_SWA_EVICTION_INTERVAL.get()),
        layout.draft_tokens,
    )
    # A chunk runs while the next one is allocated; short prompts stay as they are.
    chunk = layout.chunked_prefill_size
    prefilling = 2 * chunk if load.input_len > window else 0
    full, swa = config.full_max_total_num_tokens, config.swa_max_total_num_tokens
    swa_requests = max(0, swa - prefilling) // swa_per_request
    if swa >= max(swa_per_request, min(load.input_len, 2 * chunk) + page):
        swa_requests = max(1, swa_requests)  # alone, it shares with no other's chunks
    return Plan(
        ratio=pools._swa_full_tokens_ratio,
        full_bytes_per_token=pools._full_cell_bytes(),
        swa_bytes_per_token=pools._swa_cell_bytes(),
        full_tokens=full,
        swa_tokens=swa,
        full_tokens_per_request=full_per_request,
        swa_tokens_per_request=swa_per_request,
        swa_tokens_prefilling=prefilling,
        full_requests=full // full_per_request,
        swa_requests=swa_requests,
    )


def gpu_kv_bytes(folder: str, mem_fraction_static: float, tp_size: int) -> int:
    """Bytes that a server on the GPU here would have left for its pools.

    Raises:
        PlanError: there is no GPU, or the weights do not fit.
    """
    import torch
    from transformers import AutoConfig, Gemma4ForCausalLM
    from transformers import Gemma4ForConditionalGeneration as Gemma4

    if not torch.cuda.is_available():
        raise PlanError("There is no GPU here; give --kv-memory, such as 74.4GB.")
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        text_only = config.model_type == "gemma4_text"
        model = (Gemma4ForCausalLM if text_only else Gemma4)(config)
    # Each rank has all embeddings, and its part of the rest.
    embeddings = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    whole = sum(m.weight.numel() for m in embeddings)
    shared = sum(p.numel() for p in model.parameters()) - whole
    weights = 2 * (whole + shared // tp_size)
    free, _ = torch.cuda.mem_get_info()
    left = int(free * mem_fraction_static) - weights
    if left <= 0:
        raise PlanError(
            f"{weights / 1e9:.1f} GB of weights do not fit in {mem_fraction_static} of "
            f"the GPU's {free / 1e9:.1f} GB; raise --mem-fraction-static or --tp-size."
        )
    return left
