"""Calls of the fused experts: a projection with one tile, and whole layers."""

import contextlib
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Tuple
from unittest import mock

import torch
import triton
from gemma4.engines import one_rank
from gemma4.kernels.tiles import DOWN, DTYPES, GATE_UP, Layer, Tile, name_of

ROUTINGS = ("even", "skewed")


def start_sglang() -> None:
    """What compiling kernels asks of a server: its arguments."""
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(model_path="dummy")
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0))
    logging.getLogger("sglang").setLevel(logging.ERROR)


def start_layers() -> None:
    """What whole layers ask for: its groups of GPUs, too."""
    from sglang.srt.server_args import ServerArgs

    one_rank.start(ServerArgs(model_path="dummy"))
    logging.getLogger("sglang").setLevel(logging.ERROR)


def invoke(
    layer: Layer,
    projection: str,
    tile: Tile,
    states: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    aligned: tuple,
    sorted_out: bool = False,
) -> None:
    """One projection, as `fused_experts` launches it."""
    import triton.language as tl

    from sglang.kernels.ops.moe import fused_moe_triton_kernels as kernels

    tile = dict(tile)
    tma = tile.pop("USE_TMA", False)
    kernels.invoke_fused_moe_kernel(
        *(states, weights, None, out, None, None, None, topk_weights, topk_ids),
        *aligned,
        projection == DOWN,
        layer.topk if projection == GATE_UP else 1,
        tile,
        compute_type=tl.bfloat16 if layer.dtype == "bfloat16" else tl.float16,
        use_fp8_w8a8=False,
        use_int8_w8a8=False,
        use_int8_w8a16=False,
        use_int4_w4a16=False,
        per_channel_quant=False,
        a_use_tma=tma,
        b_use_tma=tma,
        c_sorted=sorted_out,
        filter_expert=False,
        router_topk=layer.topk,
    )


class _CompileOnly:
    """Stands for the kernel: compiles what would be launched, and launches nothing."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.compiled = None

    def __getitem__(self, grid):
        def compile(*args, **kwargs):
            self.compiled = self.kernel.warmup(*args, grid=(1,), **kwargs)

        return compile


def padded_length(layer: Layer, tokens: int, m: int) -> int:
    """Length of `sorted_token_ids` as moe_align_block_size makes it."""
    slots = tokens * layer.topk
    if slots < layer.experts + 1:
        return slots * m
    return slots + (layer.experts + 1) * (m - 1)


def kind_of(layer: Layer, tokens: int, tile: Tile) -> tuple:
    """What the compiler sees of a number of tokens."""
    padded = padded_length(layer, tokens, tile["BLOCK_SIZE_M"])
    slots = tokens * layer.topk
    return slots % 16 == 0, padded % 16 == 0, slots == 1, padded == 1


def compile_tile(task: tuple) -> Optional[int]:
    """Compiles a tile into Triton's cache; returns its spills, None if it fails."""
    layer, projection, tokens, tile = task
    from sglang.kernels.ops.moe import fused_moe_triton_kernels as kernels

    def empty(*shape, dtype=DTYPES[layer.dtype]):
        return torch.empty(shape, dtype=dtype, device="cuda")

    rows, columns = layer.shape(projection)
    m = tile["BLOCK_SIZE_M"]
    slots, padded = tokens * layer.topk, padded_length(layer, tokens, m)
    aligned = (
        empty(padded, dtype=torch.int32),
        empty(triton.cdiv(padded, m), dtype=torch.int32),
        empty(1, dtype=torch.int32),
    )
    spy = _CompileOnly(kernels.fused_moe_kernel)
    try:
        with mock.patch.object(kernels, "fused_moe_kernel", spy):
            invoke(
                *(layer, projection, tile),
                empty(tokens if projection == GATE_UP else slots, columns),
                empty(1, rows, columns).expand(layer.experts, -1, -1),
                empty(slots, rows),
                empty(tokens, layer.topk, dtype=torch.float32),
                empty(tokens, layer.topk, dtype=torch.int32),
                aligned,
                sorted_out=bool(tile.get("USE_TMA")) and projection == GATE_UP,
            )
        spy.compiled._init_handles()
        return spy.compiled.n_spills
    except Exception as e:
        print(f"{projection} {name_of(tile)}: {type(e).__name__}: {e}", file=sys.stderr)
        return None


def random_weights(layer: Layer, projection: str) -> torch.Tensor:
    shape = (layer.experts, *layer.shape(projection))
    weights = torch.empty(shape, dtype=DTYPES[layer.dtype], device="cuda")
    for expert in weights:
        expert.normal_(std=0.02)
    return weights


def draw_routings(layer: Layer, tokens: int, kind: str, count: int) -> List[tuple]:
    """Weights and ids of `count` draws: experts as likely as in a trained router whose
    load is balanced but for chance ("even"), or in proportion to 1 / rank ("skewed").
    """
    generator = torch.Generator("cuda").manual_seed(tokens)
    drawn = []
    for _ in range(count):
        logits = torch.randn(
            (tokens, layer.experts), generator=generator, device="cuda"
        )
        if kind == "skewed":
            rank = 1 + torch.randperm(layer.experts, generator=generator, device="cuda")
            # Gumbel noise: the K largest are a draw without replacement.
            uniform = torch.rand(
                (tokens, layer.experts), generator=generator, device="cuda"
            )
            logits = -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7))) - rank.log()
        values, ids = torch.topk(logits, layer.topk)
        drawn.append((torch.softmax(values, dim=-1), ids.to(torch.int32)))
    return drawn


def draws(tokens: int) -> int:
    """Routings that take turns, so that few tokens' weights are not in the cache."""
    return 8 if tokens <= 64 else 4 if tokens <= 256 else 2 if tokens <= 1024 else 1


@contextlib.contextmanager
def tiles_of(tiles: Dict[int, Tuple[Tile, Tile]]) -> Iterator[None]:
    """Let SGLang use these tiles as if its files held them; none: its default ones."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe_triton_config

    def get_moe_configs(*args, down_moe=False, **kwargs):
        return {tokens: dict(pair[down_moe]) for tokens, pair in tiles.items()} or None

    with mock.patch.object(fused_moe_triton_config, "get_moe_configs", get_moe_configs):
        yield


@contextlib.contextmanager
def tiles_from(folder: Optional[Path]) -> Iterator[None]:
    """Let SGLang read its tiles from this folder; None: its own files."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe_triton_config

    fused_moe_triton_config.get_moe_configs.cache_clear()
    variable = {"SGLANG_MOE_CONFIG_DIR": str(folder)} if folder else {}
    with mock.patch.dict(os.environ, variable):
        yield
    fused_moe_triton_config.get_moe_configs.cache_clear()


def layer_calls(
    layer: Layer, weights: List[torch.Tensor], tokens: int, kind: str
) -> List[Callable[[], torch.Tensor]]:
    """A call of one layer's experts for each of its routings; it returns the output."""
    from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
    from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import fused_experts
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    config = MoeRunnerConfig(
        num_experts=layer.experts,
        num_local_experts=layer.experts,
        hidden_size=layer.hidden,
        intermediate_size_per_partition=layer.width,
        top_k=layer.topk,
        activation=layer.activation,
        inplace=False,
    )
    states = torch.randn((tokens, layer.hidden), device="cuda")
    states = states.to(DTYPES[layer.dtype])
    routings = [
        StandardTopKOutput(weight, ids, None)
        for weight, ids in draw_routings(layer, tokens, kind, draws(tokens))
    ]
    return [
        partial(fused_experts, states, *weights, routing, config)
        for routing in routings
    ]
