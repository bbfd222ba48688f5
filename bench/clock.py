"""Two clocks: the host's, and CUDA events around replays of a graph, whose kernels no host launches one by one.

The host's waits for the device, or, as "launch", tells what a call takes of the host alone. On a CPU all are the same.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

ON_GPU = torch.cuda.is_available()
# Filling these bytes takes a device longer than a host takes for a launch, so that no launch shows in what follows.
AHEAD = 2**29


class Moment(NamedTuple):
    """On the device; the difference of two is in seconds."""

    event: torch.cuda.Event

    def __sub__(self, earlier: "Moment") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


class HostClock:
    def __init__(self, name: str):
        self.name, self._waits = name, name != "launch"

    def now(self) -> float:
        if self._waits:
            synchronize()
        return time.perf_counter()

    def prepared(self, call: Callable, calls: int) -> Callable:
        """Something that makes so many calls, to be timed."""
        return call if calls == 1 else lambda: [call() for _ in range(calls)]

    def settle(self) -> None:
        """Before the first of two timings in turn."""
        synchronize()


class GraphClock:
    name = "graph"

    def __init__(self):
        self._ahead = torch.empty(AHEAD, dtype=torch.uint8, device="cuda")

    def now(self) -> Moment:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return Moment(event)

    def prepared(self, call: Callable, calls: int) -> Callable:
        return captured(call, calls)

    def settle(self) -> None:
        self._ahead.zero_()


CLOCKS = {name: HostClock(name) for name in ("host", "launch")}
CLOCKS["graph"] = GraphClock() if ON_GPU else HostClock("graph")


def captured(call: Callable, calls: int = 1) -> Callable:
    """A graph's replay of so many calls; their results are in the memory that the capturing calls gave them."""
    if not ON_GPU:
        return HostClock("graph").prepared(call, calls)
    before, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(before)
    with torch.cuda.stream(side):  # what happens at first calls only must not be captured
        for _ in range(2):
            call()
    before.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
    finally:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own stream behind
    return graph.replay


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()
