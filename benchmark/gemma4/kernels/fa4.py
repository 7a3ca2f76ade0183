"""FlashAttention 4 as vLLM carries and calls it, an arm of the attention benchmarks.

`--fa4 SITE` names the folder that vLLM is installed in (its site-packages). The keys
and values lie in shuffled pages of 16 tokens, as in vLLM's cache on a Hopper GPU.
"""

import sys
from pathlib import Path
from typing import Callable, List, Sequence

import torch
from gemma4.errors import UserError

PAGE = 16


def load(site: Path) -> Callable:
    """vLLM's `flash_attn_varlen_func`; what is installed beside this Python comes first.

    Raises:
        UserError: The folder holds no vLLM with FlashAttention 4.
    """
    sys.path += [str(site), str(site / "nvidia_cutlass_dsl" / "python_packages")]
    try:
        from vllm.vllm_flash_attn import flash_attn_interface as interface
    except ImportError as e:
        raise UserError(f"--fa4 {site} holds no vLLM that can be imported: {e}")
    if not interface.FA4_AVAILABLE:
        reason = interface.FA4_UNAVAILABLE_REASON
        raise UserError(f"--fa4 {site} holds no FlashAttention 4: {reason}.")
    return interface.flash_attn_varlen_func


class Paged:
    """The keys and values of sequences, in pages.

    Args:
        keys, values: [tokens, KV heads, head size] of each sequence, what is cached and
            what is new.
    """

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]):
        lengths = [len(k) for k in keys]
        counts = [-(-n // PAGE) for n in lengths]
        order = torch.randperm(sum(counts), device="cuda").to(torch.int32)
        self.table = torch.zeros(
            (len(keys), max(counts)), dtype=torch.int32, device="cuda"
        )
        self.caches: List[torch.Tensor] = []
        for tensors in (keys, values):
            shape = (sum(counts), PAGE, *tensors[0].shape[1:])
            cache = torch.zeros(shape, dtype=tensors[0].dtype, device="cuda")
            first = 0
            for i, (x, count) in enumerate(zip(tensors, counts)):
                pages = order[first : first + count]
                self.table[i, :count] = pages
                padded = torch.zeros((count * PAGE, *x.shape[1:]), dtype=x.dtype)
                padded = padded.to(x.device)
                padded[: len(x)] = x
                cache[pages.long()] = padded.view(count, PAGE, *x.shape[1:])
                first += count
            self.caches.append(cache)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.longest = max(lengths)

    def call(
        self,
        function: Callable,
        q: torch.Tensor,
        new: Sequence[int],
        window: int,
        out: torch.Tensor,
    ) -> Callable[[], None]:
        """A launch: the last `new` tokens of each sequence attend, causally.

        Args:
            q, out: [sum(new), heads, head size].
            window: Earlier tokens that one sees, -1 for all.
        """
        ends = torch.tensor([0, *new], device="cuda").cumsum(0).to(torch.int32)

        def launch():
            function(
                q,
                *self.caches,
                max_seqlen_q=max(new),
                cu_seqlens_q=ends,
                max_seqlen_k=self.longest,
                seqused_k=self.lengths,
                causal=True,
                window_size=[window, 0] if window >= 0 else [-1, -1],
                block_table=self.table,
                out=out,
                num_splits=0,  # it chooses
                fa_version=4,
            )

        return launch
