"""Topology: which blocks of a matrix are live, in which slot each is stored, and the index that products walk."""

import numbers
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

try:
    from sparsekern import _C  # type: ignore[attr-defined]
except ImportError:  # backends/cpu.py says why, to whoever asks for it
    _C = None

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


class Layout(NamedTuple):
    """What a product needs to know of a topology: tensors whose contents change in place, and numbers that do not."""

    block_rows: Tensor  # int16 or int32 [num_slots]: global block row of each slot, -1 = dead
    block_cols: Tensor  # likewise the global block column
    index: Tensor  # type: ignore[assignment]  # int32, flat; see `Layout.row_pairs` and its neighbours
    num_rows: int  # block rows, all groups together
    num_cols: int
    groups: int
    block_size: int
    full: bool  # slots hold every block in row-major order: the dense matrix itself, without an index

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
        return self.block_rows.shape[0]

    def versions(self) -> tuple[int, int, int]:
        """How often torch has seen coordinates and index being written; numbers of the host, free to read."""
        try:
            return self[0]._version, self[1]._version, self[2]._version
        except RuntimeError:  # tensors made in inference mode count nothing
            return -1, -1, -1

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


# Derived state is never stale. The index carries as `built_from` the coordinates it was built from and their versions.
# A rewire writes coordinates, rebuilds the index and stamps it. Whoever else writes coordinates in place (a checkpoint
# library, an average of models) leaves an older stamp behind, which the next product sees.


def stamp(layout: Layout) -> None:
    """Note that the index, as it is now, agrees with the coordinates as they are now."""
    layout.index.built_from = layout.block_rows, layout.block_cols, layout.versions()
    layout.index.built_for = layout.geometry


def is_current(layout: Layout) -> bool:
    """Whether the index was built from these coordinates as they are now; reads no tensor."""
    rows, cols, versions = getattr(layout.index, "built_from", (None, None, None))
    return rows is layout.block_rows and cols is layout.block_cols and versions == layout.versions()


