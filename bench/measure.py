"""How calls are timed: ours and the dense partner in turn, round after round, on data that has left the caches.

Whatever slows the machine for a while slows both, so a ratio is taken within every round, and the median of these
ratios is reported with its quartiles.
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
def rotated(tokens: int, features: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """Random [tokens, features], row-major, without end; each was last used the longest time ago."""
    count = max(2, ROTATED_BYTES // (dtype.itemsize * tokens * features))
    return itertools.cycle(torch.randn(min(count, 1024), tokens, features, dtype=dtype).unbind())


def timed(call: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Timer:
    """Times calls through pytest-benchmark's `benchmark` fixture, for about `seconds` in all."""

    def __init__(self, benchmark, seconds: float):
        self.benchmark, self.seconds = benchmark, seconds

    def __call__(
        self, call: Callable, partner: Callable, repeat: int = 1, before: Callable = lambda: None
    ) -> dict[str, float]:
        """Time of `call` and of its partner in microseconds, and partner / call: medians, and quartiles of the ratio.

        The partner goes first in every round, and in the two rounds of warm-up.

        Args:
            repeat: calls in one timing, for those that take microseconds.
            before: done before every call, untimed, where a call cannot be repeated on what it left.
        """
        ours, theirs = ((lambda f=f: [f() for _ in range(repeat)]) if repeat > 1 else f for f in (call, partner))
        partner_times = []

        def first():
            partner_times.append(timed(theirs))
            before()

        once = timed(lambda: (first(), ours(), first(), ours())) / 2
        rounds = min(max(round(self.seconds / once), 5), 201)
        partner_times.clear()
        self.benchmark.pedantic(ours, setup=first, rounds=rounds)
        times = self.benchmark.stats.stats.data
        ratios = [theirs / ours for theirs, ours in zip(partner_times, times, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        micro = 1e6 / repeat
        return {
            "time_us": statistics.median(times) * micro,
            "partner_us": statistics.median(partner_times) * micro,
            "ratio": ratio,
            "ratio_q1": low,
            "ratio_q3": high,
            "rounds": rounds,
        }
