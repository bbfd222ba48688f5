"""Captured: a step on a GPU as one CUDA graph, which costs the host one launch."""

from collections.abc import Callable

import torch
from torch import Tensor

WARMUP = 3  # calls before a capture, so that optimiser state and compiled kernels exist


class Captured:
    """Calls a function of tensors, of the same shapes every time, from a CUDA graph.

    The first calls run it as it is; then it is captured. It must not synchronise. After memory that it uses has moved
    (sk.GMP's compaction), call `reset`. What is returned is overwritten by the next call.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self._function = function
        self.reset()

    def reset(self) -> None:
        """Forget the graph."""
        self._calls, self._graph = 0, None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self._calls < WARMUP:
            self._calls += 1
            return self._on_side_stream(inputs)
        if self._graph is None:
            self._inputs = [tensor.clone() for tensor in inputs]
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = self._function(*self._inputs)
        for own, new in zip(self._inputs, inputs, strict=True):
            own.copy_(new)
        self._graph.replay()
        return self._output

    def _on_side_stream(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """What is captured later must have run on another stream than the default one."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = self._function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return output
