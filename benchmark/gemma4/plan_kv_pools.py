"""Plan the KV pools of a hybrid sliding-window model: how many requests fit in each.

    python benchmark/gemma4/plan_kv_pools.py 26b-a4b --kv-memory 74.38GB
    python benchmark/gemma4/plan_kv_pools.py 31b --kv-memory 57GB --ratio 0.05:1.0:0.05 \\
        --plot pictures --json pools.json
    python benchmark/gemma4/plan_kv_pools.py /models/gemma-4-26B-A4B-it --requests 160

The model is a folder or a shape of checkpoint.py. Pool sizes are the server's: the
folder goes through its argument parser and its pool configurator, so environment
variables count here as they do there. Without --kv-memory it plans for the GPU here.

Exit status: 0 if the load fits, 1 if it does not, 2 if it could not be planned.
"""

import argparse
import contextlib
import dataclasses
import logging
import re
import sys
import tempfile
from pathlib import Path
from typing import Iterator, List, Optional

UNITS = {"": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}
UNITS.update({f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)})


class PlanError(Exception):
    """What was asked cannot be planned; the message is one sentence for the user."""


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests that run at once: tokens in, tokens out, and how many of them."""

    input_len: int
    output_len: int
    num_requests: Optional[int]


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


def plan(folder: str, kv_bytes: int, ratio: Optional[float], load: Load, args) -> Plan:
    """Size both pools as a server would and count the requests that fit.

    Raises:
        PlanError: the model has no second pool, or the pools are too small.
    """
    from sglang.srt.environ import envs
    from sglang.srt.model_executor import pool_configurator
    from sglang.srt.server_args import prepare_server_args

    argv = ["--model-path", folder, "--device", "cpu", "--log-level", "warning"]
    argv += ["--tp-size", str(args.tp_size), "--page-size", str(args.page_size)]
    argv += ["--kv-cache-dtype", args.kv_cache_dtype]
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
            config = pools.calculate_pool_sizes(kv_bytes, args.page_size)
        except (RuntimeError, ValueError):
            raise PlanError(
                f"{kv_bytes / 1e9:.2f} GB is too little for a window of the KV cache; "
                "give it more memory."
            ) from None

    page = args.page_size
    window = configurator.sliding_window_size
    full_per_request = load.input_len + load.output_len + args.draft_tokens
    full_per_request = -(-full_per_request // page) * page
    swa_per_request = swa_tokens_per_request(
        load,
        window,
        page,
        max(1, envs.SGLANG_SWA_EVICTION_INTERVAL.get()),
        args.draft_tokens,
    )
    # A chunk runs while the next one is allocated; short prompts stay as they are.
    chunk = args.chunked_prefill_size
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


@contextlib.contextmanager
def model_folder(model: str) -> Iterator[str]:
    """Yields the folder itself, or one written for the shape of that name."""
    from checkpoint import SHAPES, write_checkpoint

    if model in SHAPES:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / model
            write_checkpoint(folder, model, weights=False)
            yield str(folder)
    elif (Path(model) / "config.json").is_file():
        yield model
    else:
        raise PlanError(
            f"{model} is neither a folder with a config.json nor one of the shapes "
            f"{', '.join(SHAPES)}."
        )


def memory(text: str) -> int:
    """Bytes from a figure such as 74.4GB or 69GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)?", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no amount of memory; write it like 74.4GB or 69GiB."
        )
    return int(float(match[1]) * UNITS[match[2] or ""])


def ratios(text: str) -> List[float]:
    """One ratio, several with commas, or a range first:last:step."""
    try:
        if ":" in text:
            first, last, step = map(float, text.split(":"))
            count = int((last - first) / step + 1e-6) + 1
            values = [round(first + i * step, 6) for i in range(count)]
        else:
            values = [float(x) for x in text.split(",")]
    except (ValueError, ZeroDivisionError):
        values = []
    if not values or not all(0 < x <= 1 for x in values):
        raise argparse.ArgumentTypeError(
            f"{text!r} gives no ratios in (0, 1]; write 0.15, or 0.1,0.2, or 0.05:1:0.05."
        )
    return values


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0.")
    return int(text)


