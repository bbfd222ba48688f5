"""Topology: which blocks of a matrix are live, in which slot each is stored, and the index that products walk."""

import numbers
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    from sparsekern import _C  # type: ignore[attr-defined]
except ImportError:  # backends/cpu.py says why, to whoever asks for it
    _C = None

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


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
        return _versions(*self.tensors)

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
        return _unpacked(self.index, self.num_slots) if self.index.numel() else None

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


def _packed(dead: Tensor) -> Tensor:
    """The bits of a boolean tensor, int32."""
    eight = F.pad(dead, (0, -len(dead) % 32)).view(torch.int64)
    # the product has bit 8 i of a number, which is its byte i, at bit 56 + i
    return (eight * 0x0102040810204080 >> 56).to(torch.uint8).view(torch.int32)


def _unpacked(bits: Tensor, count: int) -> Tensor:
    """The first `count` bits as a boolean tensor."""
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.view(torch.uint8)[:, None] & weights).flatten()[:count].bool()


def _num_words(count: int) -> int:
    return -(-count // 32)


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    try:
        return tuple([tensor._version for tensor in tensors])
    except RuntimeError:  # tensors made in inference mode count nothing
        return len(tensors) * (-1,)


class Shown(NamedTuple):
    """Coordinates that a full store has made because somebody asked for them, who may write them."""

    rows: Tensor
    cols: Tensor
    versions: tuple[int, ...]  # when they agreed with the store; () = never

    @classmethod
    def agreeing(cls, rows: Tensor, cols: Tensor) -> Self:
        return cls(rows, cols, _versions(rows, cols))

    def are_written(self) -> bool:
        return self.versions != _versions(self.rows, self.cols)

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


# Derived state is never stale. The index carries as `built_from` the coordinates it was built from and their versions.
# A rewire writes coordinates, rebuilds the index and stamps it. Whoever else writes coordinates in place (a checkpoint
# library, an average of models) leaves an older stamp behind, which the next product sees. The index of a full store
# carries as `shown` what somebody asked for and may write.


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
    sizes = (0, _num_words(layout.num_slots)) if layout.full else (len(index),)
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


def in_order(layout: Layout) -> bool:
    """Whether there is a slot for every block and live ones are in row-major order; reads the coordinates."""
    group_cols = layout.num_cols // layout.groups
    if layout.num_slots != layout.num_rows * group_cols:
        return False
    places = torch.arange(layout.num_slots, device=layout.block_rows.device)
    return bool(((layout.positions() == places) | (layout.block_rows < 0)).all())


def _stand_back(*_) -> None:
    """A hook that does nothing."""


COORDINATES = ("block_rows", "block_cols")
_SAVED = (*COORDINATES, "_extra_state")
_GEOMETRY = "(out_features, in_features, block_size, groups)"


class Topology(nn.Module):
    """The live blocks of a block-sparse matrix and the slots they are stored in.

    `block_rows` and `block_cols` *are* the topology: slot s of the weight holds block (block_rows[s], block_cols[s]),
    in global block coordinates; -1 marks a dead slot. They move and are saved as buffers are, but are not registered as
    such: DistributedDataParallel would broadcast them at every forward, and no backend of it knows int16. `index` is
    derived from them, not saved, and built anew before the next product if somebody has written them in place. With
    groups, the matrix is block-diagonal: group g owns block rows g*R/G ... and block columns g*C/G ... .

    A full store, of every block in row-major order, holds no coordinates and no index, but a bit for each slot once
    some are dead. Its `block_rows` and `block_cols` are made when asked for. The next product looks whether they were
    written, follows them, and forgets them unless somebody holds them. Compiled code cannot follow them, and says so.

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
        out, into = shape
        self.shape = out, into
        self.block_size = block_size
        self.groups = groups
        # torch's fused inference path of nn.TransformerEncoderLayer reads weights as dense matrices. It stands back
        # where any module inside has a hook; nothing calls this module, so the hook costs nothing.
        self.register_forward_hook(_stand_back)
        rows, cols = (groups * -(-size // groups // block_size) for size in shape)
        self.grid = rows, cols
        self.padded = self.shape != tuple(blocks * block_size for blocks in self.grid)
        check_blocks(block_rows, block_cols, self.grid, groups)
        dtype = torch.int16 if max(self.grid) < 2**15 else torch.int32
        self._rows = block_rows.to(dtype, copy=True)
        self._cols = block_cols.to(dtype, copy=True)
        self.index = torch.empty(0, dtype=torch.int32, device=block_rows.device)
        # How often a checkpoint brought in another topology; a rule compares it to notice stale optimiser state.
        self.adoptions = 0
        self._reindex()

    @classmethod
    def random(
        cls,
        shape,
        live: int | list[int] | float,
        block_size: int,
        groups: int = 1,
        balance: str | None = None,
    ) -> "Topology":
        """Draw a uniform topology from torch's generator; a block in every row and column while there are enough.

        `live` is a density in (0, 1] or the number of live blocks, of each group or one for all. With balance="rows"
        all rows of a group have the same number of blocks, up to one; `SET(..., balance="rows")` keeps them so.
        """
        check_geometry(shape, block_size, groups)
        check_balance("Topology.random", balance)
        rows, cols = (-(-size // groups // block_size) for size in shape)
        live = live_counts([live] * groups if _is_count(live) else live, rows * cols, groups)
        draw = _balanced_positions if balance else _random_positions
        chosen = [draw(rows, cols, count) for count in live]
        block_rows = torch.cat([p // cols + g * rows for g, p in enumerate(chosen)])
        block_cols = torch.cat([p % cols + g * cols for g, p in enumerate(chosen)])
        return cls(block_rows, block_cols, shape, block_size, groups)

    @classmethod
    def from_mask(cls, mask: Tensor, shape, block_size: int) -> "Topology":
        """Take the live blocks from a boolean grid [groups, rows, cols] or, of one group, [rows, cols]; row-major."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() not in (2, 3):
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"from_mask: mask must be boolean [groups, rows, cols] or [rows, cols], got {got}")
        if mask.layout != torch.strided or mask.is_meta:
            raise ValueError(f"from_mask: mask must be dense and have values, got {mask.layout} on {mask.device}")
        mask = mask if mask.dim() == 3 else mask[None]
        groups, rows, cols = mask.shape
        check_geometry(shape, block_size, groups)
        want = tuple(-(-size // groups // block_size) for size in shape)
        if (rows, cols) != want:
            raise ValueError(
                f"from_mask: shape {tuple(shape)} in {groups} groups has {want} blocks of {block_size} in each, "
                f"got a mask of {(rows, cols)}"
            )
        g, r, c = mask.nonzero().unbind(1)
        return cls(g * rows + r, g * cols + c, shape, block_size, groups)

    @property
    def block_rows(self) -> Tensor:
        """int16, or int32 on grids of more than 32767, [num_slots]: global block row of each slot, -1 = dead."""
        return self._coordinates()[0]

    @block_rows.setter
    def block_rows(self, block_rows: Tensor) -> None:
        self._put(block_rows, self._coordinates()[1])

    @property
    def block_cols(self) -> Tensor:
        """Likewise the global block column."""
        return self._coordinates()[1]

    @block_cols.setter
    def block_cols(self, block_cols: Tensor) -> None:
        self._put(self._coordinates()[0], block_cols)

    def _coordinates(self) -> tuple[Tensor, Tensor]:
        if not self.full:
            return self._rows, self._cols
        if torch.compiler.is_compiling():
            return self.layout.coordinates()
        layout = self._layout()
        with torch.inference_mode(False):  # whose tensors do not count how often they are written
            if (shown := shown_by(layout)) is None:
                self.index.shown = shown = Shown.agreeing(*layout.coordinates())
            return shown.rows.detach(), shown.cols.detach()  # others, which count together: see `Shown.are_held`

    def _put(self, block_rows: Tensor, block_cols: Tensor) -> None:
        check_integers("block_rows", block_rows)
        check_integers("block_cols", block_cols)
        if self.full:
            self.index.shown = Shown(block_rows.detach(), block_cols.detach(), ())  # as in `_coordinates`
        else:
            self._rows, self._cols = block_rows, block_cols

    @property
    def layout(self) -> Layout:
        """What products walk, with an index that agrees with the coordinates.

        Raises:
            ValueError: somebody wrote coordinates in place that are no topology.
        """
        if torch.compiler.is_compiling():
            return Layout(self._rows, self._cols, self.index, *self.grid, self.groups, self.block_size, self.full)
        return self.eager_layout()

    def eager_layout(self) -> Layout:
        """`layout` for whoever knows that nothing is being compiled."""
        layout = self._layout()
        if (self.full and shown_by(layout) is not None) or not is_current(layout):
            self._follow()
            return self._layout()  # which may have stopped being a full store
        return layout

    def _layout(self) -> Layout:
        held, rows, cols, index = self._held_layout, self._rows, self._cols, self.index
        # the same tuple as long as it says the same: to make one takes longer than to look
        if held is None or not (held[0] is rows and held[1] is cols and held[2] is index and held[7] is self.full):
            self._held_layout = held = Layout(rows, cols, index, *self.grid, self.groups, self.block_size, self.full)
        return held

    @property
    def num_slots(self) -> int:
        return self.num_blocks if self.full else self._rows.shape[0]

    @property
    def num_blocks(self) -> int:
        """Number of places a block can have, live or dead."""
        return self.grid[0] * self.grid[1] // self.groups

    @property
    def num_live(self) -> int:
        """Number of live blocks; on "meta", which knows of no dead slot, that of slots."""
        return self.num_slots if self.index.is_meta else int(self.layout.live().sum())

    @property
    def density(self) -> float:
        return self.num_live / self.num_blocks

    @property
    def nbytes(self) -> int:
        """Bytes of coordinates and index that are held: what the topology costs besides the weight."""
        return sum(t.numel() * t.element_size() for t in (self._rows, self._cols, self.index))

    def live_per_group(self) -> list[int]:
        rows = self.layout.coordinates()[0].long()
        return torch.bincount(rows[rows >= 0] // (self.grid[0] // self.groups), minlength=self.groups).tolist()

    def mask(self) -> Tensor:
        """Boolean grid [groups, rows, cols] per group, True where a block is live."""
        mask = torch.zeros(self.num_blocks + 1, dtype=torch.bool, device=self.index.device)
        mask[self.layout.positions()] = True
        return mask[:-1].view(self.groups, self.grid[0] // self.groups, self.grid[1] // self.groups)

    def rebuild(self) -> None:
        """Bring the index up to date with the coordinates, in place and without a host synchronisation.

        Raises:
            ValueError: by the C++ module: a block is outside of the grid. Blocks that are live twice are not found.
        """
        if self.full:
            self._follow()
            return
        layout = self._layout()
        self.index.copy_(build_index(layout))
        stamp(layout)

    @torch.no_grad()
    def mark_dead(self, dead: Tensor) -> None:
        """Mark slots dead where the boolean [num_slots] says so, in place and without a host synchronisation."""
        if not isinstance(dead, Tensor) or dead.dtype != torch.bool or dead.shape != (self.num_slots,):
            got = f"{dead.dtype} {tuple(dead.shape)}" if isinstance(dead, Tensor) else type(dead).__name__
            raise ValueError(f"mark_dead: dead must be boolean ({self.num_slots},), got {got}")
        if not self.full:
            self._rows.masked_fill_(dead, -1)
            self._cols.masked_fill_(dead, -1)
            self.rebuild()
            return
        before = self.layout.dead()
        self.hold_bits()
        self.index.copy_(_packed(dead if before is None else dead | before))
        stamp(self._layout())
        tell_shown(self._layout())

    @torch.no_grad()
    def hold_bits(self) -> None:
        """Give a full store the bits of its dead slots, before there are any: CUDA graphs want addresses that stay."""
        if self.full and not self.index.numel():
            self.index.set_(self.index.new_zeros(_num_words(self.num_slots)))
            stamp(self._layout())

    def replace(self, block_rows: Tensor, block_cols: Tensor) -> None:
        """Take over coordinates of any number of slots, in the tensors that are held: what loading needs.

        Raises:
            ValueError: the coordinates are no topology of this geometry.
        """
        check_blocks(block_rows, block_cols, self.grid, self.groups)
        self._check_values(block_rows)
        self._replace(block_rows, block_cols)

    def _check_values(self, coordinates: Tensor) -> None:
        if coordinates.is_meta and not self.index.is_meta:
            raise ValueError("Topology: block_rows and block_cols are on meta, where they have no values")

    def keep_slots(self, slots: Tensor) -> None:
        """Keep these slots, int64 [any], in this order and in the tensors that are held: what compaction needs.

        Raises:
            ValueError: they are no slots of this topology, or a live one is among them twice.
        """
        if not isinstance(slots, Tensor) or slots.dtype not in INTEGERS or slots.dim() != 1:
            got = f"{slots.dtype} {tuple(slots.shape)}" if isinstance(slots, Tensor) else type(slots).__name__
            raise ValueError(f"keep_slots: slots must be integers [any], got {got}")
        if ((slots < 0) | (slots >= self.num_slots)).any():
            raise ValueError(f"keep_slots: slots must be from 0 to {self.num_slots - 1}, got {slots.tolist()}")
        rows, cols = self.layout.coordinates()
        self.replace(rows[slots.long()], cols[slots.long()])

    @torch.no_grad()
    def _replace(self, block_rows: Tensor, block_cols: Tensor) -> None:
        rows, cols = (value.to(self._rows, copy=True) for value in (block_rows, block_cols))
        if self.full:
            self._rows, self._cols = rows, cols
            self.index.shown = None
        else:
            self._rows.set_(rows)
            self._cols.set_(cols)
        self._reindex()

    @torch.no_grad()
    def leave_full_store(self) -> None:
        """Hold coordinates and an index instead, so that products walk the live blocks from now on."""
        layout = self.layout
        if layout.full:
            shown, (self._rows, self._cols, index) = shown_by(layout), layout.indexed().tensors
            if shown is not None:  # whoever holds them may go on writing them
                self._rows, self._cols = (own.to(self._rows) for own in shown[:2])
            self.full = False
            self.index.shown = None
            self.index.set_(index)
            stamp(self._layout())

    def _reindex(self) -> None:
        """Size the index for the slots there are now; a store with a slot for every block, in order, needs none."""
        self.full = False
        layout = self._layout()
        index = build_index(layout) if not in_order(layout) else self._as_full_store(layout.dead())
        self.index.set_(index)
        stamp(self._layout())

    def _as_full_store(self, dead: Tensor) -> Tensor:
        """Hold no coordinates; returns the index."""
        self.full = True
        self._rows, self._cols = (torch.empty_like(own[:0]) for own in (self._rows, self._cols))
        return _packed(dead) if dead.any() else self.index.new_empty(0)

    @torch.no_grad()
    def _follow(self) -> None:
        """Agree with coordinates that somebody wrote, as if they had been loaded."""
        layout = self._layout()
        shown = shown_by(layout) if self.full else None
        if is_current(layout) or self.index.is_meta:  # where there is nothing to check, and no product to go wrong
            stamp(layout)
            if shown is not None and not shown.are_held():
                self.index.shown = None
        elif shown is not None and shown.are_written():
            self._follow_shown(shown)
        elif catch_up(layout):
            self.adoptions += 1

    def _follow_shown(self, shown: Shown) -> None:
        """Likewise with those that a full store has shown."""
        refuse_capture(self.index)
        check_blocks(shown.rows, shown.cols, self.grid, self.groups)
        if not self.is_at(shown.rows, shown.cols):  # else the index may stay where it is
            self.adoptions += 1
            self._rows, self._cols = (own.to(self._rows) for own in shown[:2])
            self._reindex()
        self.index.shown = Shown.agreeing(*shown[:2]) if self.full else None

    def _apply(self, fn, recurse=True):
        """Go where `fn` takes tensors, and nothing else: coordinates stay the integers they are.

        A module on "meta" has no coordinates. Where `to_empty` gives it memory that nobody has filled, a topology of
        the same number of slots is drawn.
        """
        super()._apply(fn, recurse)
        own = self.layout.tensors
        device = [fn(tensor) for tensor in own][0].device  # moved to shared memory, they are the same tensors
        if device == own[0].device:
            return self
        if self.index.is_meta:
            per_group = [len(part) for part in torch.arange(self.num_slots, device="cpu").tensor_split(self.groups)]
            drawn = Topology.random(self.shape, per_group, self.block_size, self.groups)
            own, self.full = drawn.layout.tensors, drawn.full
        self._rows, self._cols, self.index = (tensor.to(device) for tensor in own)
        stamp(self._layout())
        return self

    def __getstate__(self) -> dict:
        self._follow()  # a copy's index is as good as the original's
        return self.__dict__

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.index.shown = None  # nobody holds those of a copy
        stamp(self._layout())  # the copies have versions of their own

    def get_extra_state(self) -> Tensor:
        """int64 (out_features, in_features, block_size, groups, full): with the coordinates, all there is to know."""
        return torch.tensor([*self.shape, self.block_size, self.groups, self.full])

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "block_rows"], destination[prefix + "block_cols"] = self._coordinates()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def is_at(self, block_rows: Tensor, block_cols: Tensor) -> bool:
        """Whether these are the coordinates, slot by slot; False on "meta", which has none."""
        if self.index.is_meta or block_rows.is_meta or block_rows.shape != (self.num_slots,):
            return False
        pairs = zip((block_rows, block_cols), self._layout().coordinates(), strict=True)
        return all(torch.equal(other.to(own), own) for other, own in pairs)

    def check_checkpoint(self, state_dict: dict, prefix: str) -> bool:
        """Whether there is a topology at `prefix`; raise a ValueError if it is not one of this geometry."""
        if any(prefix + name not in state_dict for name in _SAVED):
            return False
        rows, cols, extra = (state_dict[prefix + name] for name in _SAVED)
        saved, own = (
            saved_geometry(f"load_state_dict: {prefix}_extra_state", extra),
            (*self.shape, self.block_size, self.groups),
        )
        if saved != own:
            raise ValueError(f"load_state_dict: the checkpoint's topology has {_GEOMETRY} {saved}, the layer {own}")
        check_blocks(rows, cols, self.grid, self.groups)
        self._check_values(rows)
        return True

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        if not self.check_checkpoint(state_dict, prefix):
            missing_keys.extend(prefix + name for name in _SAVED if prefix + name not in state_dict)
            return
        rows, cols = state_dict[prefix + "block_rows"], state_dict[prefix + "block_cols"]
        if self.index.is_meta and local_metadata.get("assign_to_params_buffers"):
            self._apply(lambda tensor: torch.empty_like(tensor, device=rows.device))
        if self.index.is_meta:
            return  # as for parameters: what has no memory keeps nothing
        # where somebody filled the tensors of our own state_dict, they are equal and the index is old
        same = self.is_at(rows, cols) and is_current(self._layout())
        self.adoptions += not same
        if not same or self.full != bool(state_dict[prefix + "_extra_state"][4]):
            self.replace(rows, cols)
        else:
            self.rebuild()
        if self.full and not state_dict[prefix + "_extra_state"][4]:
            self.leave_full_store()

    def extra_repr(self) -> str:
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return f"{self.grid[0]} x {self.grid[1]} blocks of {self.block_size}, density={self.density:.3g}{groups}"


def live_count(density: float, num_blocks: int) -> int:
    """Number of live blocks that a density in (0, 1] asks for: max(1, round(density * num_blocks))."""
    if isinstance(density, bool) or not isinstance(density, numbers.Real) or not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}")
    return max(1, round(density * num_blocks))


def live_counts(density: float | Sequence[float | int], num_blocks: int, groups: int) -> list[int]:
    """Live blocks of each group: of one density for all, or of a list of densities (float) or counts (int)."""
    if not isinstance(density, list | tuple):
        return [live_count(density, num_blocks)] * groups
    if len(density) != groups:
        raise ValueError(
            f"density: {groups} groups want as many densities or live counts, got {len(density)}: {density}"
        )
    counts = [value if _is_count(value) else live_count(value, num_blocks) for value in density]
    if not all(0 < count <= num_blocks for count in counts):
        raise ValueError(f"density: live counts must be from 1 to {num_blocks} blocks in each group, got {density}")
    return counts


def _is_count(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_block_size(block_size: int) -> None:
    if not _is_count(block_size) or block_size not in (1, 2, 4, 8, 16, 32, 64, 128):
        raise ValueError(f"block_size must be a power of two from 1 to 128, got {block_size!r}")


def check_geometry(shape: tuple[int, int], block_size: int, groups: int) -> None:
    check_block_size(block_size)
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        raise ValueError(f"shape must be (out_features, in_features), got {shape!r}")
    if not _is_count(groups):
        raise ValueError(f"groups must be a positive integer, got groups={groups!r}")
    for name, size in zip(("out_features", "in_features"), shape, strict=True):
        if not _is_count(size):
            raise ValueError(f"{name} must be a positive multiple of groups, got {name}={size!r}, groups={groups}")
        if size <= 0 or groups <= 0 or size % groups:
            raise ValueError(f"{name} must be a positive multiple of groups, got {name}={size}, groups={groups}")
        if size // block_size >= 2**31 - groups:  # the index is of int32
            raise ValueError(f"{name} must be under 2**31 blocks of {block_size}, got {name}={size}")


def saved_geometry(name: str, extra: object) -> tuple[int, ...]:
    """(out_features, in_features, block_size, groups) as `Topology.get_extra_state` gave them."""
    if not isinstance(extra, Tensor) or extra.shape != (5,) or extra.dtype not in INTEGERS or extra.is_meta:
        raise ValueError(f"{name} must be 5 integers, {_GEOMETRY} and full, got {extra!r}")
    return tuple(extra.tolist()[:4])


def check_blocks(block_rows: Tensor, block_cols: Tensor, grid: tuple[int, int], groups: int) -> None:
    """Refuse coordinates that are no topology; native kernels would follow them outside of their memory."""
    for name, coordinates in (("block_rows", block_rows), ("block_cols", block_cols)):
        check_integers(name, coordinates)
        if coordinates.layout != torch.strided or coordinates.is_nested:
            raise ValueError(
                f"Topology: {name} must be dense, got {coordinates.layout}, nested={coordinates.is_nested}"
            )
    if block_rows.dim() != 1 or block_rows.shape != block_cols.shape:
        shapes = f"{tuple(block_rows.shape)} and {tuple(block_cols.shape)}"
        raise ValueError(f"Topology: block_rows and block_cols must be of one length, got shapes {shapes}")
    if block_rows.device != block_cols.device:
        devices = f"{block_rows.device} and {block_cols.device}"
        raise ValueError(f"Topology: block_rows and block_cols must be on one device, got {devices}")
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


def check_integers(name: str, coordinates: object) -> None:
    if not isinstance(coordinates, Tensor) or coordinates.dtype not in INTEGERS:
        got = coordinates.dtype if isinstance(coordinates, Tensor) else type(coordinates).__name__
        raise ValueError(f"Topology: {name} must be a tensor of integers, got {got}")


def check_balance(where: str, balance: object) -> None:
    if balance is not None and balance != "rows":
        raise ValueError(f"{where}: balance must be 'rows' or None, got {balance!r}")


def _random_positions(rows: int, cols: int, count: int) -> Tensor:
    """`count` distinct places of a grid, sorted: some to cover rows and columns, the rest uniform."""
    with torch.device("cpu"):  # whatever the default device: the same draws everywhere, and some on "meta" too
        cover, _ = _cover(rows, cols, count)
        rest = torch.randperm(rows * cols)
        rest = rest[~torch.isin(rest, cover)][: count - len(cover)]
        return torch.cat((cover, rest)).sort().values


def _balanced_positions(rows: int, cols: int, count: int) -> Tensor:
    """As `_random_positions`, with count // rows places in every row, and one more in some."""
    with torch.device("cpu"):
        cover, row_order = _cover(rows, cols, count)
        rank = torch.rand(rows * cols).index_fill_(0, cover, -1.0).view(rows, cols).argsort(1).argsort(1)
        wanted = torch.full((rows,), count // rows).index_add_(
            0, row_order[: count % rows], torch.tensor(1).expand(count % rows)
        )
        return (rank < wanted[:, None]).flatten().nonzero().flatten()


def _cover(rows: int, cols: int, count: int) -> tuple[Tensor, Tensor]:
    """Places on a shuffled diagonal that goes round, no more than `count`; and the order in which it meets the rows."""
    diagonal = torch.arange(min(count, max(rows, cols)))
    row_order = torch.randperm(rows)
    return row_order[diagonal % rows] * cols + torch.randperm(cols)[diagonal % cols], row_order
