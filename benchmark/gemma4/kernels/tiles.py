"""The experts of a layer, and the tiles worth timing for them."""

from dataclasses import dataclass
from typing import Dict, List, Tuple

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
GATE_UP, DOWN = "gate_up", "down"
# A thread's share of the accumulator; the rest of its 255 registers hold addresses.
MAX_ACCUMULATORS = 128
# What Triton keeps in shared memory beside the operands' stages.
RESERVED_SHARED = 1024

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


def name_of(tile: Tile) -> str:
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


def candidates(rows: float, shared: int, itemsize: int) -> List[Tile]:
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


def neighbours(tile: Tile, projection: str, rows: float) -> List[Tile]:
    """The same tile in other grid orders and, where it can pay, loaded by descriptor."""
    groups = (8, 16, 32, 64) if rows >= 32 else (16, 32)
    found = [dict(tile, GROUP_SIZE_M=group) for group in groups]
    if projection == DOWN and rows >= 16:
        found += [dict(t, USE_TMA=True) for t in (tile, found[1])]
    return found
