"""Drop and grow: pure selections of slots and positions, by operations of static shape (no host synchronisation)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern.backends import cpu
from sparsekern.layout import Layout
from sparsekern.rewire.growth import best_candidates, pack, positions_of
from sparsekern.rewire.hash import uniform_hash
from sparsekern.rewire.scores import sortable


def weakest(scores: Tensor, layout: Layout, live: list[int], counts: list[int]) -> Tensor:
    """int64 [sum(counts)]: the `counts[g]` live slots of group g with the smallest scores; ties go to the lower slot.

    Args:
        scores: float32 [num_slots]; NaN ranks below every number.
        live: live blocks of each group.
    """
    if scores.device.type == "cpu" and not cpu.unavailable():
        return cpu.weakest(scores, layout, counts)
    group = layout.positions() // (layout.num_rows * layout.num_cols // layout.groups**2)  # that of dead slots is last
    slots = torch.sort(sortable(scores), stable=True).indices
    slots = slots[torch.sort(group[slots], stable=True).indices]
    starts = [sum(live[:g]) for g in range(layout.groups)]
    return torch.cat([slots[start : start + count] for start, count in zip(starts, counts, strict=True)])


def weakest_of_all(scores: Sequence[Tensor], layouts: Sequence[Layout], target: int) -> list[Tensor]:
    """Boolean [num_slots] of each layer: slots that are dead, or must be so that no more than `target` stays live.

    The weakest of all layers together are marked, one after the other, as long as `target` or more stays live. Ties go
    to the earlier layer and to the lower slot.

    Args:
        scores: float32 [num_slots] of each layer; NaN ranks below every number.
        target: in elements of the smallest block of all layers, as block sizes may differ.
    """
    devices = [own.device for own in scores]  # the layers may be on several
    live = [layout.live().to(devices[0]) for layout in layouts]
    scores = [own.to(devices[0]) for own in scores]
    sizes = torch.cat([alive * size for alive, size in zip(live, relative_sizes(layouts), strict=True)])
    ranked = torch.cat([torch.where(alive, own, torch.inf) for alive, own in zip(live, scores, strict=True)])
    order = torch.sort(sortable(ranked), stable=True).indices
    dropped = sizes[order].cumsum(0) <= sizes.sum() - target
    dead = torch.empty_like(dropped).scatter_(0, order, dropped | (sizes[order] == 0))
    parts = dead.split([layout.num_slots for layout in layouts])
    return [part.to(device) for part, device in zip(parts, devices, strict=True)]


def relative_sizes(layouts: Sequence[Layout]) -> list[int]:
    """Elements of a block of each layer, in those of the smallest block of all."""
    sizes = [layout.block_size**2 for layout in layouts]
    return [size // min(sizes) for size in sizes]


def random_candidates(layout: Layout, count: int, start: int) -> Tensor:
    """Keys [groups, count] of dead blocks, best first, each as likely as another; `start` picks the random stream."""
    if layout.index.device.type == "cpu" and not cpu.unavailable():
        return cpu.random_candidates(layout, count, start)
    size = layout.num_rows * layout.num_cols // layout.groups // layout.groups

    def score(strip: slice, places: Tensor) -> Tensor:
        groups = torch.arange(layout.groups, device=places.device)[:, None]
        return uniform_hash(start, groups * size + places)

    return best_candidates(layout, count, score)


def places(keys: Tensor, layout: Layout, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Global block rows and columns, int64 [sum(counts)], of each group's first keys; -1 where candidates ran out.

    Args:
        keys: int64 [groups, max(counts) or more], best first.
    """
    position = torch.cat([positions_of(keys[g, :count]) for g, count in enumerate(counts)])
    group = torch.cat([torch.full((count,), g, device=keys.device) for g, count in enumerate(counts)])
    rows, cols = layout.num_rows // layout.groups, layout.num_cols // layout.groups
    none = position < 0
    return (
        torch.where(none, -1, group * rows + position // cols),
        torch.where(none, -1, group * cols + position % cols),
    )


def all_candidates(layout: Layout, scores: Tensor) -> Tensor:
    """Keys [groups, rows * cols] of int64 scores of all places in order; -1 where a block lives or the score is < 0."""
    place = torch.arange(scores.shape[1], device=scores.device)
    keys = torch.where(scores < 0, -1, pack(scores, place))
    keys = torch.cat((keys.flatten(), keys.new_full((1,), -1)))  # dead slots write to the last
    return keys.index_fill_(0, layout.positions(), -1)[:-1].view_as(scores)


def places_in_rows(keys: Tensor, layout: Layout, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Block rows and columns, int64 like `slots`: the best candidates of each slot's own row; -1 where they ran out."""
    cols = layout.num_cols // layout.groups
    row = layout.positions()[slots] // cols
    order = torch.sort(row, stable=True).indices
    ordered = row[order]
    rank = torch.empty_like(row)
    rank[order] = torch.arange(len(row), device=row.device) - torch.searchsorted(ordered, ordered)
    best = keys.view(layout.num_rows, cols).sort(1, descending=True).values[row, rank.clamp(max=cols - 1)]
    position = positions_of(torch.where(rank < cols, best, -1))
    col = row // (layout.num_rows // layout.groups) * cols + position % cols
    return torch.where(position < 0, -1, row), torch.where(position < 0, -1, col)
