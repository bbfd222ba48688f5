"""How calls are timed: ours and the dense partner in turn, round after round, on data that has left the caches.

Whatever slows the machine for a while slows both, so a ratio is taken within every round, and the median of these ratios is
reported with its quartiles.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

# Buffers of one shape take more memory together than the last cache of most CPUs (32 MB where this was written).
ROTATED_BYTES = 2**26


@lru_cache(maxsize=6)
def rotated(tokens: int, features: int) -> Iterator[Tensor]:
    """Random [tokens, features], float32 and row-major, without end; each was last used the longest time ago."""
    count = max(2, ROTATED_BYTES // (4 * tokens * features))
    return itertools.cycle(torch.randn(min(count, 1024), tokens, features).unbind())


def timed(call: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Timer:
    """Times calls through pytest-benchmark's `benchmark` fixture, for about `seconds` in all."""

    def __init__(self, benchmark, seconds: float):
        self.benchmark, self.seconds = benchmark, seconds

    def __call__(self, call: Callable, partner: Callable, repeat: int = 1) -> dict[str, float]:
        """Time of `call` and of its dense `partner` in microseconds, and dense / ours: medians, and quartiles of the ratio.

        Args:
            repeat: calls in one timing, for those that take microseconds.
        """
        both = [lambda f=f: [f() for _ in range(repeat)] for f in (call, partner)] if repeat > 1 else [call, partner]
        once = sum(timed(f) for f in both + both) / 2
        rounds = min(max(round(self.seconds / once), 5), 201)
        dense = []

        def dense_first():
            dense.append(timed(both[1]))

        self.benchmark.pedantic(both[0], setup=dense_first, rounds=rounds)
        ours, dense = self.benchmark.stats.stats.data, dense[-rounds:]
        ratios = [d / o for d, o in zip(dense, ours, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        micro = 1e6 / repeat
        return {
            "time_us": statistics.median(ours) * micro,
            "dense_us": statistics.median(dense) * micro,
            "ratio": ratio,
            "ratio_q1": low,
            "ratio_q3": high,
            "rounds": rounds,
        }
