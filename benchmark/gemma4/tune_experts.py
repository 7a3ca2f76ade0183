"""Tune the tiles of SGLang's fused experts for this GPU, and measure what they give.

    python benchmark/gemma4/tune_experts.py --name experts-h200
    python benchmark/gemma4/tune_experts.py --name experts-h200 --check DIR

The defaults are Gemma-4-26B-A4B's experts in bfloat16 and take some minutes on one GPU.
The files that SGLang reads are written below `--configs`: point SGLANG_MOE_CONFIG_DIR
there to serve with them, or copy them beside its own. What was timed is kept in
`--configs` too, so that a run which was stopped goes on where it was; `--check DIR` only
measures the files of an earlier run, or of several. SGLang's own files, of whatever
Triton they are, take part.

The kernel is the one that serves, called as it is served. Its tiles are timed for each
projection alone, in CUDA graphs, under even and under skewed routing; several routings
take turns, so that the weights of few tokens come from memory and not from the L2 cache.
Four steps: every tile that the registers and the shared memory hold; the orders of the
grid and the descriptor loads (TMA) of the best; whole layers with the best pairs; and
whole layers beside the default tiles, for the keys and what lies between them.
"""

import argparse
import contextlib
import functools
import json
import logging
import math
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, ContextManager, Dict, Iterator, List, Optional, Tuple
from unittest import mock

import torch
import triton
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
import one_rank  # noqa: E402
from results import FOLDER, Results, table  # noqa: E402

KEYS = (
    *(1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048),
    *(3072, 4096, 6144, 8192, 16384),
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
GATE_UP, DOWN = "gate_up", "down"
ROUTINGS = ("even", "skewed")
# A thread's share of the accumulator; the rest of its 255 registers hold addresses.
MAX_ACCUMULATORS = 128
# What Triton keeps in shared memory beside the operands' stages.
RESERVED_SHARED = 1024
# Tiles this much slower than the best so far are left: a refinement, one replay.
SLOW, HOPELESS = 1.25, 1.6

Tile = Dict[str, int]


@dataclass(frozen=True)
class Layer:
    """The experts of one layer."""

    experts: int
    width: int
    hidden: int
    topk: int
    dtype: str
    activation: str

    def shape(self, projection: str) -> Tuple[int, int]:
        """Rows and columns of an expert's matrix."""
        if projection == GATE_UP:
            return 2 * self.width, self.hidden
        return self.hidden, self.width

    def rows(self, tokens: int) -> float:
        """Rows an expert has on average."""
        return tokens * self.topk / self.experts


def _name(tile: Tile) -> str:
    """A tile in a few letters: M128 N128 K64 G1 w8 s3."""
    text = "M{BLOCK_SIZE_M} N{BLOCK_SIZE_N} K{BLOCK_SIZE_K} G{GROUP_SIZE_M}".format(
        **tile
    )
    text += f" w{tile['num_warps']} s{tile['num_stages']}"
    return text + " tma" if tile.get("USE_TMA") else text


def _rows_of_tiles(rows: float) -> List[int]:
    """BLOCK_SIZE_M worth trying where experts have this many rows on average."""
    low, high = min(64, 0.75 * rows), max(16, 4 * rows)
    return [m for m in (16, 32, 64, 128, 256) if low <= m <= high]


def _tiles(rows: float, shared: int, itemsize: int) -> List[Tile]:
    """Tiles worth timing: those that fit, in depth and width that such rows can use."""
    found = []
    for m in _rows_of_tiles(rows):
        few = m <= 32  # bound by the weights' bytes, not by arithmetic
        for n in (32, 64, 128) if few else (64, 128, 256):
            for k in (64, 128, 256) if few else (32, 64, 128):
                for warps in (4, 8):
                    accumulators = m * n / (32 * warps)
                    if not (4 if warps == 4 else 8 if few else 32) <= accumulators:
                        continue
                    if accumulators > MAX_ACCUMULATORS:
                        continue
                    fit = (shared - RESERVED_SHARED) // ((m + n) * k * itemsize)
                    if few:
                        stages = [s for s in (2, 3, 4, 5) if s <= fit and s * k >= 192]
                    else:
                        stages = [s for s in (2, 3, 4) if s <= fit and s * k >= 128]
                    for s in stages[-2:] if not few else stages[-3:]:
                        found.append(
                            {
                                "BLOCK_SIZE_M": m,
                                "BLOCK_SIZE_N": n,
                                "BLOCK_SIZE_K": k,
                                "GROUP_SIZE_M": 1,
                                "num_warps": warps,
                                "num_stages": s,
                            }
                        )
    return found


def _neighbours(tile: Tile, projection: str, rows: float) -> List[Tile]:
    """The same tile in other grid orders and, where it can pay, loaded by descriptor."""
    groups = (8, 16, 32, 64) if rows >= 32 else (16, 32)
    found = [dict(tile, GROUP_SIZE_M=group) for group in groups]
    if projection == DOWN and rows >= 16:
        found += [dict(t, USE_TMA=True) for t in (tile, found[1])]
    return found


def _start_sglang() -> None:
    """What compiling kernels asks of a server: its arguments."""
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(model_path="dummy")
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0))
    logging.getLogger("sglang").setLevel(logging.ERROR)


