"""Times calls on a GPU: short ones as replays of CUDA graphs, long ones by themselves."""

import statistics
from typing import Callable, Dict, List, Sequence, Tuple

import torch
import triton

Calls = Sequence[Callable[[], object]]
Events = Tuple[torch.cuda.Event, torch.cuda.Event]


def capture(calls: Calls) -> torch.cuda.CUDAGraph:
    """A CUDA graph of these calls, the first of which was made once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def timed(call: Callable[[], object]) -> Events:
    """The events before and after a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    return start, end


def replays_in_turn(
    graphs: Dict[str, torch.cuda.CUDAGraph], calls: Dict[str, int], replays: int
) -> Dict[str, List[float]]:
    """Microseconds a call, for each of `replays` turns of every arm's graph.

    Args:
        calls: How many calls each graph holds.
    """
    events: Dict[str, List[Events]] = {name: [] for name in graphs}
    for graph in graphs.values():
        graph.replay()
    for _ in range(replays):
        for name, graph in graphs.items():
            events[name].append(timed(graph.replay))
    torch.cuda.synchronize()
    return {
        name: [round(1000 * a.elapsed_time(b) / calls[name], 4) for a, b in pairs]
        for name, pairs in events.items()
    }


def time_in_turn(arms: Dict[str, Calls], replays: int) -> Dict[str, List[float]]:
    """Microseconds a call, for each of `replays` turns of every arm's graph of calls."""
    graphs = {name: capture(calls) for name, calls in arms.items()}
    return replays_in_turn(
        graphs, {n: len(calls) for n, calls in arms.items()}, replays
    )


def time_long_in_turn(
    arms: Dict[str, Callable[[], object]], samples: int, least: float
) -> Dict[str, List[float]]:
    """Milliseconds a call, of calls that need no graph: for each of `samples` turns of
    every arm, which repeats its call until `least` milliseconds have passed."""

    def sample(call: Callable[[], object], repeats: int) -> float:
        start, end = timed(lambda: [call() for _ in range(repeats)])
        end.synchronize()
        return start.elapsed_time(end) / repeats

    repeats = {
        name: max(1, round(least / max(sample(call, 1), 0.02)))
        for name, call in arms.items()
    }
    times: Dict[str, List[float]] = {name: [] for name in arms}
    for _ in range(samples):
        for name, call in arms.items():
            times[name].append(round(sample(call, repeats[name]), 5))
    return times


def median(calls: Calls, replays: int = 5) -> float:
    """Microseconds of one of these calls."""
    return statistics.median(time_in_turn({"": calls}, replays)[""])


def copy_rate() -> float:
    """Bytes a microsecond, read and written, of a copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    milliseconds = triton.testing.do_bench(
        lambda: target.copy_(source), return_mode="median"
    )
    return 2 * source.numel() / (1000 * milliseconds)
