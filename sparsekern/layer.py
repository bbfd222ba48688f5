"""SparseLayer: what every block-sparse layer holds, a weight in slots, a topology and a bias; and how they load."""

import copy

import torch
from torch import Tensor, nn

from sparsekern.backends.reference import densify
from sparsekern.topology import Topology


class SparseLayer(nn.Module):
    """Base of SparseLinear and SparseConv2d: a block-sparse matrix [out, in] as a parameter. Rules act on its instances."""

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
            topology = Topology.random(shape, float(density), block_size, groups)
        elif topology.shape != shape:
            raise ValueError(
                f"{type(self).__name__}: topology is for shape {topology.shape}, but the layer's is {shape}"
            )
        device = device or torch.get_default_device()
        self.topology = copy.deepcopy(topology).to(device)
        blocks = (topology.num_slots, topology.block_size, topology.block_size)
        self.weight = nn.Parameter(torch.empty(blocks, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None
        )
        self.growth = None
        """A rule that grows by gradient (RigL) hangs its `sparsekern.growth.GrowthScores` here."""
        self.reset_parameters()

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
        """Draw weight and bias anew on the present topology, by the real fan-in of each row; dead slots and padding are 0."""
        fan_in = self.fan_in()
        bound = fan_in.clamp(min=1).rsqrt().to(self.weight.dtype)
        rows = self.topology.block_rows.long().clamp(min=0)
        self.weight.uniform_(-1, 1).mul_(bound[rows][:, None, None]).mul_(self.lanes())
        if self.bias is not None:
            # a row without live blocks has no fan-in of its own: nn.Linear's dense bound keeps its constant output small
            dense = (self.topology.shape[1] // self.groups) ** -0.5
            bound = torch.where(fan_in > 0, bound, dense).repeat_interleave(self.block_size)
            bound = bound.view(self.groups, -1)[:, : self.topology.shape[0] // self.groups].flatten()
            self.bias.uniform_(-1, 1).mul_(bound)

    def fan_in(self) -> Tensor:
        """float32 [block rows]: inputs that the rows of each block row really read, padding not counted."""
        topology = self.topology
        live = topology.block_rows >= 0
        width = self._extent(topology.block_cols, 1) * live
        fan_in = torch.zeros(topology.grid[0], device=width.device)
        return fan_in.index_add_(0, topology.block_rows.long().clamp(min=0), width.float())

    def lanes(self) -> Tensor:
        """Boolean [num_slots, B, B], or [num_slots, 1, 1] where nothing is padded: the elements that stand for a weight."""
        topology = self.topology
        live = (topology.block_rows >= 0)[:, None, None]
        if all(size // self.groups % self.block_size == 0 for size in topology.shape):
            return live
        lane = torch.arange(self.block_size, device=live.device)
        rows = lane < self._extent(topology.block_rows, 0)[:, None]
        cols = lane < self._extent(topology.block_cols, 1)[:, None]
        return live & rows[:, :, None] & cols[:, None, :]

    def _extent(self, blocks: Tensor, side: int) -> Tensor:
        """How many unpadded lanes each of these block rows (side 0) or columns (side 1) has."""
        size, count = self.topology.shape[side] // self.groups, self.topology.grid[side] // self.groups
        return (size - blocks.long() % count * self.block_size).clamp(max=self.block_size)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """W as a dense [out_features, in_features] matrix; block-diagonal with groups."""
        dense = densify(self.weight, self.topology.layout)
        out, into = (size // self.groups for size in self.topology.shape)
        return torch.block_diag(*dense[:, :out, :into])

    def _load_from_state_dict(self, state_dict, prefix, *args):
        weight = state_dict.get(prefix + "weight")
        if weight is not None:
            if weight.dim() != 3 or weight.shape[1:] != self.weight.shape[1:]:
                want = ("num_slots", *self.weight.shape[1:])
                hint = "; convert a dense one with SparseLinear.from_linear" if weight.dim() == 2 else ""
                raise ValueError(
                    f"load_state_dict: {prefix}weight must have shape ({', '.join(map(str, want))}), "
                    f"the checkpoint's has {tuple(weight.shape)}{hint}"
                )
            # all that can be wrong is found before anything is changed: a refused checkpoint leaves the layer as it was
            self.topology.check_checkpoint(state_dict, prefix + "topology.")
            rows = state_dict.get(prefix + "topology.block_rows")
            if rows is not None and len(rows) != len(weight):
                raise ValueError(f"load_state_dict: {prefix}weight has {len(weight)} slots, its topology {len(rows)}")
            if weight.shape != self.weight.shape and rows is not None:
                with torch.no_grad():  # adopt the checkpoint's number of slots in the same Parameter
                    self.weight.set_(self.weight.new_empty(weight.shape))
                    self.weight.grad = None
        super()._load_from_state_dict(state_dict, prefix, *args)
