"""Random tensors for the attention of layers, in bfloat16 on the GPU."""

from typing import NamedTuple, Sequence

import torch


class Heads(NamedTuple):
    """A layer's: how many, their sizes, and how far back one sees (-1: to the first)."""

    queries: int
    kv: int
    dim: int
    v_dim: int
    window: int = -1

    def kept(self, tokens: int) -> int:
        """Of so many cached tokens, those that a layer's window holds."""
        return min(tokens, self.window) if self.window > 0 else tokens


# Gemma-4-26B-A4B's layers.
MODEL = {"sliding": Heads(16, 8, 256, 256, 1023), "full": Heads(16, 2, 512, 512)}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def bounds(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Where each of these begins in all of them together, and where the last ends."""
    return torch.tensor([0, *lengths], device="cuda").cumsum(0).to(dtype)


def shuffled(slots: int) -> torch.Tensor:
    return torch.randperm(slots, device="cuda")
