"""Experts with even, skewed, few and the same tokens, and what they compute, in float64."""

import torch

KINDS = ("even", "skewed", "few", "same")
A4B = dict(num_experts=128, width=704, hidden=2816, topk=8)
# Tokens, and the experts of a layer.
SHAPES = [
    *((tokens, A4B) for tokens in (1, 37, 1000, 8192)),
    (700, dict(num_experts=8, width=128, hidden=512, topk=2)),
    (900, dict(num_experts=3, width=192, hidden=256, topk=3)),
    (129, dict(num_experts=1, width=64, hidden=1024, topk=1)),
]


def layer(tokens, kind, seed, dtype, num_experts, width, hidden, topk):
    """The states of tokens, both weights, the weights and the ids of their experts."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator(device).manual_seed(seed)
    normal = lambda *size: torch.randn(size, generator=g, device=device)
    x = normal(tokens, hidden).to(dtype)
    w1 = (normal(num_experts, 2 * width, hidden) / hidden**0.5).to(dtype)
    w2 = (normal(num_experts, hidden, width) / width**0.5).to(dtype)
    score = torch.rand((tokens, num_experts), generator=g, device=device)
    order = torch.randperm(num_experts, generator=g, device=device)
    if kind == "skewed":
        score = score.clamp(1e-7).log() * (1 + order)
    elif kind == "few":
        score[:, order[2 * topk :]] -= 2
    elif kind == "same":
        score[:, order[:topk]] += 2
    values, ids = score.topk(topk)
    return x, w1, w2, torch.softmax(values, dim=-1).float(), ids.int()


def gelu_and_mul(x):
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def sort_rows(ids, block, num_experts):
    """moe_align_block_size. What it leaves unwritten is nonsense."""
    flat = ids.view(-1)
    most = flat.numel() + (num_experts + 1) * (block - 1)
    rows = torch.full(((most + 3) // 4 * 4,), 1 << 30, dtype=torch.int32)
    blocks = torch.full((len(rows) // block + 1,), 1 << 30, dtype=torch.int32)
    end = 0
    for e in range(num_experts):
        slots = (flat == e).nonzero().view(-1).cpu()
        padded = (len(slots) + block - 1) // block * block
        rows[end : end + padded] = flat.numel()
        rows[end : end + len(slots)] = slots.int()
        blocks[end // block : (end + padded) // block] = e
        end += padded
    found = rows, blocks, torch.tensor([end], dtype=torch.int32)
    return tuple(x.to(ids.device) for x in found)


class Products:
    """Both products of a layer's experts as a kernel is given them, and as they are.

    What is stored beyond the rows that exist is not to be looked at; what is read there
    is NaN.
    """

    def __init__(self, x, w1, w2, weights, ids, block):
        self.x, self.weights, self.topk = x, (w1, w2), ids.shape[1]
        self.num_valid = ids.numel()
        self.sorting = sort_rows(ids, block, len(w1))
        rows, blocks, (end,) = self.sorting
        self.num_rows = (len(rows) + block - 1) // block * block
        (self.rows,) = (rows[:end] < self.num_valid).nonzero(as_tuple=True)
        self.tokens = rows[self.rows].long() // self.topk
        self.experts = blocks[self.rows // block].long()
        self.gated = gelu_and_mul(self._multiply(x[self.tokens], w1))
        # The second product is given what the first one would have stored.
        self.h = self._empty(w2.shape[2])
        self.h[self.rows] = self.gated.to(x.dtype)
        self.down = self._multiply(self.h[self.rows], w2)

    def _multiply(self, rows, weights):
        out = rows.new_zeros((len(rows), weights.shape[1]), dtype=torch.float64)
        for e in self.experts.unique():
            at = self.experts == e
            out[at] = rows[at].double() @ weights[e].double().T
        return out

    def _empty(self, columns):
        return self.x.new_full((self.num_rows, columns), float("nan"))

    def call(self, product):
        """What `product` stores of both, for the rows that exist."""
        found = []
        for a, b, gated in (self.x, 0, True), (self.h, 1, False):
            b = self.weights[b]
            out = self._empty(b.shape[1] // (1 + gated))
            counter = self.sorting[0].new_zeros(4)
            product(a, b, out, self.sorting, counter, self.num_valid, self.topk, gated)
            found.append(out[self.rows])
        return found
