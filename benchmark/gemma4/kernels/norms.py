"""The norms of a decode step: cases of `kernel decode`."""

from types import ModuleType
from typing import Callable, Dict, List

import torch
from gemma4.errors import UserError
from gemma4.kernels.inputs import MODEL, normal
from gemma4.kernels.runner import agree

HIDDEN, HEADS, EPS = 2816, MODEL["full"].queries, 1e-6
TOKENS = (1, 8, 80, 320, 1024, 8192)


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.pow(2).mean(dim=-1, keepdim=True) + EPS).rsqrt() * weight


def _weights(count: int, size: int) -> List[torch.Tensor]:
    return [torch.rand(size, device="cuda").bfloat16() + 0.5 for _ in range(count)]


class QKV:
    """The q/k/v norm and the rotary embedding of one layer."""

    def __init__(self, base: ModuleType, fork: ModuleType, layer: str, tokens: int):
        from sglang.kernels.ops.attention.rope import (
            apply_rope_with_cos_sin_cache_inplace,
        )

        self.base, self.fork = base, fork
        self.rope = apply_rope_with_cos_sin_cache_inplace
        _, self.kv_heads, self.D = MODEL[layer][:3]
        self.tokens = tokens
        self.sizes = [h * self.D for h in (HEADS, self.kv_heads, self.kv_heads)]
        self.weights = _weights(2, self.D)
        self.positions = torch.randint(0, 8000, (tokens,), device="cuda")
        angles = torch.rand((8192, self.D // 2), device="cuda") * 7
        self.cache = torch.cat([angles.cos(), angles.sin()], dim=-1)
        self.qkv = normal(tokens, sum(self.sizes))

    def arms(self) -> Dict[str, Callable[[], object]]:
        q, k, v = self.qkv.split(self.sizes, dim=-1)
        shape = (HEADS, self.kv_heads, self.D, EPS)

        def norm_then_rope():
            self.base.gemma_qkv_rmsnorm(q, k, v, *self.weights, *shape)
            self.rope(
                positions=self.positions,
                q=q.view(self.tokens, -1, self.D),
                k=k.view(self.tokens, -1, self.D),
                cos_sin_cache=self.cache,
                is_neox=True,
            )

        def fused():
            self.fork.gemma4_qkv_rmsnorm_rope(
                *(q, k, v, *self.weights, self.positions, self.cache, *shape)
            )

        return {"base": norm_then_rope, "fork": fused}

    def check(self) -> None:
        parts = self.qkv.double().split(self.sizes, dim=-1)
        parts = [part.view(self.tokens, -1, self.D) for part in parts]
        one = torch.ones_like(self.weights[0])
        cos, sin = self.cache[self.positions].double()[:, None].chunk(2, dim=-1)
        exact = []
        for part, weight in zip(parts, [*self.weights, one]):
            y = _norm(part, weight.double())
            if weight is not one:
                a, b = y.chunk(2, dim=-1)
                y = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
            exact.append(y.flatten(1))
        before = self.qkv.clone()
        for name, call in self.arms().items():
            self.qkv.copy_(before)
            call()
            agree(f"{name} q/k/v norm", self.qkv, torch.cat(exact, dim=-1))
        self.qkv.copy_(before)

    def bytes(self) -> int:
        return 2 * self.qkv.nbytes + self.tokens * self.D * 4


class QKVAndStore(QKV):
    """The same, and the store of k and v in the KV pool."""

    def __init__(self, base: ModuleType, fork: ModuleType, layer: str, tokens: int):
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        super().__init__(base, fork, layer, tokens)
        size = 2 * max(TOKENS)
        self.pool = MHATokenToKVPool(
            size=size,
            page_size=1,
            dtype=self.qkv.dtype,
            head_num=self.kv_heads,
            head_dim=self.D,
            layer_num=1,
            device="cuda",
            enable_memory_saver=False,
        )
        # Slot 0 is for padding.
        self.slots = 1 + torch.randperm(size, device="cuda")[:tokens]

    def arms(self) -> Dict[str, Callable[[], object]]:
        q, k, v = self.qkv.split(self.sizes, dim=-1)
        shape = (HEADS, self.kv_heads, self.D, EPS)
        buffers = self.pool.get_kv_buffer(0)

        def then_store(call):
            call()
            heads = (x.view(self.tokens, -1, self.D) for x in (k, v))
            self.pool.set_kv_buffer(None, self.slots, *heads, layer_id_override=0)

        def fused():
            self.fork.gemma4_qkv_rmsnorm_rope(
                *(q, k, v, *self.weights, self.positions, self.cache, *shape),
                store_target=(*buffers, self.slots),
            )

        separate = super().arms()
        return {
            "base": lambda: then_store(separate["base"]),
            "two launches": lambda: then_store(separate["fork"]),
            "fork": fused,
        }

    def check(self) -> None:
        super().check()
        before = self.qkv.clone()
        _, *parts = self.qkv.split(self.sizes, dim=-1)
        for name, call in self.arms().items():
            buffers = self.pool.get_kv_buffer(0)
            for buffer in buffers:
                buffer.zero_()
            call()
            for buffer, part in zip(buffers, parts):
                expected = torch.zeros_like(buffer)
                expected[self.slots] = part.unflatten(-1, (-1, self.D))
                if not torch.equal(buffer, expected):
                    raise UserError(f"{name} stores k or v wrongly.")
            self.qkv.copy_(before)

    def bytes(self) -> int:
        kv = 2 * self.sizes[1] * self.tokens * self.qkv.element_size()
        return super().bytes() + kv + self.slots.nbytes


class PreFeedforward:
    """The norms between attention and the feedforward branches of one layer."""

    def __init__(self, fork: ModuleType, tokens: int):
        self.fork = fork
        self.x, self.residual = (normal(tokens, HIDDEN) for _ in range(2))
        self.weights = _weights(4, HIDDEN)
        self.one = torch.ones_like(self.weights[0])

    def arms(self) -> Dict[str, Callable[[], object]]:
        from sgl_kernel import fused_add_rmsnorm, rmsnorm

        post, mlp, router, moe = self.weights

        def five():
            hidden = rmsnorm(self.x, post, EPS)
            fused_add_rmsnorm(hidden, self.residual, mlp, EPS)
            routed = rmsnorm(self.residual, self.one, EPS) * router
            return hidden, routed, rmsnorm(self.residual, moe, EPS)

        def fused():
            return self.fork.gemma4_pre_feedforward_rmsnorms(
                self.x, self.residual, *self.weights
            )

        return {"base": five, "fork": fused}

    def check(self) -> None:
        before = self.residual.clone()
        post, *others = (weight.double() for weight in self.weights)
        summed = before.double() + _norm(self.x.double(), post)
        for name, call in self.arms().items():
            self.residual.copy_(before)
            outputs = call()
            agree(f"{name} residual", self.residual, summed)
            for output, weight in zip(outputs, others):
                agree(f"{name} norms", output, _norm(summed, weight))
        self.residual.copy_(before)

    def bytes(self) -> int:
        return 6 * self.x.nbytes
