"""Topology: which blocks of a matrix are live, in which slot each is stored, and the index that products walk."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Layout(NamedTuple):
    """What a product needs to know of a topology: tensors whose contents change in place, and numbers that do not."""

    block_rows: Tensor  # int16 or int32 [num_slots]: global block row of each slot, -1 = dead
    block_cols: Tensor  # likewise the global block column
    index: Tensor  # int32, flat; see `Layout.row_pairs` and its neighbours
    num_rows: int  # block rows, all groups together
    num_cols: int
    groups: int
    block_size: int
    full: bool  # slots hold every block in row-major order: the dense matrix itself, without an index

    @property
    def num_slots(self) -> int:
        return self.block_rows.shape[0]

    def positions(self) -> Tensor:
        """int64 [num_slots]: place of each block among all, (group, row, col) row-major; their number if dead."""
        group_cols = self.num_cols // self.groups
        rows, cols = self.block_rows.long(), self.block_cols.long()
        return torch.where(rows < 0, self.num_rows * group_cols, rows * group_cols + cols % group_cols)

    # The index of block sizes above 1 is (row_pairs, col_pairs, row_offsets, col_offsets, row_order, col_order),
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
        return torch.empty(0, dtype=torch.int32, device=layout.block_rows.device)
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


_SAVED = ("block_rows", "block_cols", "_extra_state")


class Topology(nn.Module):
    """The live blocks of a block-sparse matrix and the slots they are stored in.

    `block_rows` and `block_cols` *are* the topology: slot s of the weight holds block (block_rows[s], block_cols[s]),
    in global block coordinates; -1 marks a dead slot. They move and are saved as buffers are, but are not registered as
    such: DistributedDataParallel would broadcast them at every forward, and no backend of it knows int16. `index` is
    derived from them and not saved. With groups, the matrix is block-diagonal: group g owns block rows g*R/G ... and
    block columns g*C/G ... .

    Args:
        block_rows, block_cols: int [num_slots], no duplicates; -1 in both = dead slot.
        shape: (out_features, in_features), all groups together, in elements and unpadded.
        block_size: power of two from 1 to 128.
        groups: independent matrices of equal shape.
    """

    _held_layout: Layout | None = None

    def __init__(
        self, block_rows: Tensor, block_cols: Tensor, shape: tuple[int, int], block_size: int, groups: int = 1
    ):
        super().__init__()
        check_geometry(shape, block_size, groups)
        self.shape = tuple(shape)
        self.block_size = block_size
        self.groups = groups
        self.grid = tuple(groups * -(-size // groups // block_size) for size in shape)
        self.padded = self.shape != tuple(blocks * block_size for blocks in self.grid)
        check_blocks(block_rows, block_cols, self.grid, groups)
        dtype = torch.int16 if max(self.grid) < 2**15 else torch.int32
        self.block_rows = block_rows.to(dtype, copy=True)
        self.block_cols = block_cols.to(dtype, copy=True)
        self.index = torch.empty(0, dtype=torch.int32, device=block_rows.device)
        # How often a checkpoint brought in another topology; a rule compares it to notice stale optimiser state.
        self.adoptions = 0
        self._reindex()

    @classmethod
    def random(cls, shape, live: int | list[int] | float, block_size: int, groups: int = 1) -> "Topology":
        """Draw a uniform topology from torch's generator; a block in every row and column while there are enough.

        `live` is a density in (0, 1] or the number of live blocks, of each group or one for all.
        """
        check_geometry(shape, block_size, groups)
        rows, cols = (-(-size // groups // block_size) for size in shape)
        if isinstance(live, float):
            live = live_count(live, rows * cols)
        live = [live] * groups if isinstance(live, int) else live
        if not all(0 < count <= rows * cols for count in live):
            raise ValueError(f"live must be from 1 to {rows * cols} blocks in each group, got {live}")
        chosen = [_random_positions(rows, cols, count) for count in live]
        block_rows = torch.cat([p // cols + g * rows for g, p in enumerate(chosen)])
        block_cols = torch.cat([p % cols + g * cols for g, p in enumerate(chosen)])
        return cls(block_rows, block_cols, shape, block_size, groups)

    @classmethod
    def from_mask(cls, mask: Tensor, shape, block_size: int) -> "Topology":
        """Take the live blocks from a boolean [groups, rows, cols] grid; slots in row-major order."""
        groups, rows, cols = mask.shape
        g, r, c = mask.nonzero().unbind(1)
        return cls(g * rows + r, g * cols + c, shape, block_size, groups)

    @property
    def layout(self) -> Layout:
        held, rows, cols, index = self._held_layout, self.block_rows, self.block_cols, self.index
        # the same tuple as long as it says the same: to make one takes longer than to look
        if held is None or not (held[0] is rows and held[1] is cols and held[2] is index and held[7] is self.full):
            self._held_layout = held = Layout(rows, cols, index, *self.grid, self.groups, self.block_size, self.full)
        return held

    @property
    def num_slots(self) -> int:
        return self.block_rows.shape[0]

    @property
    def num_blocks(self) -> int:
        """Number of places a block can have, live or dead."""
        return self.grid[0] * self.grid[1] // self.groups

    @property
    def num_live(self) -> int:
        return int((self.block_rows >= 0).sum())

    @property
    def density(self) -> float:
        return self.num_live / self.num_blocks

    @property
    def nbytes(self) -> int:
        """Bytes of coordinates and index: what the topology costs besides the weight."""
        return sum(t.numel() * t.element_size() for t in (self.block_rows, self.block_cols, self.index))

    def live_per_group(self) -> list[int]:
        group = self.block_rows.long() // (self.grid[0] // self.groups)
        return torch.bincount(group[self.block_rows >= 0], minlength=self.groups).tolist()

    def mask(self) -> Tensor:
        """Boolean grid [groups, rows, cols] per group, True where a block is live."""
        mask = torch.zeros(self.num_blocks + 1, dtype=torch.bool, device=self.block_rows.device)
        mask[self.layout.positions()] = True
        return mask[:-1].view(self.groups, self.grid[0] // self.groups, self.grid[1] // self.groups)

    def rebuild(self) -> None:
        """Bring the index up to date with the coordinates, in place and without a host synchronisation."""
        self.index.copy_(build_index(self.layout))

    @torch.no_grad()
    def replace(self, block_rows: Tensor, block_cols: Tensor) -> None:
        """Take over coordinates of any number of slots, in the same tensors: what compaction and loading need."""
        for own, value in ((self.block_rows, block_rows), (self.block_cols, block_cols)):
            own.set_(value.to(own, copy=True))
        self._reindex()

    @torch.no_grad()
    def leave_full_store(self) -> None:
        """Build the index of a full store, so that products walk its live blocks from now on."""
        self.full = False
        self.index.set_(build_index(self.layout))

    def _reindex(self) -> None:
        """Size the index for the slots there are now; a store with a slot for every block, in order, needs none."""
        self.full = False
        if self.num_slots == self.num_blocks:
            positions = self.layout.positions()
            places = torch.arange(self.num_slots, device=positions.device)
            self.full = bool(((positions == places) | (self.block_rows < 0)).all())
        self.index.set_(build_index(self.layout))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.block_rows, self.block_cols, self.index = fn(self.block_rows), fn(self.block_cols), fn(self.index)
        return self

    def get_extra_state(self) -> Tensor:
        """int64 (out_features, in_features, block_size, groups, full): with the coordinates, all there is to know."""
        return torch.tensor([*self.shape, self.block_size, self.groups, self.full])

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "block_rows"], destination[prefix + "block_cols"] = self.block_rows, self.block_cols
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def check_checkpoint(self, state_dict: dict, prefix: str) -> bool:
        """Whether there is a topology at `prefix`; raise a ValueError if it is not one of this geometry."""
        if any(prefix + name not in state_dict for name in _SAVED):
            return False
        rows, cols, extra = (state_dict[prefix + name] for name in _SAVED)
        saved, own = tuple(extra.tolist()[:4]), (*self.shape, self.block_size, self.groups)
        if saved != own:
            words = "(out_features, in_features, block_size, groups)"
            raise ValueError(f"load_state_dict: the checkpoint's topology has {words} {saved}, the layer {own}")
        check_blocks(rows, cols, self.grid, self.groups)
        return True

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        if not self.check_checkpoint(state_dict, prefix):
            missing_keys.extend(prefix + name for name in _SAVED if prefix + name not in state_dict)
            return
        rows, cols = state_dict[prefix + "block_rows"], state_dict[prefix + "block_cols"]
        rows, cols = rows.to(self.block_rows), cols.to(self.block_cols)
        if not (torch.equal(rows, self.block_rows) and torch.equal(cols, self.block_cols)):
            self.adoptions += 1
            self.replace(rows, cols)
        if self.full and not state_dict[prefix + "_extra_state"][4]:
            self.leave_full_store()

    def extra_repr(self) -> str:
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return f"{self.grid[0]} x {self.grid[1]} blocks of {self.block_size}, density={self.density:.3g}{groups}"


def live_count(density: float, num_blocks: int) -> int:
    """Number of live blocks that a density in (0, 1] asks for: max(1, round(density * num_blocks))."""
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    return max(1, round(density * num_blocks))


def check_geometry(shape: tuple[int, int], block_size: int, groups: int) -> None:
    if block_size not in (1, 2, 4, 8, 16, 32, 64, 128):
        raise ValueError(f"block_size must be a power of two from 1 to 128, got {block_size}")
    for name, size in zip(("out_features", "in_features"), shape, strict=True):
        if size <= 0 or groups <= 0 or size % groups:
            raise ValueError(f"{name} must be a positive multiple of groups, got {name}={size}, groups={groups}")


def check_blocks(block_rows: Tensor, block_cols: Tensor, grid: tuple[int, int], groups: int) -> None:
    """Refuse coordinates that are no topology; native kernels would follow them outside of their memory."""
    if block_rows.dim() != 1 or block_rows.shape != block_cols.shape:
        shapes = f"{tuple(block_rows.shape)} and {tuple(block_cols.shape)}"
        raise ValueError(f"Topology: block_rows and block_cols must be of one length, got shapes {shapes}")
    if block_rows.device.type == "meta":
        return
    rows, cols = block_rows.long(), block_cols.long()
    outside = (rows < 0) | (rows >= grid[0]) | (cols < 0) | (cols >= grid[1])
    outside |= rows // (grid[0] // groups) != cols // (grid[1] // groups)
    outside &= (rows != -1) | (cols != -1)
    if outside.any():
        slot = int(outside.int().argmax())
        block = (int(rows[slot]), int(cols[slot]))
        raise ValueError(
            f"Topology: slot {slot} has block {block}, outside the {grid[0]} x {grid[1]} blocks in {groups} groups"
        )
    places = torch.sort(rows[rows >= 0] * grid[1] + cols[rows >= 0]).values
    twice = places[1:][places.diff() == 0]
    if len(twice):
        raise ValueError(f"Topology: block {divmod(int(twice[0]), grid[1])} is live in two slots")


def _random_positions(rows: int, cols: int, count: int) -> Tensor:
    """`count` distinct places of a grid, sorted: some to cover rows and columns, the rest uniform."""
    with torch.device("cpu"):  # whatever the default device: the same draws everywhere, and some on "meta" too
        longest = max(rows, cols)
        diagonal = torch.arange(min(count, longest))
        cover = torch.randperm(rows)[diagonal % rows] * cols + torch.randperm(cols)[diagonal % cols]
        rest = torch.randperm(rows * cols)
        rest = rest[~torch.isin(rest, cover)][: count - len(cover)]
        return torch.cat((cover, rest)).sort().values
