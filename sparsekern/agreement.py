"""Whether an index agrees with its coordinates, which anybody may write, and how it comes to.

Derived state is never stale. The index carries as `built_from` the coordinates it was built from and their versions.
A rewire writes coordinates, rebuilds the index and stamps it. Whoever else writes coordinates in place (a checkpoint
library, an average of models) leaves an older stamp behind, which the next product sees. The index of a full store
carries as `shown` what somebody asked for and may write.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from sparsekern.geometry import check_blocks
from sparsekern.layout import Layout, build_index, num_words, versions_of


def stamp(layout: Layout) -> None:
    """Note that the index, as it is now, agrees with the coordinates as they are now."""
    layout.index.built_from = layout.block_rows, layout.block_cols, layout.versions()
    layout.index.built_for = layout.geometry


def is_current(layout: Layout) -> bool:
    """Whether the index was built from these coordinates as they are now; reads no tensor."""
    rows, cols, versions = getattr(layout.index, "built_from", (None, None, None))
    if layout.full and (shown := shown_by(layout)) is not None and shown.are_written():
        return False
    return rows is layout.block_rows and cols is layout.block_cols and versions == layout.versions()


def catch_up(layout: Layout) -> bool:
    """Build the index anew, in place, from coordinates that somebody wrote; returns whether it has changed.

    Raises:
        ValueError: the coordinates are no topology, or the layout's tensors do not fit together.
        RuntimeError: a CUDA graph is being captured, which cannot wait for the coordinates to be checked; or they are
            those of a full store, which only its `Topology` follows.
    """
    refuse_capture(layout.index)
    if layout.full and (shown := shown_by(layout)) is not None and shown.are_written():
        raise RuntimeError(
            "Topology: coordinates of a full store were written in place, which compiled code cannot follow; run the "
            "model once without torch.compile, or load a state_dict"
        )
    check_blocks(layout.block_rows, layout.block_cols, (layout.num_rows, layout.num_cols), layout.groups)
    for name, tensor in zip(layout._fields, layout.tensors, strict=False):
        if not tensor.is_contiguous():  # kernels would read on without the gaps
            raise ValueError(f"Topology: {name} must be contiguous, got strides {tensor.stride()}")
    if layout.full and len(layout.block_rows):
        raise ValueError(f"Topology: a full store has no coordinates, got those of {len(layout.block_rows)} slots")
    index = build_index(layout)
    sizes = (0, num_words(layout.num_slots)) if layout.full else (len(index),)
    if layout.index.dim() != 1 or len(layout.index) not in sizes or layout.index.dtype != torch.int32:
        raise ValueError(
            f"Topology: {layout.num_slots} slots of {layout.num_rows} x {layout.num_cols} blocks want an index of "
            f"{' or '.join(map(str, sizes))} int32, got {tuple(layout.index.shape)} of {layout.index.dtype}"
        )
    changed = not torch.equal(index, layout.index)
    if changed:
        layout.index.copy_(index)
    stamp(layout)
    return changed


def refuse_capture(index: Tensor) -> None:
    """Refuse to read coordinates that somebody wrote while a CUDA graph is being captured."""
    if index.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Topology: block_rows or block_cols were written in place since the index was built, and a CUDA graph that "
            "is being captured cannot check them; run the model once before the capture"
        )


class Shown(NamedTuple):
    """Coordinates that a full store has made because somebody asked for them, who may write them."""

    rows: Tensor
    cols: Tensor
    versions: tuple[int, ...]  # when they agreed with the store; () = never

    @classmethod
    def agreeing(cls, rows: Tensor, cols: Tensor) -> Self:
        return cls(rows, cols, versions_of(rows, cols))

    def are_written(self) -> bool:
        return self.versions != versions_of(self.rows, self.cols)

    def are_held(self) -> bool:
        """Whether anybody else has their memory."""
        memories = [tensor.untyped_storage() for tensor in self[:2]]
        return max(torch._C._storage_Use_Count(memory._cdata) for memory in memories) > 2  # the tensor's, and `memory`


def shown_by(layout: Layout) -> Shown | None:
    return getattr(layout.index, "shown", None)


def tell_shown(layout: Layout) -> None:
    """Bring the coordinates that a full store has shown, if it has, up to date with its dead slots."""
    if (shown := shown_by(layout)) is not None and (dead := layout.dead()) is not None:
        layout.index.shown = Shown.agreeing(*(own.masked_fill_(dead, -1) for own in shown[:2]))
