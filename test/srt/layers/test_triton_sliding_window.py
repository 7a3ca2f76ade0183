"""A layer with a sliding window on the Triton backend reads, decoding, the keys that it
reads where the same tokens are prefilled: its own and those of the `window` tokens
before it.

`window` is what layers and the model runner are given; a config's `sliding_window`,
which counts the token itself, is one more.
"""

from types import SimpleNamespace

import pytest
import torch
import window_layer
from window_layer import DEVICE, WindowLayer, listed

from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")
register_cuda_ci(est_time=20, suite="stage-b-test-1-gpu-small")

WINDOW = 6
# Around what the layer is given, what a config says, and twice that.
LENGTHS = [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2, 2 * WINDOW + 3]
ROWS, ROOM = len(LENGTHS), 24
pools = pytest.mark.parametrize("page, hybrid", [(1, True), (4, True), (1, False)])

# A GPU multiplies float32 tiles as TF32.
ATOL = 1e-5 if DEVICE == "cpu" else 1e-2


@pytest.fixture(autouse=True, scope="module")
def _one_process():
    with window_layer.one_process():
        yield


def read_by(slots, position, window=WINDOW):
    """The slots of those of a request's tokens that the one at `position` attends to."""
    return [
        slot
        for k, slot in enumerate(slots.tolist())
        if position - window <= k <= position
    ]


@pools
def test_a_decoded_token_reads_its_window_and_itself(page, hybrid):
    layer = WindowLayer(WINDOW, ROWS, ROOM, page=page, hybrid=hybrid)
    layer.backend.init_forward_metadata(layer.decode(LENGTHS))
    found = layer.backend.forward_metadata
    assert listed(found.window_kv_indptr, found.window_kv_indices) == [
        read_by(slots, length - 1) for slots, length in zip(layer.slots, LENGTHS)
    ]


@pools
def test_a_graph_decodes_the_same(page, hybrid):
    layer = WindowLayer(WINDOW, ROWS, ROOM, page=page, hybrid=hybrid)
    layer.backend.init_cuda_graph_state(ROWS, ROWS)
    batch = layer.decode([1] * ROWS)
    layer.backend.init_forward_metadata_out_graph(batch, in_capture=True)
    captured = layer.backend.forward_metadata
    for lengths in LENGTHS, LENGTHS[::-1], [ROOM] * ROWS:
        layer.backend.init_forward_metadata_out_graph(layer.decode(lengths))
        assert listed(captured.window_kv_indptr, captured.window_kv_indices) == [
            read_by(slots, length - 1) for slots, length in zip(layer.slots, lengths)
        ]


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("page, topk", [(4, 1), (1, 2)])
@pytest.mark.parametrize("hybrid", [False, True])
def test_a_drafted_token_reads_its_window_and_itself(page, hybrid, topk, graph):
    steps, lengths = 3, [1, WINDOW - 2, WINDOW + 2]
    rows = len(lengths)
    layer = WindowLayer(
        WINDOW, rows, ROOM, page=page, hybrid=hybrid, drafts=steps, topk=topk
    )
    batch = layer.batch(ForwardMode.DECODE, lengths)
    batch.spec_info = SimpleNamespace(window_kv_indices=None, kv_indptr=None)
    if graph:
        layer.backend.init_cuda_graph_state(rows, rows * topk)
        layer.backend.init_forward_metadata_out_graph(batch)
        indptr = layer.backend.window_kv_indptr[:, : rows * topk + 1]
        lists = list(zip(indptr, layer.backend.cuda_graph_window_kv_indices))
    else:
        layer.backend.init_forward_metadata(batch)
        lists = [
            (found.window_kv_indptr, found.window_kv_indices)
            for found in (part.forward_metadata for part in layer.backend.attn_backends)
        ]
    for step, (indptr, indices) in enumerate(lists[: steps - 1]):
        expected = []
        for slots, length in zip(layer.slots, lengths):
            for branch in range(topk):
                drafted = slots[length + branch * steps :][: step + 1]
                chain = torch.cat([slots[:length], drafted])
                expected.append(read_by(chain, length + step))
        assert listed(indptr, indices) == expected


def attention(q, k, v, window):
    """The definition, in float64: token i attends to i - window, …, i."""
    scores = torch.einsum("qhd,kd->hqk", q.double(), k[:, 0].double())
    i = torch.arange(len(q))
    seen = (i[None] <= i[:, None]) & (i[None] >= i[:, None] - window)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,kd->qhd", weights, v[:, 0].double())


@pytest.mark.parametrize(
    "window, page, hybrid",
    [(WINDOW, 1, True), (WINDOW, 4, True), (WINDOW, 1, False), (1, 1, True)],
)
def test_prefill_and_decode_see_the_same_keys(window, page, hybrid):
    # Prompts of two chunks, and then four tokens: over the window's edge, beyond it.
    chunks = [window // 2, window + 3], [window, 2 * window + 2]
    lengths = [end + 4 for end in chunks[1]]
    layer = WindowLayer(window, len(lengths), max(lengths), page=page, hybrid=hybrid)
    generator = torch.Generator().manual_seed(0)

    def tokens(heads):
        return [
            torch.randn(length, heads, layer.DIM, generator=generator)
            for length in lengths
        ]

    q, k, v = tokens(layer.HEADS), tokens(1), tokens(1)
    expected = [attention(*each, window) for each in zip(q, k, v)]

    def forward(method, batch, starts, ends):
        new = [
            torch.cat([x[a:b] for x, a, b in zip(rows, starts, ends)])
            .flatten(1)
            .to(DEVICE)
            for rows in (q, k, v)
        ]
        layer.backend.init_forward_metadata(batch)
        kv = [x.view(-1, 1, layer.DIM) for x in new[1:]]
        found = method(new[0], *kv, layer.layer, batch).cpu()
        for out, a, b in zip(expected, starts, ends):
            mine, found = found[: b - a], found[b - a :]
            torch.testing.assert_close(
                mine.double(), out[a:b].flatten(1), rtol=0, atol=ATOL
            )

    starts = [0] * len(lengths)
    for ends in chunks:
        forward(layer.backend.forward_extend, layer.extend(ends, starts), starts, ends)
        starts = ends
    while starts != lengths:
        ends = [start + 1 for start in starts]
        forward(layer.backend.forward_decode, layer.decode(ends), starts, ends)
        starts = ends


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
