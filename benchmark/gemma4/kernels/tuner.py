"""Searches the tiles of one layer's experts on this GPU, and keeps what was timed."""

import json
import math
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch
import triton
from gemma4.errors import UserError
from gemma4.kernels.launches import (
    ROUTINGS,
    compile_tile,
    draw_routings,
    draws,
    invoke,
    kind_of,
    layer_calls,
    random_weights,
    start_layers,
    tiles_of,
)
from gemma4.kernels.tiles import (
    DOWN,
    DTYPES,
    GATE_UP,
    Layer,
    Tile,
    candidates,
    name_of,
    neighbours,
)
from gemma4.kernels.timing import capture, median, timed
from tqdm import tqdm

# Tiles this much slower than the best so far are left: a refinement, one replay.
SLOW, HOPELESS = 1.25, 1.6


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
                raise UserError(f"{state} is of other experts: give another --configs.")
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
        tiles = candidates(self.layer.rows(tokens), shared, itemsize)
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
                for tile in neighbours(self.tiles[name], projection, rows)
            ]
        return found

    def compile(self, wanted: Dict[int, Dict[str, List[Tile]]]) -> None:
        """Compiles in parallel what is not compiled yet, once for all numbers of tokens."""
        tasks = {}
        for tokens, projections in wanted.items():
            for projection, tiles in projections.items():
                for tile in tiles:
                    kind = kind_of(self.layer, tokens, tile)
                    tasks.setdefault(
                        f"{projection} {name_of(tile)} {kind}",
                        (self.layer, projection, tokens, tile),
                    )
        tasks = {name: task for name, task in tasks.items() if name not in self.spills}
        spills = self.pool.map(compile_tile, tasks.values())
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
                if name_of(tile) not in times
                # A spill costs more than any tile gains.
                and self.spills.get(
                    f"{projection} {name_of(tile)} {kind_of(self.layer, tokens, tile)}"
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
                self.tiles[name_of(tile)] = tile
                times[name_of(tile)] = bench.time(tile, min(best, default=math.inf))
            del bench
        self.save()

    def _weights(self, projection: str) -> torch.Tensor:
        if projection not in self.weights:
            self.weights[projection] = random_weights(self.layer, projection)
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
            if " + ".join(map(name_of, pair)) not in times
        ]
        if not left:
            return
        weights = [self._weights(projection) for projection in (GATE_UP, DOWN)]
        for pair in left:
            with tiles_of({tokens: pair}):
                medians = [
                    median(layer_calls(self.layer, weights, tokens, kind))
                    for kind in ROUTINGS
                ]
            times[" + ".join(map(name_of, pair))] = medians
        self.save()

    def choose(self, tokens: int, shared: bool = False) -> Tuple[Tile, Tile]:
        """The tiles of both projections for one key."""
        pairs = self.pairs(tokens, shared)
        times = self.layers.get(str(tokens), {})
        timed = [pair for pair in pairs if " + ".join(map(name_of, pair)) in times]
        if shared or not timed:
            return pairs[0]
        return min(
            timed, key=lambda pair: math.prod(times[" + ".join(map(name_of, pair))])
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
            kind: draw_routings(layer, tokens, kind, draws(tokens)) for kind in ROUTINGS
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

            calls = [
                partial(
                    invoke,
                    *(self.layer, self.projection, tile, self.states),
                    *(self.weights, self.out, weights, ids, sorting),
                )
                for (weights, ids), sorting in zip(self.routings[kind], aligned)
            ]
            graph = capture(calls)
            samples: List[float] = []
            graph.replay()
            for _ in range(replays):
                start, end = timed(graph.replay)
                end.synchronize()
                samples.append(1000 * start.elapsed_time(end) / len(calls))
                if samples[-1] > HOPELESS * best:
                    break
            medians.append(round(statistics.median(samples), 3))
            del graph
        return medians


def tune(tuner: Tuner, keys: List[int], folder: Path) -> None:
    """Times the tiles of every key and writes the files."""
    start_layers()
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
        print(f"{tokens:6d}  {name_of(first):32s} {name_of(second)}")