def print_table(plans: List[Plan], load: Load, kv_bytes: int) -> None:
    from rich.console import Console
    from rich.table import Table

    first = plans[0]
    table = Table(
        title=f"{kv_bytes / 1e9:.2f} GB for the KV cache; a token takes "
        f"{first.full_bytes_per_token:,} bytes in the full and "
        f"{first.swa_bytes_per_token:,} in the SWA pool\n"
        f"requests of {load.input_len:,} tokens in, {load.output_len:,} out hold "
        f"{first.full_tokens_per_request:,} full and up to "
        f"{first.swa_tokens_per_request:,} SWA tokens",
    )
    for name in ("ratio", "full tokens", "SWA tokens", "fit in full", "fit in SWA"):
        table.add_column(name, justify="right")
    table.add_column("fit", justify="right", style="bold")
    table.add_column("binds")
    for p in plans:
        numbers = p.full_tokens, p.swa_tokens, p.full_requests, p.swa_requests
        cells = [f"{x:,}" for x in (*numbers, p.requests)]
        table.add_row(f"{p.ratio:g}", *cells, p.binds)
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def to_results(plans: List[Plan], load: Load, name: str, kv_bytes: int, model: str):
    """The plans as a result file: tokens and requests of both pools at each ratio."""
    from results import Results

    first = plans[0]
    results = Results.start(
        "pools",
        name,
        f"{Path(model).name}, {load.input_len}/{load.output_len}",
        model=Path(model).name,
        kv_bytes=kv_bytes,
        load=dataclasses.asdict(load),
        full_bytes_per_token=first.full_bytes_per_token,
        swa_bytes_per_token=first.swa_bytes_per_token,
        full_tokens_per_request=first.full_tokens_per_request,
        swa_tokens_per_request=first.swa_tokens_per_request,
        swa_tokens_prefilling=first.swa_tokens_prefilling,
    )
    for p in plans:
        case = {"ratio": p.ratio}
        results.add(case, "full", "tokens", "tokens", [p.full_tokens])
        results.add(case, "SWA", "tokens", "tokens", [p.swa_tokens])
        results.add(case, "full", "requests", "at once", [p.full_requests])
        results.add(case, "SWA", "requests", "at once", [p.swa_requests])
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model folder, or a shape such as 26b-a4b")
    parser.add_argument(
        "--kv-memory", type=memory, help="for both pools, such as 74.4GB or 69GiB"
    )
    parser.add_argument(
        "--mem-fraction-static",
        type=float,
        default=0.85,
        help="of the GPU here, where --kv-memory is not given",
    )
    parser.add_argument(
        "--ratio", type=ratios, help="0.15, or 0.1,0.2, or 0.05:1:0.05 (server's own)"
    )
    parser.add_argument("--input-len", type=positive, default=8000)
    parser.add_argument("--output-len", type=positive, default=1000)
    parser.add_argument("--requests", type=positive, help="that have to fit at once")
    parser.add_argument("--page-size", type=positive, default=1)
    parser.add_argument("--tp-size", type=positive, default=1)
    parser.add_argument("--chunked-prefill-size", type=positive, default=8192)
    parser.add_argument(
        "--draft-tokens", type=int, default=0, help="--speculative-num-draft-tokens"
    )
    parser.add_argument(
        "--kv-cache-dtype", choices=("auto", "fp8_e4m3", "fp8_e5m2"), default="auto"
    )
    parser.add_argument("--plot", metavar="FOLDER", help="draw SVGs there")
    parser.add_argument("--json", metavar="FILE", help="write a result file")
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    args = _parser().parse_args(argv)
    load = Load(args.input_len, args.output_len, args.requests)
    try:
        with model_folder(args.model) as folder:
            kv_bytes = args.kv_memory or gpu_kv_bytes(
                folder, args.mem_fraction_static, args.tp_size
            )
            plans = [
                plan(folder, kv_bytes, ratio, load, args)
                for ratio in args.ratio or [None]
            ]
    except PlanError as e:
        print(f"plan_kv_pools.py: {e}", file=sys.stderr)
        return 2

    print_table(plans, load, kv_bytes)
    name = Path(args.json).stem if args.json else "kv-pools"
    if args.json or args.plot:
        results = to_results(plans, load, name, kv_bytes, args.model)
        if args.json:
            results.save(args.json)
        if args.plot:
            from plot import draw

            draw(results, Path(args.plot))

    best = max(plans, key=lambda p: p.requests)
    wanted = load.num_requests or 1
    if best.requests < wanted:
        print(
            f"The load does not fit: {best.requests} of {wanted} "
            f"request{'s' if wanted > 1 else ''} at ratio {best.ratio:g}, where the "
            f"{best.binds} pool binds."
        )
        return 1
    if len(plans) > 1:
        print(f"Most requests fit at ratio {best.ratio:g}: {best.requests}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