def catch_up(layout: Layout) -> bool:
    """Build the index anew, in place, from coordinates that somebody wrote; returns whether it has changed.

    Raises:
        ValueError: the coordinates are no topology, or the layout's tensors do not fit together.
        RuntimeError: a CUDA graph is being captured, which cannot wait for the coordinates to be checked.
    """
    if layout.index.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Topology: block_rows or block_cols were written in place since the index was built, and a CUDA graph that "
            "is being captured cannot check them; run the model once before the capture"
        )
    check_blocks(layout.block_rows, layout.block_cols, (layout.num_rows, layout.num_cols), layout.groups)
    if layout.full and not in_order(layout):
        raise ValueError("Topology: block_rows and block_cols are not in row-major order, but the layout says full")
    index = build_index(layout)
    if index.shape != layout.index.shape or layout.index.dtype != index.dtype:
        raise ValueError(
            f"Topology: {layout.num_slots} slots of {layout.num_rows} x {layout.num_cols} blocks want an index of "
            f"{len(index)} int32, got {tuple(layout.index.shape)} of {layout.index.dtype}"
        )
    changed = not torch.equal(index, layout.index)
    if changed:
        layout.index.copy_(index)
    stamp(layout)
    return changed


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
        self.block_rows = block_rows.to(dtype, copy=True)
        self.block_cols = block_cols.to(dtype, copy=True)
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
    def layout(self) -> Layout:
        """What products walk, with an index that agrees with the coordinates.

        Raises:
            ValueError: somebody wrote coordinates in place that are no topology.
        """
        if torch.compiler.is_compiling():
            return Layout(
                self.block_rows, self.block_cols, self.index, *self.grid, self.groups, self.block_size, self.full
            )
        layout = self._layout()
        if not is_current(layout):
            self._catch_up()
            return self._layout()  # which may have stopped being a full store
        return layout

    def _layout(self) -> Layout:
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
        rows = self.layout.block_rows.long()
        return torch.bincount(rows[rows >= 0] // (self.grid[0] // self.groups), minlength=self.groups).tolist()

    def mask(self) -> Tensor:
        """Boolean grid [groups, rows, cols] per group, True where a block is live."""
        mask = torch.zeros(self.num_blocks + 1, dtype=torch.bool, device=self.block_rows.device)
        mask[self.layout.positions()] = True
        return mask[:-1].view(self.groups, self.grid[0] // self.groups, self.grid[1] // self.groups)

    def rebuild(self) -> None:
        """Bring the index up to date with the coordinates, in place and without a host synchronisation.

        Raises:
            ValueError: by the C++ module: a block is outside of the grid. Blocks that are live twice are not found.
        """
        layout = self._layout()
        self.index.copy_(build_index(layout))
        stamp(layout)

    def replace(self, block_rows: Tensor, block_cols: Tensor) -> None:
        """Take over coordinates of any number of slots, in the same tensors: what loading needs.

        Raises:
            ValueError: the coordinates are no topology of this geometry.
        """
        check_blocks(block_rows, block_cols, self.grid, self.groups)
        self._check_values(block_rows)
        self._replace(block_rows, block_cols)

    def _check_values(self, coordinates: Tensor) -> None:
        if coordinates.is_meta and not self.block_rows.is_meta:
            raise ValueError("Topology: block_rows and block_cols are on meta, where they have no values")

    def keep_slots(self, slots: Tensor) -> None:
        """Keep these slots, int64 [any], in this order and in the same tensors: what compaction needs.

        Raises:
            ValueError: they are no slots of this topology, or a live one is among them twice.
        """
        if not isinstance(slots, Tensor) or slots.dtype not in INTEGERS or slots.dim() != 1:
            got = f"{slots.dtype} {tuple(slots.shape)}" if isinstance(slots, Tensor) else type(slots).__name__
            raise ValueError(f"keep_slots: slots must be integers [any], got {got}")
        if ((slots < 0) | (slots >= self.num_slots)).any():
            raise ValueError(f"keep_slots: slots must be from 0 to {self.num_slots - 1}, got {slots.tolist()}")
        self.replace(self.block_rows[slots.long()], self.block_cols[slots.long()])

    @torch.no_grad()
    def _replace(self, block_rows: Tensor, block_cols: Tensor) -> None:
        for own, value in ((self.block_rows, block_rows), (self.block_cols, block_cols)):
            own.set_(value.to(own, copy=True))
        self._reindex()

    @torch.no_grad()
    def leave_full_store(self) -> None:
        """Build the index of a full store, so that products walk its live blocks from now on."""
        self.full = False
        self._resize_index()

    def _reindex(self) -> None:
        """Size the index for the slots there are now; a store with a slot for every block, in order, needs none."""
        self.full = False
        self.full = in_order(self._layout())
        self._resize_index()

    def _resize_index(self) -> None:
        self.index.set_(build_index(self._layout()))
        stamp(self._layout())

    @torch.no_grad()
    def _catch_up(self) -> None:
        """Follow coordinates that somebody wrote in place, as if they had been loaded."""
        layout = self._layout()
        if layout.block_rows.is_meta:  # there is nothing to check, and no product to go wrong
            stamp(layout)
            return
        check_blocks(self.block_rows, self.block_cols, self.grid, self.groups)
        if self.full and not in_order(layout):
            self.leave_full_store()
            self.adoptions += 1
        elif catch_up(layout):
            self.adoptions += 1

    def _apply(self, fn, recurse=True):
        """Go where `fn` takes tensors, and nothing else: coordinates stay the integers they are.

        A module on "meta" has no coordinates. Where `to_empty` gives it memory that nobody has filled, a topology of
        the same number of slots is drawn.
        """
        super()._apply(fn, recurse)
        own = self.block_rows, self.block_cols, self.index
        device = [fn(tensor) for tensor in own][0].device  # moved to shared memory, they are the same tensors
        if device == own[0].device:
            return self
        if self.block_rows.is_meta:
            per_group = [len(part) for part in torch.arange(self.num_slots, device="cpu").tensor_split(self.groups)]
            own = Topology.random(self.shape, per_group, self.block_size, self.groups)._layout().tensors
        self.block_rows, self.block_cols, self.index = (tensor.to(device) for tensor in own)
        stamp(self._layout())
        return self

    def __getstate__(self) -> dict:
        if not self.block_rows.is_meta and not is_current(self._layout()):
            self._catch_up()  # a copy's index is as good as the original's
        return self.__dict__

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        stamp(self._layout())  # the copies have versions of their own

    def get_extra_state(self) -> Tensor:
        """int64 (out_features, in_features, block_size, groups, full): with the coordinates, all there is to know."""
        return torch.tensor([*self.shape, self.block_size, self.groups, self.full])

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "block_rows"], destination[prefix + "block_cols"] = self.block_rows, self.block_cols
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def is_at(self, block_rows: Tensor, block_cols: Tensor) -> bool:
        """Whether these are the coordinates, slot by slot; False on "meta", which has none."""
        if self.block_rows.is_meta or block_rows.is_meta or block_rows.shape != self.block_rows.shape:
            return False
        pairs = ((block_rows, self.block_rows), (block_cols, self.block_cols))
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
        if self.block_rows.is_meta and local_metadata.get("assign_to_params_buffers"):
            self._apply(lambda tensor: torch.empty_like(tensor, device=rows.device))
        if self.block_rows.is_meta:
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
        if not isinstance(coordinates, Tensor) or coordinates.dtype not in INTEGERS:
            got = coordinates.dtype if isinstance(coordinates, Tensor) else type(coordinates).__name__
            raise ValueError(f"Topology: {name} must be a tensor of integers, got {got}")
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
