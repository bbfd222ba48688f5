"""How many blocks of each layer live, for one density over all of them: the uniform and the ERK distribution."""

import math
from collections.abc import Callable, Sequence

from sparsekern.geometry import live_count

Dims = tuple[float, ...]  # sizes of one layer counted in blocks; their product is its number of blocks


def uniform(layers: Sequence[Dims], density: float) -> list[int]:
    """Share live blocks out so that every layer has the same density.

    Args:
        layers: per layer its sizes in blocks, (block rows, block columns); each group is a layer of its own.
        density: live blocks / all blocks over all layers, in (0, 1].
    Returns:
        Live blocks per layer, from 1 to all of them. They sum to round(density * blocks of all layers), rounded by
        largest remainder (ties to the earlier layer); to the number of layers if that is more.
    Raises:
        ValueError: density is not in (0, 1].
    Example:
        >>> uniform([(10, 10), (3, 5)], 0.2)
        [20, 3]
    """
    return _share(layers, density, math.prod)


def erk(layers: Sequence[Dims], density: float) -> list[int]:
    """Share live blocks out by Erdos-Renyi-Kernel: a layer's density is proportional to sum(dims) / prod(dims).

    Layers that would get more than all their blocks become full, and the others share what is left, repeatedly.

    Args:
        layers: as in `uniform`; for a convolution (block rows, block columns / (kh * kw), kh, kw).
        density: as in `uniform`.
    Returns, Raises: as `uniform`.
    Example:
        >>> erk([(10, 10), (3, 5)], 0.2)  # in the ratio 20 : 8
        [16, 7]
    """
    return _share(layers, density, sum)


DISTRIBUTIONS: dict[str, Callable[[Sequence[Dims], float], list[int]]] = {"uniform": uniform, "erk": erk}


def _share(layers: Sequence[Dims], density: float, weigh: Callable[[Dims], float]) -> list[int]:
    """Split round(density * blocks) in proportion to `weigh`, every share between 1 and the layer's blocks."""
    blocks = [round(math.prod(dims)) for dims in layers]
    if not blocks:
        return []
    total = max(len(blocks), live_count(density, sum(blocks)))
    weights = [weigh(dims) for dims in layers]
    shares: list[float] = [0.0] * len(blocks)
    free = list(range(len(blocks)))
    while free:
        eps = (total - sum(shares)) / sum(weights[i] for i in free)
        bounded = {i: min(max(eps * weights[i], 1.0), float(blocks[i])) for i in free}
        # Settle the layers that overshoot, or those that fall short, whichever weigh more; the rest is solved again.
        surplus = sum(bounded.values()) - (total - sum(shares))
        settled = [i for i in free if (bounded[i] - eps * weights[i]) * surplus > 0] or free
        for i in settled:
            shares[i] = bounded[i]
        free = [i for i in free if i not in settled]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
