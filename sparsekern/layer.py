"""SparseLayer: what every block-sparse layer holds (weight in slots, topology, bias), and how it loads and converts."""

import copy
import warnings
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from sparsekern.backends.reference import densify, gather
from sparsekern.geometry import check_geometry, live_count, live_counts
from sparsekern.topology import Topology
from sparsekern.untrained import watch

KEEP = ("magnitude", "random", "fresh")


class SparseLayer(nn.Module):
    """Base of SparseLinear and SparseConv2d: a block-sparse matrix [out, in]. Rules act on its instances."""

    topology: Topology
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        shape: tuple[int, int],
        bias: bool,
        device,
        dtype,
        density: float,
        block_size: int,
        groups: int,
        topology: Topology | None,
    ):
        super().__init__()
        if topology is None:
            live_count(density, 1)  # checks the range, before float() would take a text
            topology = Topology.random(shape, float(density), block_size, groups)
        elif not isinstance(topology, Topology):
            raise TypeError(f"{type(self).__name__}: topology must be a sparsekern.Topology, got {topology!r}")
        elif topology.shape != shape:
            raise ValueError(
                f"{type(self).__name__}: topology is for shape {topology.shape}, but the layer's is {shape}"
            )
        elif groups not in (1, topology.groups):
            raise ValueError(f"{type(self).__name__}: topology has {topology.groups} groups, got groups={groups!r}")
        if not isinstance(bias, int):  # True and False are
            raise ValueError(f"{type(self).__name__}: bias must be True or False, got {bias!r}")
        device = torch.get_default_device() if device is None else device  # which may be 0
        self.topology = copy.deepcopy(topology).to(device)
        blocks = (topology.num_slots, topology.block_size, topology.block_size)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"{type(self).__name__}: dtype must be of real floating-point numbers, got {dtype!r}")
        self.weight = nn.Parameter(torch.empty(blocks, device=device, dtype=dtype))
        watch(self.weight)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None
        )
        self.growth = None
        """A rule that grows by gradient (RigL) hangs its `sparsekern.rewire.growth.GrowthScores` here."""
        self.reset_parameters()

    def __delattr__(self, name: str) -> None:
        if name == "weight":  # torch.nn.utils.parametrizations take the parameter away and put a property there
            warnings.warn(
                f"{type(self).__name__}: what replaces `weight` sees the slots [num_slots, B, B], and not W [out, in]: "
                "spectral_norm and weight_norm normalise the store, and no rule can rewire it",
                stacklevel=4,
            )
        super().__delattr__(name)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"growth": None}  # no rule reads the scores of a copy, unless it hangs its own there

    @property
    def block_size(self) -> int:
        return self.topology.block_size

    @property
    def groups(self) -> int:
        return self.topology.groups

    @property
    def density(self) -> float:
        return self.topology.density

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weight and bias anew by the real fan-in of each row; dead slots and padding are 0."""
        fan_in = self.fan_in()
        bound = fan_in.clamp(min=1).rsqrt().to(self.weight.dtype)
        rows = self.topology.layout.coordinates()[0].long().clamp(min=0)
        self.weight.uniform_(-1, 1).mul_(bound[rows][:, None, None]).mul_(self.lanes())
        if self.bias is not None:
            # a row without live blocks has no fan-in: nn.Linear's dense bound keeps its constant output small
            dense = (self.topology.shape[1] // self.groups) ** -0.5
            bound = torch.where(fan_in > 0, bound, dense).repeat_interleave(self.block_size)
            bound = bound.view(self.groups, -1)[:, : self.topology.shape[0] // self.groups].flatten()
            self.bias.uniform_(-1, 1).mul_(bound)

    def fan_in(self) -> Tensor:
        """float32 [block rows]: inputs that the rows of each block row really read, padding not counted."""
        layout = self.topology.layout
        rows, cols = layout.coordinates()
        width = self._extent(cols, 1) * (rows >= 0)
        fan_in = torch.zeros(layout.num_rows, dtype=torch.float32, device=width.device)
        return fan_in.index_add_(0, rows.long().clamp(min=0), width.float())

    def lanes(self) -> Tensor:
        """Boolean [num_slots, B, B], or [num_slots, 1, 1] where nothing is padded: elements that stand for a weight."""
        layout = self.topology.layout
        live = layout.live()[:, None, None]
        if not self._padded():
            return live
        lane = torch.arange(self.block_size, device=live.device)
        rows, cols = (lane < self._extent(own, side)[:, None] for side, own in enumerate(layout.coordinates()))
        return live & rows[:, :, None] & cols[:, None, :]

    def _extent(self, blocks: Tensor, side: int) -> Tensor:
        """How many unpadded lanes each of these block rows (side 0) or columns (side 1) has."""
        size, count = self.topology.shape[side] // self.groups, self.topology.grid[side] // self.groups
        return (size - blocks.long() % count * self.block_size).clamp(max=self.block_size)

    @torch.no_grad()
    def set_density(self, density: float | list[int], keep: str | Tensor = "magnitude") -> None:
        """Take a topology of another density, in place; `weight` stays the same Parameter, with other slots.

        Optimiser state of the old slots is of no use then: do this before the optimiser is built, or build it anew.

        Args:
            density: in (0, 1], of each group; or the number of live blocks of each group.
            keep: as in `SparseLinear.from_linear`. Blocks that were dead start at zero, unless "fresh".
        """
        self.take_topology(choose_topology(self._matrices(), density, self.block_size, keep), keep)

    @torch.no_grad()
    def take_topology(self, topology: Topology, keep: str | Tensor) -> None:
        """Take the live blocks of another topology of this geometry, in place, and the values that `keep` says."""
        matrices = self._matrices()
        self.topology.replace(*topology.layout.coordinates())
        self.topology.adoptions += 1
        self._resize(self.topology.num_slots)
        self._fill(matrices, keep)

    @torch.no_grad()
    def take_blocks(self, matrices: Tensor) -> None:
        """Take the weight's values out of dense matrices [groups, out / groups, in / groups]."""
        want = (self.groups, *(size // self.groups for size in self.topology.shape))
        if not isinstance(matrices, Tensor) or matrices.shape != want or not matrices.is_floating_point():
            got = f"{matrices.dtype} {tuple(matrices.shape)}" if isinstance(matrices, Tensor) else f"{matrices!r}"
            raise ValueError(f"take_blocks: matrices must be real numbers {want}, got {got}")
        self.weight.copy_(gather(_pad_to_blocks(matrices, self.block_size), self.topology.layout))

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """W as a dense [out_features, in_features] matrix; block-diagonal with groups."""
        return torch.block_diag(*self._matrices())

    def to_bsr(self) -> Tensor:
        """W as a torch.sparse_bsr tensor [out_features, in_features]; block-diagonal with groups.

        Raises:
            ValueError: the layer is padded inside; torch has no BSR tensor whose last blocks are cut off.
        """
        if self._padded():
            raise ValueError(
                f"to_bsr: shape {self.topology.shape} in {self.groups} groups is no multiple of block_size "
                f"{self.block_size}; use to_scipy() or to_dense()"
            )
        parts, device = self._compressed(), self.weight.device
        return torch.sparse_bsr_tensor(*parts, size=self.topology.shape, device=device, check_invariants=True)

    def to_scipy(self):
        """W on the host: a scipy.sparse.bsr_matrix; a csr_matrix if block_size is 1 or the layer is padded inside.

        16-bit values become float32, which scipy can hold.
        """
        from scipy.sparse import bsr_matrix, csr_matrix

        starts, cols, blocks = (t.cpu() for t in self._compressed())
        if blocks.dtype in (torch.float16, torch.bfloat16):
            blocks = blocks.float()
        arrays = (blocks.numpy(), cols.numpy(), starts.numpy())
        grid_shape = tuple(n * self.block_size for n in self.topology.grid)
        if self.block_size == 1:
            return csr_matrix((arrays[0].ravel(), *arrays[1:]), shape=grid_shape)
        matrix = bsr_matrix(arrays, shape=grid_shape)
        if self._padded():
            matrix = matrix.tocsr()[self._real_lanes(0).numpy()][:, self._real_lanes(1).numpy()]
        return matrix

    def to_cupy(self):
        """W as a cupyx.scipy.sparse.csr_matrix on the current CUDA device (cupy has no BSR), float32 for 16-bit values.

        Raises:
            RuntimeError: cupy is not installed.
        """
        try:
            from cupyx.scipy.sparse import csr_matrix
        except ImportError as error:
            raise RuntimeError(
                "to_cupy: cupy is not installed; pip install 'sparsekern[cupy]', or use to_scipy()"
            ) from error
        return csr_matrix(self.to_scipy().tocsr())

    @classmethod
    @torch.no_grad()
    def _from_dense(cls, dense: nn.Module, density: float | list[int], block_size: int, keep: str | Tensor) -> Self:
        """The sparse layer of the options, dtype, device and mode of a dense one; `density` as in `set_density`."""
        want = cls._dense_type()
        if not isinstance(dense, want):
            raise TypeError(f"{cls.__name__}: wants an nn.{want.__name__} to convert, got {type(dense).__name__}")
        if is_lazy(dense.weight):
            raise ValueError(f"{cls.__name__}: {type(dense).__name__} is lazy and has no shape yet; run it once")
        _check_mask(keep)
        groups = getattr(dense, "groups", 1)
        matrices = dense.weight.detach().reshape(groups, dense.weight.shape[0] // groups, -1)
        if isinstance(keep, Tensor) and keep.shape == dense.weight.shape:
            keep = keep.reshape(matrices.shape)
        layer = cls._like(dense, choose_topology(matrices, density, block_size, keep))
        if layer.bias is not None and not _is_fresh(keep):
            layer.bias.copy_(dense.bias)
        layer._fill(matrices, keep)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(getattr(dense, name).requires_grad)
        return layer.train(dense.training)

    def _fill(self, matrices: Tensor, keep: str | Tensor) -> None:
        """Give the slots their values: out of dense matrices [groups, out, in], or new ones."""
        if _is_fresh(keep):
            self.reset_parameters()
            return
        if isinstance(keep, Tensor) and keep.shape[-2:] == matrices.shape[-2:]:
            matrices = matrices * keep.to(matrices.device)
        self.take_blocks(matrices)

    def _matrices(self) -> Tensor:
        """The dense matrices [groups, out / groups, in / groups], unpadded."""
        out, into = (size // self.groups for size in self.topology.shape)
        return densify(self.weight.detach(), self.topology.layout)[:, :out, :into]

    def _padded(self) -> bool:
        return any(size // self.groups % self.block_size for size in self.topology.shape)

    def _real_lanes(self, side: int) -> Tensor:
        """int64 on the host: the unpadded rows (side 0) or columns (side 1) among those of the grid."""
        lanes = torch.arange(self.topology.grid[side] * self.block_size, device="cpu").view(self.groups, -1)
        return lanes[:, : self.topology.shape[side] // self.groups].flatten()

    def _compressed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row starts [block rows + 1], block columns and blocks of the live slots, sorted by (row, column)."""
        layout = self.topology.layout
        rows, cols = (own.long() for own in layout.coordinates())
        live = (rows >= 0).nonzero().squeeze(1)
        slots = live[(rows * self.topology.grid[1] + cols)[live].argsort()]
        starts = F.pad(torch.bincount(rows[slots], minlength=self.topology.grid[0]).cumsum(0), (1, 0))
        return starts, cols[slots], self.weight.detach()[slots]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # all that can be wrong is found before anything is changed: a refused checkpoint leaves the layer as it was
        weight, rows = state_dict.get(prefix + "weight"), state_dict.get(prefix + "topology.block_rows")
        if prefix + "weight" in state_dict:
            self._check_weight(prefix, weight)
        adopts = self.topology.check_checkpoint(state_dict, prefix + "topology.")
        if self.bias is not None and prefix + "bias" in state_dict:
            self._check_bias(prefix, state_dict[prefix + "bias"])
        if weight is None:
            if adopts and not self.topology.is_at(rows, state_dict[prefix + "topology.block_cols"]):
                raise ValueError(
                    f"load_state_dict: the checkpoint has another topology than the layer, but no {prefix}weight; "
                    "the layer's weights would be in the wrong places"
                )
        else:
            num_slots = len(rows) if adopts else self.topology.num_slots
            if len(weight) != num_slots:
                raise ValueError(f"load_state_dict: {prefix}weight has {len(weight)} slots, its topology {num_slots}")
            if weight.shape != self.weight.shape:
                self._resize(len(weight))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_weight(self, prefix: str, weight: Tensor) -> None:
        """Refuse what are no blocks of this layer's size."""
        _check_numbers(prefix + "weight", weight)
        if weight.dim() != 3 or weight.shape[1:] != self.weight.shape[1:]:
            want = ("num_slots", *self.weight.shape[1:])
            hint = "; convert a dense one with SparseLinear.from_linear" if weight.dim() == 2 else ""
            raise ValueError(
                f"load_state_dict: {prefix}weight must have shape ({', '.join(map(str, want))}), "
                f"the checkpoint's has {tuple(weight.shape)}{hint}"
            )

    def _check_bias(self, prefix: str, bias: Tensor) -> None:
        _check_numbers(prefix + "bias", bias)
        if bias.shape != self.bias.shape:
            want = tuple(self.bias.shape)
            raise ValueError(f"load_state_dict: {prefix}bias must have shape {want}, got {tuple(bias.shape)}")

    @torch.no_grad()
    def _resize(self, num_slots: int) -> None:
        """Give the same Parameter memory for another number of slots."""
        self.weight.set_(self.weight.new_empty(num_slots, self.block_size, self.block_size))
        self.weight.grad = None


def choose_topology(
    matrices: Tensor, density: float | list[int], block_size: int, keep: str | Tensor = "magnitude"
) -> Topology:
    """Choose live blocks of dense matrices [groups, out, in]; arguments as in `SparseLayer.set_density`.

    Raises:
        ValueError: density, block size, the word or the mask's shape is none that is allowed.
    """
    groups, out, into = matrices.shape
    shape = (groups * out, groups * into)
    check_geometry(shape, block_size, groups)
    grid = (groups, -(-out // block_size), -(-into // block_size))
    if isinstance(keep, Tensor):
        _check_mask(keep)
        mask = keep if matrices.is_meta else keep.to(matrices.device)  # on "meta" it would lose its values
        if mask.dim() == 2 and groups == 1:
            mask = mask[None]
        if mask.dtype != torch.bool or mask.shape not in (matrices.shape, grid):
            raise ValueError(
                f"keep: a mask must be boolean of shape {tuple(matrices.shape)} (elements) or {grid} (blocks), "
                f"got {keep.dtype} of shape {tuple(keep.shape)}"
            )
        pruned_away = isinstance(density, list) and density and not any(density)  # as a plan of what GMP left may say
        if not mask.any() and not pruned_away:
            raise ValueError("keep: a mask must be True somewhere, but it is False everywhere; no block would live")
        if mask.shape != grid:
            mask = _block_sums(mask.float(), block_size) > 0
        return Topology.from_mask(mask, shape, block_size)
    if not isinstance(keep, str) or keep not in KEEP:
        raise ValueError(f"keep must be a boolean mask or one of {', '.join(KEEP)}, got {keep!r}")
    num_blocks = grid[1] * grid[2]
    live = live_counts(density, num_blocks, groups)
    if keep != "magnitude" or matrices.is_meta:
        return Topology.random(shape, live, block_size, groups)
    norms = _block_sums(matrices.abs().float(), block_size).flatten(1)
    # Ties, such as places that were dead, go to random places, so that they do not crowd into the first rows.
    shuffle = torch.randperm(num_blocks, device="cpu").to(norms.device)
    ranked = shuffle[norms[:, shuffle].sort(dim=1, descending=True, stable=True).indices]
    mask = torch.zeros_like(norms, dtype=torch.bool)
    for group, count in enumerate(live):
        mask[group, ranked[group, :count]] = True
    return Topology.from_mask(mask.view(grid), shape, block_size)


def _check_numbers(key: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"load_state_dict: {key} must be a tensor of real numbers, got {got}")
    if tensor.layout != torch.strided:
        raise ValueError(f"load_state_dict: {key} must be dense, got {tensor.layout}")


def _is_fresh(keep: str | Tensor) -> bool:
    return isinstance(keep, str) and keep == "fresh"


def _check_mask(keep: object) -> None:
    """Refuse a mask that has no values to read."""
    if isinstance(keep, Tensor) and (keep.layout != torch.strided or keep.is_nested or keep.is_meta):
        kind = "nested" if keep.is_nested else keep.layout
        raise ValueError(f"keep: a mask must be dense and have values, got {kind} on {keep.device}")


def _pad_to_blocks(matrices: Tensor, block_size: int) -> Tensor:
    out, into = matrices.shape[1:]
    return F.pad(matrices, (0, -into % block_size, 0, -out % block_size))


def _block_sums(matrices: Tensor, block_size: int) -> Tensor:
    """[groups, out, in] to sums over the blocks, [groups, rows, cols]."""
    padded = _pad_to_blocks(matrices, block_size)
    return padded.unflatten(2, (-1, block_size)).unflatten(1, (-1, block_size)).sum(dim=(2, 4))
