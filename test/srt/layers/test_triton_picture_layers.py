"""On the Triton backend the tokens of a picture see each other in a layer with a sliding
window, as far back as that reaches, and are causal in one without; text is causal in
both.
"""

import pytest
import torch
import window_layer
from window_layer import DEVICE, WindowLayer

from sglang.srt.layers.radix_attention import RadixAttention
from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci

register_cpu_ci(est_time=40, suite="stage-a-test-cpu")
register_cuda_ci(est_time=20, suite="stage-b-test-1-gpu-small")

WINDOW = 6
# Two chunks of two prompts, and the first and the last token of their pictures, which
# are shorter and longer than the window.
CHUNKS = [9, 20], [26, 45]
PICTURES = [[(2, 5), (11, 25)], [(0, 16), (21, 24), (30, 44)]]

# A GPU multiplies float32 tiles as TF32.
ATOL = 1e-5 if DEVICE == "cpu" else 1e-2


@pytest.fixture(autouse=True, scope="module")
def _one_process():
    with window_layer.one_process():
        yield


def attention(q, k, v, window, pictures):
    """The definition, in float64."""
    scores = torch.einsum("qhd,kd->hqk", q.double(), k[:, 0].double())
    i = torch.arange(len(q))
    seen = i[None] <= i[:, None]
    for first, last in pictures:
        seen[first : last + 1, first : last + 1] = True
    if window is not None:
        seen &= i[None] >= i[:, None] - window
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,kd->qhd", weights, v[:, 0].double())


def lookahead(starts, ends):
    """Of the new tokens, which hold pictures whole or not at all."""
    parts = []
    for start, end, pictures in zip(starts, ends, PICTURES):
        part = torch.zeros(end, dtype=torch.int32)
        for first, last in pictures:
            if last < end:
                part[first : last + 1] = torch.arange(last - first, -1, -1)
        parts.append(part[start:])
    return torch.cat(parts).to(DEVICE)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sliding", [True, False])
def test_layers(sliding, deterministic):
    lengths = CHUNKS[1]
    layer = WindowLayer(WINDOW, len(lengths), max(lengths))
    layer.backend.enable_deterministic = deterministic
    if not sliding:
        layer.layer = RadixAttention(layer.HEADS, layer.DIM, 1.0, 1, layer_id=1)
    generator = torch.Generator().manual_seed(0)

    def tokens(heads):
        return [
            torch.randn(length, heads, layer.DIM, generator=generator)
            for length in lengths
        ]

    q, k, v = tokens(layer.HEADS), tokens(1), tokens(1)
    expected = [
        attention(*each, WINDOW, pictures) if sliding else attention(*each, None, [])
        for *each, pictures in zip(q, k, v, PICTURES)
    ]
    starts = [0] * len(lengths)
    for ends in CHUNKS:
        batch = layer.extend(ends, starts)
        batch.lookahead = lookahead(starts, ends)
        layer.backend.init_forward_metadata(batch)
        new = [
            torch.cat([x[a:b] for x, a, b in zip(rows, starts, ends)]).to(DEVICE)
            for rows in (q, k, v)
        ]
        found = layer.backend.forward_extend(
            new[0].flatten(1), *new[1:], layer.layer, batch
        ).cpu()
        for out, a, b in zip(expected, starts, ends):
            mine, found = found[: b - a], found[b - a :]
            torch.testing.assert_close(
                mine.double(), out[a:b].flatten(1), rtol=0, atol=ATOL
            )
        starts = ends


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
