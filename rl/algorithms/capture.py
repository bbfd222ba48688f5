"""Captured: a step on a GPU as one CUDA graph, which costs the host one launch."""

from collections.abc import Callable

import torch

WARMUP = 3  # calls before a capture, so that optimiser state and compiled kernels exist


class Captured:
    """Calls a function from a CUDA graph: it reads and writes the same memory every time, and must not synchronise.

    The first calls run it as it is; then it is captured. After memory that it uses has moved (sk.GMP's compaction),
    call `reset`.
    """

    def __init__(self, function: Callable[[], None]):
        self._function = function
        self.reset()

    def reset(self) -> None:
        """Forget the graph."""
        self._calls, self._graph = 0, None

    def __call__(self) -> None:
        if self._calls < WARMUP:
            self._calls += 1
            self._on_side_stream()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._function()
        self._graph.replay()

    def _on_side_stream(self) -> None:
        """What is captured later must have run on another stream than the default one."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._function()
        torch.cuda.current_stream().wait_stream(stream)