def _start_layers() -> None:
    """What whole layers ask for: its groups of GPUs, too."""
    from sglang.srt.server_args import ServerArgs

    one_rank.start(ServerArgs(model_path="dummy"))
    logging.getLogger("sglang").setLevel(logging.ERROR)


def _invoke(
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


def _padded(layer: Layer, tokens: int, m: int) -> int:
    """Length of `sorted_token_ids` as moe_align_block_size makes it."""
    slots = tokens * layer.topk
    if slots < layer.experts + 1:
        return slots * m
    return slots + (layer.experts + 1) * (m - 1)


def _kind(layer: Layer, tokens: int, tile: Tile) -> tuple:
    """What the compiler sees of a number of tokens."""
    padded = _padded(layer, tokens, tile["BLOCK_SIZE_M"])
    slots = tokens * layer.topk
    return slots % 16 == 0, padded % 16 == 0, slots == 1, padded == 1


def _compile(task: tuple) -> Optional[int]:
    """Compiles a tile into Triton's cache; returns its spills, None if it fails."""
    layer, projection, tokens, tile = task
    from sglang.kernels.ops.moe import fused_moe_triton_kernels as kernels

    def empty(*shape, dtype=DTYPES[layer.dtype]):
        return torch.empty(shape, dtype=dtype, device="cuda")

    rows, columns = layer.shape(projection)
    m = tile["BLOCK_SIZE_M"]
    slots, padded = tokens * layer.topk, _padded(layer, tokens, m)
    aligned = (
        empty(padded, dtype=torch.int32),
        empty(triton.cdiv(padded, m), dtype=torch.int32),
        empty(1, dtype=torch.int32),
    )
    spy = _CompileOnly(kernels.fused_moe_kernel)
    try:
        with mock.patch.object(kernels, "fused_moe_kernel", spy):
            _invoke(
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
        print(f"{projection} {_name(tile)}: {type(e).__name__}: {e}", file=sys.stderr)
        return None


class Tuner:
    """Times tiles of one layer's experts on this GPU."""

    def __init__(self, layer: Layer, state: Path, pool: ProcessPoolExecutor):
        self.layer, self.path, self.pool = layer, state, pool
        # times[projection][tokens][tile's name] = microseconds of each routing
        self.times: Dict[str, Dict[str, Dict[str, List[float]]]] = {
            GATE_UP: {},
            DOWN: {},
        }
        # layers[tokens][both tiles' names] = microseconds of each routing
        self.layers: Dict[str, Dict[str, List[float]]] = {}
        self.tiles: Dict[str, Tile] = {}
        self.spills: Dict[str, Optional[int]] = {}
        if state.exists():
            kept = json.loads(state.read_text())
            if kept.pop("layer") != asdict(layer):
                raise SystemExit(f"{state} is of other experts: give another --configs")
            vars(self).update(kept)
            print(f"going on from {state}")
        self.weights: Dict[str, torch.Tensor] = {}

    def save(self) -> None:
        kept = {
            name: vars(self)[name] for name in ("times", "layers", "tiles", "spills")
        }
        text = json.dumps({"layer": asdict(self.layer), **kept})
        partial = self.path.with_suffix(".partial")
        partial.write_text(text)
        os.replace(partial, self.path)

    def candidates(self, tokens: int) -> Dict[str, List[Tile]]:
        properties = torch.cuda.get_device_properties(0)
        shared = properties.shared_memory_per_block_optin
        itemsize = DTYPES[self.layer.dtype].itemsize
        tiles = _tiles(self.layer.rows(tokens), shared, itemsize)
        return {GATE_UP: tiles, DOWN: tiles}

    def refinements(self, tokens: int, best: int = 2) -> Dict[str, List[Tile]]:
        """Neighbours of the best tiles, for each BLOCK_SIZE_M that is near the lead."""
        found = {}
        for projection in (GATE_UP, DOWN):
            scores = self.scores(projection, tokens)
            plain = [name for name in scores if " G1 " in name and "tma" not in name]
            lead, by_m = min(scores[name] for name in plain), {}
            for name in sorted(plain, key=scores.get):
                if scores[name] <= SLOW * lead:
                    by_m.setdefault(self.tiles[name]["BLOCK_SIZE_M"], []).append(name)
            rows = self.layer.rows(tokens)
            found[projection] = [
                tile
                for names in by_m.values()
                for name in names[:best]
                for tile in _neighbours(self.tiles[name], projection, rows)
            ]
        return found

    def compile(self, wanted: Dict[int, Dict[str, List[Tile]]]) -> None:
        """Compiles in parallel what is not compiled yet, once for all numbers of tokens."""
        tasks = {}
        for tokens, projections in wanted.items():
            for projection, tiles in projections.items():
                for tile in tiles:
                    kind = _kind(self.layer, tokens, tile)
                    tasks.setdefault(
                        f"{projection} {_name(tile)} {kind}",
                        (self.layer, projection, tokens, tile),
                    )
        tasks = {name: task for name, task in tasks.items() if name not in self.spills}
        spills = self.pool.map(_compile, tasks.values())
        bar = tqdm(spills, total=len(tasks), desc="compiling", unit="kernel")
        self.spills.update(zip(tasks, list(bar)))
        self.save()

    def scores(self, projection: str, tokens: int) -> Dict[str, float]:
        """The geometric mean of a tile's times over the routings."""
        return {
            name: math.exp(statistics.fmean(map(math.log, times)))
            for name, times in self.times[projection].get(str(tokens), {}).items()
        }

    def time(self, tokens: int, projections: Dict[str, List[Tile]]) -> None:
        """Times the tiles of one number of tokens that are not timed yet."""
        for projection, tiles in projections.items():
            times = self.times[projection].setdefault(str(tokens), {})
            left = [
                tile
                for tile in tiles
                if _name(tile) not in times
                # A spill costs more than any tile gains.
                and self.spills.get(
                    f"{projection} {_name(tile)} {_kind(self.layer, tokens, tile)}"
                )
                == 0
            ]
            if not left:
                continue
            bench = _Projection(
                self.layer, projection, tokens, self._weights(projection)
            )
            for tile in left:
                best = self.scores(projection, tokens).values()
                self.tiles[_name(tile)] = tile
                times[_name(tile)] = bench.time(tile, min(best, default=math.inf))
            del bench
        self.save()

    def _weights(self, projection: str) -> torch.Tensor:
        if projection not in self.weights:
            self.weights[projection] = _random_weights(self.layer, projection)
        return self.weights[projection]

    def pairs(self, tokens: int, shared: bool = False) -> List[Tuple[Tile, Tile]]:
        """Tiles for both projections, of one BLOCK_SIZE_M, best first by the sum of
        their times: one pair for each BLOCK_SIZE_M with and one without descriptors,
        or (shared) pairs of one tile."""
        scores = [self.scores(projection, tokens) for projection in (GATE_UP, DOWN)]
        found = {}
        for first in sorted(scores[0], key=scores[0].get):
            for second in sorted(scores[1], key=scores[1].get):
                one, other = self.tiles[first], self.tiles[second]
                m = one["BLOCK_SIZE_M"]
                if m != other["BLOCK_SIZE_M"] or shared and first != second:
                    continue
                key = first if shared else (m, other.get("USE_TMA", False))
                found.setdefault(
                    key, (scores[0][first] + scores[1][second], one, other)
                )
        order = sorted(found.values(), key=lambda pair: pair[0])
        return [(one, other) for _, one, other in order]

    def settle(self, tokens: int) -> None:
        """Times whole layers with the best pairs: a descriptor's rows are padded, which
        the activation between the projections pays for."""
        times = self.layers.setdefault(str(tokens), {})
        left = [
            pair
            for pair in self.pairs(tokens)[:4]
            if " + ".join(map(_name, pair)) not in times
        ]
        if not left:
            return
        weights = [self._weights(projection) for projection in (GATE_UP, DOWN)]
        for pair in left:
            with _tiles_of({tokens: pair}):
                medians = [
                    _median(_layer_launches(self.layer, weights, tokens, kind))
                    for kind in ROUTINGS
                ]
            times[" + ".join(map(_name, pair))] = medians
        self.save()

    def choose(self, tokens: int, shared: bool = False) -> Tuple[Tile, Tile]:
        """The tiles of both projections for one key."""
        pairs = self.pairs(tokens, shared)
        times = self.layers.get(str(tokens), {})
        timed = [pair for pair in pairs if " + ".join(map(_name, pair)) in times]
        if shared or not timed:
            return pairs[0]
        return min(
            timed, key=lambda pair: math.prod(times[" + ".join(map(_name, pair))])
        )

    def write(self, folder: Path, shared: bool = False) -> List[Path]:
        """Writes the files that SGLang looks up, for the keys that were timed."""
        from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config import (
            get_config_file_name,
        )

        keys = sorted(int(tokens) for tokens in self.times[GATE_UP])
        chosen = {tokens: self.choose(tokens, shared) for tokens in keys}
        version = f"triton_{triton.__version__.replace('.', '_')}"
        folder = folder / "configs" / version
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for i, projection in enumerate((GATE_UP, DOWN)):
            path = folder / get_config_file_name(
                *(self.layer.experts, self.layer.width, None),
                down_moe=projection == DOWN,
            )
            if shared and projection == DOWN:
                path.unlink(missing_ok=True)
                continue
            content = {str(tokens): tiles[i] for tokens, tiles in chosen.items()}
            path.write_text(json.dumps(content, indent=4) + "\n")
            paths.append(path)
        return paths


def _random_weights(layer: Layer, projection: str) -> torch.Tensor:
    shape = (layer.experts, *layer.shape(projection))
    weights = torch.empty(shape, dtype=DTYPES[layer.dtype], device="cuda")
    for expert in weights:
        expert.normal_(std=0.02)
    return weights


def _routings(layer: Layer, tokens: int, kind: str, count: int) -> List[tuple]:
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


def _draws(tokens: int) -> int:
    """Routings that take turns, so that few tokens' weights are not in the cache."""
    return 8 if tokens <= 64 else 4 if tokens <= 256 else 2 if tokens <= 1024 else 1


def _capture(launches) -> torch.cuda.CUDAGraph:
    """A CUDA graph of these calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launches()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launches()
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> Tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    return start, end


class _Projection:
    """One projection for one number of tokens, under both routings."""

    def __init__(self, layer: Layer, projection: str, tokens: int, weights):
        self.layer, self.projection, self.tokens = layer, projection, tokens
        self.weights = weights
        rows, columns = layer.shape(projection)
        slots = tokens * layer.topk
        # A descriptor's rows are padded: every expert's begin with a tile.
        most = slots + min(slots, layer.experts + 1) * 255
        dtype = DTYPES[layer.dtype]
        states = tokens if projection == GATE_UP else most
        self.states = torch.randn((states, columns), device="cuda").to(dtype)
        self.out = torch.empty((most, rows), dtype=dtype, device="cuda")
        self.routings = {
            kind: _routings(layer, tokens, kind, _draws(tokens)) for kind in ROUTINGS
        }
        self.aligned: Dict[tuple, list] = {}

    def _aligned(self, kind: str, m: int) -> list:
        from sglang.srt.layers.moe.moe_runner.triton_utils import moe_align_block_size

        if (kind, m) not in self.aligned:
            self.aligned[kind, m] = [
                moe_align_block_size(ids, m, self.layer.experts)
                for _, ids in self.routings[kind]
            ]
        return self.aligned[kind, m]

    def time(self, tile: Tile, best: float, replays: int = 4) -> List[float]:
        """Microseconds a launch under each routing; the first alone if it is slow."""
        medians = []
        for kind in ROUTINGS:
            aligned = self._aligned(kind, tile["BLOCK_SIZE_M"])

            def launches():
                for (weights, ids), sorting in zip(self.routings[kind], aligned):
                    _invoke(
                        *(self.layer, self.projection, tile, self.states),
                        *(self.weights, self.out, weights, ids, sorting),
                    )

            graph = _capture(launches)
            samples: List[float] = []
            _replay(graph)
            for _ in range(replays):
                start, end = _replay(graph)
                end.synchronize()
                samples.append(1000 * start.elapsed_time(end) / len(aligned))
                if samples[-1] > HOPELESS * best:
                    break
            medians.append(round(statistics.median(samples), 3))
            del graph
        return medians


@contextlib.contextmanager
def _tiles_of(tiles: Dict[int, Tuple[Tile, Tile]]) -> Iterator[None]:
    """Let SGLang use these tiles as if its files held them; none: its default ones."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe_triton_config

    def get_moe_configs(*args, down_moe=False, **kwargs):
        return {tokens: dict(pair[down_moe]) for tokens, pair in tiles.items()} or None

    with mock.patch.object(fused_moe_triton_config, "get_moe_configs", get_moe_configs):
        yield


@contextlib.contextmanager
def _tiles_from(folder: Optional[Path]) -> Iterator[None]:
    """Let SGLang read its tiles from this folder; None: its own files."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe_triton_config

    fused_moe_triton_config.get_moe_configs.cache_clear()
    variable = {"SGLANG_MOE_CONFIG_DIR": str(folder)} if folder else {}
    with mock.patch.dict(os.environ, variable):
        yield
    fused_moe_triton_config.get_moe_configs.cache_clear()


def _layer_launches(layer: Layer, weights: List[torch.Tensor], tokens: int, kind: str):
    """A call that runs one layer's experts for each of its routings; its outputs."""
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
        for weight, ids in _routings(layer, tokens, kind, _draws(tokens))
    ]
    return lambda: [
        fused_experts(states, *weights, routing, config) for routing in routings
    ]


def _median(launches, replays: int = 5) -> float:
    """Microseconds of one of the calls that `launches` makes."""
    count = len(launches())
    graph = _capture(launches)
    _replay(graph)
    events = [_replay(graph) for _ in range(replays)]
    torch.cuda.synchronize()
    return statistics.median(1000 * a.elapsed_time(b) / count for a, b in events)


def check(
    layer: Layer,
    arms: Dict[str, Callable[[], ContextManager]],
    tokens_of: List[int],
    replays: int,
    results: Results,
    path: Path,
) -> None:
    """Times whole layers with each arm's tiles, in turn, and checks that they agree."""
    weights = [_random_weights(layer, projection) for projection in (GATE_UP, DOWN)]
    for tokens in tqdm(tokens_of, desc="whole layers", unit="case"):
        for kind in ROUTINGS:
            case = {"tokens": tokens, "routing": kind}
            if results.get(case, next(iter(arms)), "time") is not None:
                continue
            launches = _layer_launches(layer, weights, tokens, kind)
            count = _draws(tokens)
            graphs, expected = {}, None
            for arm, tiles in arms.items():
                with tiles():
                    output = launches()[0].float()
                    graphs[arm] = _capture(launches)
                expected = output if expected is None else expected
                error = (output - expected).norm() / expected.norm()
                if not error < 0.01:
                    raise SystemExit(f"{arm} at {tokens} tokens differs by {error:.1e}")
            events = {arm: [] for arm in arms}
            for graph in graphs.values():
                _replay(graph)
            for _ in range(replays):
                for arm, graph in graphs.items():
                    events[arm].append(_replay(graph))
            torch.cuda.synchronize()
            for arm, pairs in events.items():
                samples = [1000 * a.elapsed_time(b) / count for a, b in pairs]
                samples = [round(sample, 3) for sample in samples]
                results.add(case, arm, "time", "us", samples)
            del graphs
        results.save(path)


def between(keys: List[int]) -> List[int]:
    """The keys and what lies at both sides of where one key gives way to the next."""
    found = set(keys)
    for low, high in zip(keys, keys[1:]):
        middle = (low + high) // 2
        found.update((middle, min(middle + 1, high)))
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--name", default="experts", help="of the result file")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of results")
    parser.add_argument("--configs", type=Path, default=Path("tuned"))
    parser.add_argument(
        "--check", type=Path, nargs="+", metavar="DIR", help="measure these files alone"
    )
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--width", type=int, default=704, help="of one expert, a GPU")
    parser.add_argument("--hidden", type=int, default=2816)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--activation", choices=("gelu", "silu"), default="gelu")
    parser.add_argument("--keys", type=int, nargs="+", default=KEYS, help="tokens")
    parser.add_argument("--tokens", type=int, nargs="+", help="that are checked")
    parser.add_argument("--replays", type=int, default=11, help="samples of each arm")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    path = args.out / f"{args.name}.json"
    if path.exists():
        parser.exit(1, f"{path} exists: give another --name, or remove it\n")
    if not torch.cuda.is_available():
        parser.exit(1, "no GPU: tiles are timed on one\n")
    if args.topk > args.experts:
        parser.exit(1, f"--topk {args.topk} is more than {args.experts} experts\n")
    layer = Layer(
        *(args.experts, args.width, args.hidden, args.topk),
        *(args.dtype, args.activation),
    )

    if args.check is None:
        folder = args.configs
        folder.mkdir(parents=True, exist_ok=True)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            args.workers, mp_context=spawn, initializer=_start_sglang
        ) as pool:
            tune(Tuner(layer, folder / "times.json", pool), list(args.keys), folder)
    else:
        _start_layers()

    results = Results.start(
        *("kernels", args.name, "Experts of a layer"), **asdict(layer)
    )
    arms = {
        "default tiles": lambda: _tiles_of({}),
        "SGLang's files": lambda: _tiles_from(None),
    }
    for folder in args.check or [args.configs]:
        name = folder.name if args.check else "tuned"
        arms[name] = functools.partial(_tiles_from, folder)
        if (folder / "shared").exists():
            arms[f"{name}, one file"] = functools.partial(
                _tiles_from, folder / "shared"
            )
    tokens = args.tokens or between(sorted(args.keys))
    check(layer, arms, tokens, args.replays, results, path)
    print(f"wrote {path}")
    print(f"\n{table(results, 'time')}")


def tune(tuner: Tuner, keys: List[int], folder: Path) -> None:
    """Times the tiles of every key and writes the files."""
    _start_layers()
    wanted = {tokens: tuner.candidates(tokens) for tokens in keys}
    tuner.compile(wanted)
    for tokens in tqdm(keys, desc="tiles", unit="key"):
        tuner.time(tokens, wanted[tokens])
    wanted = {tokens: tuner.refinements(tokens) for tokens in keys}
    tuner.compile(wanted)
    for tokens in tqdm(keys, desc="orders and descriptors", unit="key"):
        tuner.time(tokens, wanted[tokens])
    for tokens in tqdm(keys, desc="pairs", unit="key"):
        tuner.settle(tokens)
    for path in tuner.write(folder):
        print(f"wrote {path}")
    tuner.write(folder / "shared", shared=True)
    for tokens in sorted(keys):
        first, second = tuner.choose(tokens)
        print(f"{tokens:6d}  {_name(first):32s} {_name(second)}")


if __name__ == "__main__":
    main()
