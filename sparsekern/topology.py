"""Topology: which blocks of a matrix are live, and in which slot each is stored."""

import torch
from torch import Tensor, nn

from sparsekern.agreement import Shown, catch_up, is_current, refuse_capture, shown_by, stamp, tell_shown
from sparsekern.geometry import (
    GEOMETRY,
    INTEGERS,
    check_balance,
    check_blocks,
    check_geometry,
    check_integers,
    is_count,
    live_counts,
    saved_geometry,
)
from sparsekern.layout import Layout, build_index, in_order, num_words, packed

COORDINATES = ("block_rows", "block_cols")
_SAVED = (*COORDINATES, "_extra_state")


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
        if is_count(live):
            if not 0 < live <= rows * cols:
                raise ValueError(
                    f"Topology.random: live must be from 1 to {rows * cols} blocks of each group, got {live}"
                )
            live = [live] * groups
        live = live_counts(live, rows * cols, groups)
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
        self.index.copy_(packed(dead if before is None else dead | before))
        stamp(self._layout())
        tell_shown(self._layout())

    @torch.no_grad()
    def hold_bits(self) -> None:
        """Give a full store the bits of its dead slots, before there are any: CUDA graphs want addresses that stay."""
        if self.full and not self.index.numel():
            self.index.set_(self.index.new_zeros(num_words(self.num_slots)))
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
        return packed(dead) if dead.any() else self.index.new_empty(0)

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
        return torch.tensor([*self.shape, self.block_size, self.groups, self.full], device="cpu")

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
            raise ValueError(f"load_state_dict: the checkpoint's topology has {GEOMETRY} {saved}, the layer {own}")
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


def _stand_back(*_) -> None:
    """A hook that does nothing."""
