"""Layout: coordinates and numbers of a topology as products take them, and the index that they walk."""

from collections.abc import Iterable
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    from sparsekern import _C  # type: ignore[attr-defined]
except ImportError:  # backends/cpu.py says why, to whoever asks for it
    _C = None


class Layout(NamedTuple):
    """What a product needs to know of a topology: tensors whose contents change in place, and numbers that do not."""

    block_rows: Tensor  # int16 or int32 [num_slots]: global block row of each slot, -1 = dead; [0] where full
    block_cols: Tensor  # likewise the global block column
    index: Tensor  # type: ignore[assignment]  # int32, flat; see `Layout.row_pairs` and its neighbours
    num_rows: int  # block rows, all groups together
    num_cols: int
    groups: int
    block_size: int
    full: bool  # slots hold every block in row-major order: the dense matrix itself, without coordinates

    @classmethod
    def from_flat(cls, values: Iterable) -> Self:
        """The layout whose `tensors` and `geometry` these are, one after the other, as operators take them."""
        return cls(*values)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self[:3]

    @property
    def geometry(self) -> tuple[int, int, int, int, bool]:
        return self[3:]

    @property
    def num_slots(self) -> int:
        return self.num_rows * self.num_cols // self.groups if self.full else self.block_rows.shape[0]

    def versions(self) -> tuple[int, int, int]:
        """How often torch has seen coordinates and index being written; numbers of the host, free to read."""
        return versions_of(*self.tensors)

    def positions(self) -> Tensor:
        """int64 [num_slots]: place of each block among all, (group, row, col) row-major; their number if dead."""
        group_cols = self.num_cols // self.groups
        if self.full:
            places, dead = torch.arange(self.num_slots, device=self.index.device), self.dead()
            return places if dead is None else places.masked_fill_(dead, self.num_slots)
        rows, cols = self.block_rows.long(), self.block_cols.long()
        return torch.where(rows < 0, self.num_rows * group_cols, rows * group_cols + cols % group_cols)

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """Block row and column of each slot, -1 = dead: the tensors that are held; of a full store, new ones."""
        if not self.full:
            return self.block_rows, self.block_cols
        grid = self.groups, self.num_rows // self.groups, self.num_cols // self.groups
        like = {"dtype": self.block_rows.dtype, "device": self.index.device}
        rows, cols = (torch.empty(self.num_slots, **like) for _ in range(2))
        rows.view(grid).copy_(torch.arange(self.num_rows, **like).view(*grid[:2], 1))
        cols.view(grid).copy_(torch.arange(self.num_cols, **like).view(grid[0], 1, grid[2]))
        if (dead := self.dead()) is not None:
            rows, cols = rows.masked_fill_(dead, -1), cols.masked_fill_(dead, -1)
        return rows, cols

    def dead(self) -> Tensor | None:
        """Boolean [num_slots], True where a slot is dead; None for a full store without dead slots."""
        if not self.full:
            return self.block_rows < 0
        return unpacked(self.index, self.num_slots) if self.index.numel() else None

    def live(self) -> Tensor:
        """Boolean [num_slots], True where a slot is live."""
        dead = self.dead()
        return torch.ones(self.num_slots, dtype=torch.bool, device=self.index.device) if dead is None else ~dead

    def clear_dead(self, blocks: Tensor) -> Tensor:
        """Blocks [num_slots, B, B] with zeros in the dead slots, in place."""
        dead = self.dead()
        return blocks if dead is None else blocks.masked_fill_(dead[:, None, None], 0)

    def indexed(self) -> Self:
        """The same slots with coordinates and index, which a full store lacks and a forced kernel may want."""
        if not self.full:
            return self
        rows, cols = self.coordinates()
        walked = self._replace(block_rows=rows, block_cols=cols, full=False)
        return walked._replace(index=build_index(walked))

    # The index of a full store says which slots are dead: bit s % 32 of number s // 32 is slot s. While all are live,
    # it is empty. Of other stores, the index of block sizes above 1 is
    # (row_pairs, col_pairs, row_offsets, col_offsets, row_order, col_order),
    # pairs first so that each is 8-byte aligned. For block size 1 it is (row_slots, col_slots): with int16
    # coordinates that makes 12 bytes a weight, and a kernel finds the offsets while it packs the values.

    @property
    def row_pairs(self) -> Tensor:
        """int32 [num_slots, 2] = (block column, slot), sorted by (row, column); dead slots last as (-1, slot)."""
        return self.index[: 2 * self.num_slots].view(-1, 2)

    @property
    def col_pairs(self) -> Tensor:
        """int32 [num_slots, 2] = (block row, slot), sorted by (column, row); dead slots last as (-1, slot)."""
        return self.index[2 * self.num_slots : 4 * self.num_slots].view(-1, 2)

    @property
    def row_offsets(self) -> Tensor:
        """int32 [num_rows + 1]: pairs of block row r are row_pairs[row_offsets[r]:row_offsets[r + 1]]."""
        return self.index.narrow(0, 4 * self.num_slots, self.num_rows + 1)

    @property
    def col_offsets(self) -> Tensor:
        """int32 [num_cols + 1], likewise for col_pairs."""
        return self.index.narrow(0, 4 * self.num_slots + self.num_rows + 1, self.num_cols + 1)

    @property
    def row_order(self) -> Tensor:
        """int32 [num_rows]: block rows, those with most live blocks first."""
        return self.index.narrow(0, 4 * self.num_slots + self.num_rows + self.num_cols + 2, self.num_rows)

    @property
    def col_order(self) -> Tensor:
        """int32 [num_cols], likewise for block columns."""
        return self.index[4 * self.num_slots + 2 * self.num_rows + self.num_cols + 2 :]

    @property
    def row_slots(self) -> Tensor:
        """int32 [num_slots]: slots sorted by (row, column), dead ones last. Block size 1 only."""
        return self.index[: self.num_slots]

    @property
    def col_slots(self) -> Tensor:
        """int32 [num_slots]: slots sorted by (column, row), dead ones last. Block size 1 only."""
        return self.index[self.num_slots :]


