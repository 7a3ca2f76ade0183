"""Draw the tiles that the extend kernel walks, before and after.

    python -m gemma4 report tiles --out docs/img/prefill-tiles.svg

A sliding layer of Gemma 4 at 4096 new tokens, tiles of 128 queries by 64 keys: what
the kernel of 0.5.12.post1 does with each tile of the causal triangle, and which tiles
are left.
"""

from pathlib import Path

import numpy as np
from gemma4.errors import UserError
from gemma4.report.plot import COLOURS, LIMIT, RC, plt, save_above_legend

WALKED, MASKED, PLAIN = 1, 2, 3
LABELS = {
    WALKED: "walked: masks made, all of them empty",
    MASKED: "computed under a mask",
    PLAIN: "computed without a mask",
}


def tiles(tokens: int, window: int, block_m: int, block_n: int) -> tuple:
    """(before, after), one number for each tile: rows are blocks of queries."""
    queries = np.arange(tokens)[:, None]
    keys = np.arange(tokens)[None, :]
    visible = (keys <= queries) & (queries <= keys + window)
    shape = (tokens // block_m, block_m, tokens // block_n, block_n)
    some = visible.reshape(shape).any(axis=(1, 3))
    every = visible.reshape(shape).all(axis=(1, 3))
    causal = (keys <= queries).reshape(shape).any(axis=(1, 3))
    before = np.where(some, MASKED, np.where(causal, WALKED, 0))
    after = np.where(every, PLAIN, np.where(some, MASKED, 0))
    return before, after


def draw(path: Path, tokens: int, window: int, block_m: int, block_n: int) -> None:
    from matplotlib.colors import ListedColormap

    colours = {0: "#FFFFFF", WALKED: LIMIT, MASKED: COLOURS[1], PLAIN: COLOURS[0]}
    with plt.rc_context({**RC, "axes.grid": False}):
        figure, axes = plt.subplots(1, 2, figsize=(8, 4.2), sharey=True)
        grids = tiles(tokens, window, block_m, block_n)
        for axis, grid, title in zip(axes, grids, ["0.5.12.post1", "fork"]):
            axis.imshow(
                grid,
                extent=(0, tokens, tokens, 0),
                cmap=ListedColormap([colours[i] for i in range(4)]),
                vmin=0,
                vmax=3,
                interpolation="nearest",
            )
            axis.set_title(f"{title}: {np.count_nonzero(grid)} tiles")
            axis.set_xlabel("key")
        axes[0].set_ylabel("query")
        used = [i for i in LABELS if any((grid == i).any() for grid in grids)]
        save_above_legend(figure, path, {LABELS[i]: colours[i] for i in used}, 0.07)


def arguments(parser) -> None:
    parser.add("--out", "The picture's file.", Path("prefill-tiles.svg"), type=Path)
    parser.add("--tokens", "How many tokens are new.", 4096)
    parser.add("--window", "How many tokens before itself one sees.", 1023)
    parser.add("--block-m", "The queries of a tile.", 128)
    parser.add("--block-n", "The keys of a tile.", 64)


def run(args) -> None:
    if args.tokens % args.block_m or args.tokens % args.block_n:
        raise UserError(
            f"--tokens {args.tokens} is no multiple of both block sizes.", 2
        )
    draw(args.out, args.tokens, args.window, args.block_m, args.block_n)
    print(f"wrote {args.out}")
