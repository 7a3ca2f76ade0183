"""Time short kernels in turn, as replays of CUDA graphs."""

from typing import Callable, Dict, List, Sequence

import torch
import triton


def _capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def time_in_turn(
    arms: Dict[str, Sequence[Callable[[], object]]], replays: int
) -> Dict[str, List[float]]:
    """Microseconds a call, for each of `replays` turns of every arm's graph of calls."""
    graphs = {name: _capture(calls) for name, calls in arms.items()}
    events = {name: [] for name in graphs}
    for graph in graphs.values():
        graph.replay()
    for _ in range(replays):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: [round(1000 * a.elapsed_time(b) / len(arms[name]), 4) for a, b in pairs]
        for name, pairs in events.items()
    }


def copy_rate() -> float:
    """Bytes a microsecond, read and written, of a copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    milliseconds = triton.testing.do_bench(
        lambda: target.copy_(source), return_mode="median"
    )
    return 2 * source.numel() / (1000 * milliseconds)
