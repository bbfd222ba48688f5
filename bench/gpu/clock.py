"""Times of calls on a GPU: by events, one by one, and as replays of a CUDA graph, which has no launches by the host.

A rehearsal on a CPU makes the same calls under the host's clock.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

REHEARSAL = not torch.cuda.is_available()
DEVICE = "cpu" if REHEARSAL else "cuda"
SECONDS = 0.03  # of a measurement, about
ROUNDS = (10, 200)  # of a measurement, at least and at most


class Times(NamedTuple):
    """Microseconds of one call."""

    median: float
    q1: float
    q3: float


def eager(call: Callable) -> Times:
    """Calls one after another; where a call takes less time on the device than on the host, the host's time."""
    return _measure(call, 1)


def replayed(call: Callable, calls: int = 1) -> Times:
    """A graph of so many calls, replayed."""
    return _measure(captured(call, calls), calls)


def captured(call: Callable, calls: int = 1) -> Callable:
    """Something that replays so many calls; their results are in the memory that the capturing calls gave them."""
    if REHEARSAL:
        return lambda: [call() for _ in range(calls)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what happens at first calls only must not be captured
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph.replay


def host_microseconds(call: Callable, calls: int = 1000) -> float:
    """What one call takes of the host, which does not wait for the device."""
    calls, repeat = (1, 1) if REHEARSAL else (calls, 5)
    batches = []
    for _ in range(repeat):
        call()
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        batches.append((time.perf_counter() - start) / calls * 1e6)
    synchronize()
    return statistics.median(batches)


def synchronize() -> None:
    if not REHEARSAL:
        torch.cuda.synchronize()


def _measure(call: Callable, calls: int) -> Times:
    q1, median, q3 = statistics.quantiles(_rehearsed(call) if REHEARSAL else _rounds(call), n=4)
    return Times(*(seconds / calls * 1e6 for seconds in (median, q1, q3)))


def _rehearsed(call: Callable) -> list[float]:
    """Seconds, twice."""
    start = time.perf_counter()
    call()
    return 2 * [time.perf_counter() - start]


def _rounds(call: Callable) -> list[float]:
    """Seconds of each of as many rounds as there is time for."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    rounds = min(max(round(SECONDS / (time.perf_counter() - start)), ROUNDS[0]), ROUNDS[1])
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]
