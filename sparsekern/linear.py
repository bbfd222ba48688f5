"""SparseLinear: nn.Linear whose weight, gradient and optimiser state exist for the live blocks only."""

import torch
from torch import Tensor, nn
from torch.autograd import Function

from sparsekern.backends import cpu
from sparsekern.geometry import INTEGERS
from sparsekern.layer import SparseLayer
from sparsekern.products import dds
from sparsekern.routes import is_plain
from sparsekern.topology import Topology


class SparseLinear(SparseLayer):
    """y = x Wᵀ + b with a block-sparse W [out_features, in_features].

    Args:
        in_features, out_features: sizes as in nn.Linear; of all groups together. Sizes that are no multiple of
            block_size are padded inside (per group); the padding lanes of the weight stay exactly zero.
        bias: learn an additive bias [out_features].
        density: live blocks / all blocks, in (0, 1]; each group has max(1, round(density * blocks)) of them.
        block_size: side of the square blocks, a power of two from 1 (unstructured) to 128.
        groups: G independent matrices in one parameter, as in Conv: x is [..., in_features], group g reads and writes
            the g-th of G equal parts. `layer(x, group=ids)` takes x [..., in_features / G] and one group id per token
            instead.
        topology: live blocks to start from, instead of a random topology of this density.

    Shapes: weight [num_slots, B, B] in the slots of `topology`; bias [out_features]; x [..., in_features].
    Initial values are nn.Linear's, uniform within 1 / sqrt(fan_in), with the real fan-in of each row. torch.nn.init
    would take its fans from the slots' shape, which is not the matrix's: use `sparsekern.init_(layer, function)`.

    Example:
        >>> layer = SparseLinear(1024, 512, density=0.1, block_size=16)
        >>> layer(torch.randn(8, 1024)).shape
        torch.Size([8, 512])
        >>> heads = SparseLinear(3 * 64, 3 * 8, density=0.5, block_size=8, groups=3)  # three task heads, 64 -> 8
        >>> heads(torch.randn(5, 64), group=torch.tensor([2, 0, 0, 1, 2])).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        density: float = 0.1,
        block_size: int = 16,
        groups: int = 1,
        topology: Topology | None = None,
    ):
        shape = (out_features, in_features)
        super().__init__(shape, bias, device, dtype, density, block_size, groups, topology)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        if group is None:
            # nn.Module looks through three dictionaries for an attribute, which takes half a microsecond; a
            # parametrised weight is in none of them
            parameters = self._parameters
            weight, bias = parameters.get("weight"), parameters.get("bias")
            weight, bias = self.weight if weight is None else weight, self.bias if bias is None else bias
            try:
                return dds(x, weight, self._modules["topology"], bias, True, None, self.growth)
            except (RuntimeError, ValueError):  # looking first would cost every call
                if not getattr(x, "is_nested", False):
                    raise
            return self._forward_nested(x)
        if not isinstance(group, Tensor):
            raise TypeError(f"SparseLinear: group must be a tensor of integers, got {type(group).__name__}")
        if group.layout != torch.strided or group.is_nested:
            raise ValueError(f"SparseLinear: group must be dense, got {group.layout}, nested={group.is_nested}")
        if not isinstance(x, Tensor):
            raise TypeError(f"SparseLinear: x must be a tensor, got {type(x).__name__}")
        if group.shape != x.shape[:-1]:
            raise ValueError(
                f"SparseLinear: group must hold one id per token, {tuple(x.shape[:-1])}, got {tuple(group.shape)}"
            )
        if group.dtype not in INTEGERS:
            raise ValueError(f"SparseLinear: group ids must be integers, got {group.dtype}")
        if group.device != x.device:
            raise ValueError(f"SparseLinear: x is on {x.device}, but the group ids are on {group.device}")
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        offsets, order, inverse = _by_group(group.flatten().long().contiguous(), self.groups)
        if order is not None:
            rows = _permute(rows, order, inverse)
        y = dds(rows, self.weight, self.topology, self.bias, True, offsets, self.growth)
        if order is not None:
            y = _permute(y, inverse, order)
        return y if x.dim() == 2 else y.reshape(group.shape + y.shape[1:])

    def _forward_nested(self, x: Tensor) -> Tensor:
        """Of what nn.TransformerEncoder makes of sequences that are padded: one product of all its parts."""
        parts = x.unbind()
        y = self.forward(torch.cat(parts)).split([len(part) for part in parts])
        return torch.nested.as_nested_tensor(list(y), layout=x.layout)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, density: float = 0.1, block_size: int = 16, keep: str | Tensor = "magnitude"
    ) -> "SparseLinear":
        """Build the block-sparse layer of an nn.Linear, with its dtype, device, requires_grad and training mode.

        Args:
            linear: left as it is; nothing is shared with it.
            density: live blocks / all blocks, in (0, 1]; not looked at when `keep` is a mask.
            block_size: power of two from 1 to 128.
            keep: which blocks live. "magnitude": those of largest L1 norm, with their weights and the bias. "random": a
                random topology, with the linear's values and bias. "fresh": a random topology, with weights and bias
                drawn anew for the sparse fan-in; best for training from scratch. Or a boolean mask: [out, in] (a block
                lives if any of its elements is True; its others start at zero), or one entry per block.
        Raises:
            ValueError: an argument is none of these.
        Example:
            >>> SparseLinear.from_linear(nn.Linear(64, 32), density=0.25).topology.num_live
            2
        """
        return cls._from_dense(linear, density, block_size, keep)

    @staticmethod
    def _dense_type() -> type[nn.Module]:
        return nn.Linear

    @classmethod
    def _like(cls, linear: nn.Linear, topology: Topology) -> "SparseLinear":
        weight = linear.weight
        return cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            weight.device,
            weight.dtype,
            topology=topology,
        )

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense nn.Linear of the same function; block-diagonal with groups, for calls without group ids.

        What `layer(x, group=ids)` computes is no nn.Linear; take `to_dense()` apart by groups for that.
        """
        weight = self.to_dense()
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, weight.device, weight.dtype)
        linear.weight.copy_(weight).requires_grad_(self.weight.requires_grad)
        if self.bias is not None:
            linear.bias.copy_(self.bias).requires_grad_(self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _by_group(ids: Tensor, groups: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Token offsets [groups + 1] of ids [tokens], the stable order by group and its inverse; None: as they stand.

    Raises:
        ValueError: an id has no group; of ids on a GPU the device says so, later.
    """
    readable = ids.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere reading would synchronise
    if readable and is_plain(ids) and not cpu.unavailable():
        # one pass of C++: for a token or two, the ten operations below take longer than their product
        if found := cpu.order_by_group(ids, groups):
            return found
    sorted_ids, order = torch.sort(ids, stable=True)
    offsets = torch.searchsorted(sorted_ids, torch.arange(groups + 1, device=ids.device))
    inside = (offsets[0] == 0) & (offsets[-1] == len(ids))
    if not readable:
        torch._assert_async(inside, f"SparseLinear: group ids must be in 0..{groups - 1}")
    elif not inside:
        raise ValueError(
            f"SparseLinear: group ids must be in 0..{groups - 1}, got {int(sorted_ids[0])}..{int(sorted_ids[-1])}"
        )
    return offsets, order, torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x[order]."""
    if x.requires_grad and torch.is_grad_enabled():
        if torch.compiler.is_compiling():
            return _Permute.apply(x, order, inverse)
        if is_plain(x, order):  # Function.apply itself would look for transforms again
            return super(Function, _Permute).apply(x, order, inverse)
    return x.index_select(0, order)  # which modes and transforms know


class _Permute(Function):
    """x[order], whose gradient is a gather by the inverse; indexing's own backward would scatter, serially on a CPU."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, dy):
        order, inverse = ctx.saved_tensors
        return _permute(dy, inverse, order), None, None
