"""Schedules: how large the drop fraction is, or how dense the network, between the start and the end step of a rule."""

import math
from dataclasses import dataclass

from sparsekern.rewire.arguments import check_finite


@dataclass(frozen=True)
class Constant:
    """The same drop fraction at every event."""

    fraction: float
    """Share of the live blocks dropped at an event, in [0, 1]."""
    needs_end = False

    def __post_init__(self):
        check_fraction(self.fraction)

    def __call__(self, progress: float) -> float:
        return self.fraction


@dataclass(frozen=True)
class Cosine:
    """From `fraction` at the start to 0 at the end step, as RigL does (Evci et al., arXiv 1911.11134)."""

    fraction: float
    """Share of the live blocks dropped at the start, in [0, 1]."""
    needs_end = True

    def __post_init__(self):
        check_fraction(self.fraction)

    def __call__(self, progress: float) -> float:
        check_finite("cosine", "progress", progress)
        return self.fraction / 2 * (1 + math.cos(math.pi * progress))


cosine = Cosine


def cubic_density(progress: float, initial: float, final: float) -> float:
    """Density of gradual pruning (Zhu and Gupta, arXiv 1710.01878): final + (initial - final) * (1 - progress)**3."""
    return final + (initial - final) * (1 - progress) ** 3


def check_fraction(fraction: float) -> None:
    check_finite("rewire", "drop_fraction", fraction)
    if not 0 <= fraction <= 1:
        raise ValueError(f"drop_fraction must be in [0, 1], got {fraction}")