def build_index(layout: Layout) -> Tensor:
    """Compute the int32 index of a layout by operations of static shape, without a host synchronisation."""
    if layout.full:
        return layout.index
    on_cpu = layout.block_rows.device.type == "cpu" and type(layout.block_rows) is Tensor  # and no fake one
    if _C is not None and on_cpu:
        return _build_index_in_cpp(layout)
    rows, cols = layout.block_rows.long(), layout.block_cols.long()
    dead = rows < 0
    last = layout.num_rows * layout.num_cols

    def view(major: Tensor, minor: Tensor, num_major: int, num_minor: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        keys, slots = torch.sort(torch.where(dead, last, major * num_minor + minor), stable=True)
        if layout.block_size == 1:
            return slots, *(3 * (slots[:0],))
        offsets = torch.searchsorted(keys, torch.arange(num_major + 1, device=keys.device) * num_minor)
        order = torch.sort(offsets.diff(), descending=True, stable=True).indices
        return torch.stack((minor[slots], slots), dim=1).flatten(), offsets, order, slots

    row_pairs, row_offsets, row_order, _ = view(rows, cols, layout.num_rows, layout.num_cols)
    col_pairs, col_offsets, col_order, _ = view(cols, rows, layout.num_cols, layout.num_rows)
    return torch.cat((row_pairs, col_pairs, row_offsets, col_offsets, row_order, col_order)).int()


def _build_index_in_cpp(layout: Layout) -> Tensor:
    slots, rows, cols, block_size = layout.num_slots, layout.num_rows, layout.num_cols, layout.block_size
    size = 2 * slots if block_size == 1 else 4 * slots + 2 * (rows + cols + 1)
    index = torch.empty(size, dtype=torch.int32, device="cpu")  # whatever the default device
    rows, cols = layout.block_rows.contiguous(), layout.block_cols.contiguous()
    _C.build_index(layout=layout._replace(block_rows=rows, block_cols=cols, index=index))
    return index


def in_order(layout: Layout) -> bool:
    """Whether there is a slot for every block and live ones are in row-major order; reads the coordinates."""
    group_cols = layout.num_cols // layout.groups
    if layout.num_slots != layout.num_rows * group_cols:
        return False
    places = torch.arange(layout.num_slots, device=layout.block_rows.device)
    return bool(((layout.positions() == places) | (layout.block_rows < 0)).all())


def packed(dead: Tensor) -> Tensor:
    """The bits of a boolean tensor, int32."""
    eight = F.pad(dead, (0, -len(dead) % 32)).view(torch.int64)
    # the product has bit 8 i of a number, which is its byte i, at bit 56 + i
    return (eight * 0x0102040810204080 >> 56).to(torch.uint8).view(torch.int32)


def unpacked(bits: Tensor, count: int) -> Tensor:
    """The first `count` bits as a boolean tensor."""
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.view(torch.uint8)[:, None] & weights).flatten()[:count].bool()


def num_words(count: int) -> int:
    return -(-count // 32)


def versions_of(*tensors: Tensor) -> tuple[int, ...]:
    try:
        return tuple([tensor._version for tensor in tensors])
    except RuntimeError:  # tensors made in inference mode count nothing
        return len(tensors) * (-1,)
