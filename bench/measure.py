"""How calls are timed: ours and a partner in turn, round after round, on data that has left the caches.

Whatever slows the machine for a while slows both, so a ratio is taken within every round, and the median of these
ratios is reported with its quartiles.
"""

import statistics
import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from bench import clock

# Buffers of one shape take more memory together than the last cache of most CPUs (32 MB where this was written).
ROTATED_BYTES = 2**26
ROUNDS = (5, 201)  # at least and at most


class Rotated:
    """Random [tokens, features], row-major, without end; each was last used the longest time ago."""

    def __init__(self, tokens: int, features: int, dtype: torch.dtype, device: str, total: int):
        count = min(max(2, -(-total // (dtype.itemsize * tokens * features))), 1024 if device == "cpu" else 64)
        self.tensors = torch.randn(count, tokens, features, dtype=dtype, device=device).unbind()
        self._last = -1

    def __next__(self) -> Tensor:
        self._last = (self._last + 1) % len(self.tensors)
        return self.tensors[self._last]

    def __len__(self) -> int:
        return len(self.tensors)


@lru_cache(maxsize=6)
def rotated(
    tokens: int, features: int, dtype: torch.dtype = torch.float32, device: str = "cpu", total: int = ROTATED_BYTES
) -> Rotated:
    return Rotated(tokens, features, dtype, device, total)


def timed(call: Callable[[], object]) -> float:
    """Seconds, until a device is done, too."""
    clock.synchronize()
    start = time.perf_counter()
    call()
    clock.synchronize()
    return time.perf_counter() - start


def rounds_in(seconds: float, once: float) -> int:
    return min(max(round(seconds / once), ROUNDS[0]), ROUNDS[1])


def microseconds(call: Callable, calls: int = 1, seconds: float = 0.03, by: str = "graph") -> float:
    """Median time of one call, without a partner: for limits, and for what a tuner chooses from."""
    own = clock.CLOCKS[by]
    call = own.prepared(call, calls)
    rounds = rounds_in(seconds, (timed(call) + timed(call)) / 2) if clock.ON_GPU else 2
    moments = []
    for _ in range(rounds):
        own.settle()
        start = own.now()
        call()
        moments.append((start, own.now()))
    return statistics.median(end - start for start, end in moments) / calls * 1e6


class Compare:
    """Times calls through pytest-benchmark's `benchmark` fixture, whose timer is `own.now`, for about `seconds`.

    A rehearsal takes as few rounds of single calls as there can be.
    """

    def __init__(self, benchmark, own, seconds: float, rehearsal: bool = False):
        self.benchmark, self.clock, self.seconds, self.rehearsal = benchmark, own, seconds, rehearsal

    def __call__(
        self, ours: Callable, partner: Callable, calls: int = 1, before: Callable = lambda: None
    ) -> dict[str, float]:
        """Time of ours and of its partner in microseconds, and partner / ours: medians, and quartiles of the ratio.

        The partner goes first in every round, and in the two rounds of warm-up. With --benchmark-disable each is
        called once and nothing is timed, which compiles whatever is compiled at a first call.

        Args:
            calls: in one timing, for those that take microseconds.
            before: done before every call, untimed, where a call cannot be repeated on what it left.
        """
        if self.benchmark.disabled:
            partner(), before(), self.benchmark.pedantic(ours)
            return {}
        calls = 1 if self.rehearsal else calls
        ours, theirs = (self.clock.prepared(f, calls) for f in (ours, partner))
        partner_moments = []

        def first():
            self.clock.settle()
            start = self.clock.now()
            theirs()
            partner_moments.append((start, self.clock.now()))
            before()

        once = timed(lambda: (first(), ours(), first(), ours())) / 2
        rounds = 2 if self.rehearsal else rounds_in(self.seconds, once)
        partner_moments.clear()
        self.benchmark.pedantic(ours, setup=first, rounds=rounds)
        times = self.benchmark.stats.stats.data
        partner_times = [end - start for start, end in partner_moments]
        low, ratio, high = statistics.quantiles([b / a for a, b in zip(times, partner_times, strict=True)], n=4)
        quartiles = statistics.quantiles(times, n=4)
        micro = 1e6 / calls
        return {
            "time_us": statistics.median(times) * micro,
            "time_q1": quartiles[0] * micro,
            "time_q3": quartiles[2] * micro,
            "partner_us": statistics.median(partner_times) * micro,
            "ratio": ratio,
            "ratio_q1": low,
            "ratio_q3": high,
            "rounds": rounds,
        }
