"""The two products of sparse training, dds and sdd: what they take, and how sizes become whole blocks.

`sparsekern.routes` multiplies and differentiates.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsekern import routes
from sparsekern.geometry import INTEGERS
from sparsekern.layout import Layout
from sparsekern.operators import check_rising
from sparsekern.topology import Topology

_SIDES = {False: 0, True: 1}  # of a topology's shape that x has, by `transpose`


class Growth(Protocol):
    """What scores the gradient of W in every backward: RigL's `sparsekern.rewire.growth.GrowthScores`."""

    def watch(self, y: Tensor, x: Tensor, token_offsets: Tensor | None, layout: Layout) -> Tensor:
        """Return y = x Wᵀ unchanged, and score the gradient of W in backward passes that come to it."""


def dds(
    x: Tensor,
    weight: Tensor,
    topology: Topology,
    bias: Tensor | None = None,
    transpose: bool = False,
    token_offsets: Tensor | None = None,
    growth: Growth | None = None,
) -> Tensor:
    """Multiply a dense matrix by a block-sparse one: x W, or x Wᵀ + bias with `transpose`.

    Args:
        x: [..., out_features], or [..., in_features] with `transpose`; any strides.
        weight: [num_slots, B, B], the blocks of W [out_features, in_features] in the topology's slots.
        topology: where the blocks are.
        bias: [out_features]; with `transpose` only.
        token_offsets: [groups + 1] of any integer dtype, for ragged groups: rows token_offsets[g]:token_offsets[g + 1]
            of the 2-D x belong to group g, and x and the result have the features of one group.
        growth: what is to score the gradient of W, with `transpose` only.
    Returns:
        [..., in_features], or [..., out_features] with `transpose`; sums in float32 for 16-bit inputs.
    Raises:
        ValueError: sizes, dtypes or devices do not fit together, or the topology's coordinates were overwritten by
            others that are no topology.
        RuntimeError: in backward, if the topology was rewired since the forward.
    Example:
        >>> topology = Topology.random((64, 32), 0.25, block_size=16)
        >>> dds(torch.randn(5, 32), torch.randn(2, 16, 16), topology, transpose=True).shape
        torch.Size([5, 64])
    """
    try:
        layout = topology.layout
        if not (topology.padded or torch.compiler.is_compiling() or growth is not None and x.dim() != 2):
            y = routes.quick_dds(x, weight, bias, token_offsets, layout, transpose)
            if y is not None:
                return _watched(y, x, weight, token_offsets, layout, growth)
        x, weight, bias = _autocast(x, weight, bias)
        if token_offsets is not None:
            token_offsets = _as_offsets("dds", token_offsets, topology, x)
        _check("dds", topology, x, weight, bias, topology.shape[_SIDES[transpose]], token_offsets)
        if bias is not None and not transpose:
            raise ValueError("dds: bias belongs to x Wᵀ, but transpose is False")
        groups = 1 if token_offsets is not None else topology.groups
        rows, weight = _pad(x, topology, int(transpose), groups), weight.contiguous()
        if bias is not None:
            if topology.shape[0] // topology.groups % topology.block_size:
                bias = _pad(bias, topology, 0, topology.groups).flatten()
            bias = bias.contiguous()
        y = routes.dds(rows, weight, bias, token_offsets, layout, transpose)
        y = _watched(y, rows, weight, token_offsets, layout, growth)
    except (AttributeError, RuntimeError, KeyError, TypeError):  # looking at the types first would cost every call
        _check_types("dds", topology, x=x, weight=weight, bias=bias, token_offsets=token_offsets)
        if not isinstance(transpose, bool):
            raise TypeError(f"dds: transpose must be True or False, got {transpose!r}") from None
        if growth is not None and not hasattr(growth, "watch"):
            raise TypeError(f"dds: growth must have a method watch, got {type(growth).__name__}") from None
        raise
    y = _crop(y, topology, int(not transpose), groups)
    return y if x.dim() == 2 else y.reshape(x.shape[:-1] + y.shape[1:])


def sdd(dy: Tensor, x: Tensor, topology: Topology, token_offsets: Tensor | None = None) -> Tensor:
    """Multiply two dense matrices, dyᵀ x, computing only the live blocks of the result.

    Args:
        dy, x: [..., out_features] and [..., in_features] with equal leading sizes; any strides.
        topology: live blocks of an [out_features, in_features] matrix.
        token_offsets: as in `dds`.
    Returns:
        [num_slots, B, B] in the topology's slots, summed in float32 for 16-bit inputs; dead slots are zero.
    Raises:
        ValueError: as `dds`.
    Example:
        >>> topology = Topology.random((64, 32), 0.25, block_size=16)
        >>> sdd(torch.randn(5, 64), torch.randn(5, 32), topology).shape
        torch.Size([2, 16, 16])
    """
    try:
        dy, x = _autocast(dy, x)
        if token_offsets is not None:
            token_offsets = _as_offsets("sdd", token_offsets, topology, x)
        _check("sdd", topology, dy, x, None, topology.shape[0], token_offsets)
        _check("sdd", topology, x, dy, None, topology.shape[1], token_offsets)
        if dy.shape[:-1] != x.shape[:-1]:
            raise ValueError(f"sdd: dy has {tuple(dy.shape[:-1])} tokens, but x has {tuple(x.shape[:-1])}")
        groups = 1 if token_offsets is not None else topology.groups
        dy, x = _pad(dy, topology, 0, groups), _pad(x, topology, 1, groups)
        return routes.sdd(dy, x, token_offsets, topology.layout)
    except (AttributeError, RuntimeError):
        _check_types("sdd", topology, dy=dy, x=x, token_offsets=token_offsets)
        raise


def _watched(y, x, weight, token_offsets, layout: Layout, growth: Growth | None) -> Tensor:
    if growth is None or not (y.requires_grad and weight.requires_grad):
        return y
    return growth.watch(y, x, token_offsets, layout)


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast to the autocast dtype of the first tensor's device where autocast is on, as nn.Linear's operands are."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    wide = torch.float64  # stays as it is, as do numbers that are not floating-point: those are refused, not cut off
    return tuple(t if t is None or t.dtype == wide or not t.is_floating_point() else t.to(dtype) for t in tensors)


def _check(
    name: str,
    topology: Topology,
    x: Tensor,
    other: Tensor,
    bias: Tensor | None,
    features: int,
    token_offsets: Tensor | None,
):
    ragged = token_offsets is not None
    if ragged:
        features //= topology.groups
    if x.shape[-1:] != (features,):
        side = f"{features} features" + (" (of one group)" if ragged else "")
        raise ValueError(
            f"{name}: topology of shape {topology.shape} wants {side} in the last axis, got {tuple(x.shape)}"
        )
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name}: operands must be real floating-point numbers, got {x.dtype}")
    for operand in (other,) if bias is None else (other, bias):
        if operand.dtype != x.dtype:
            raise ValueError(f"{name}: operands must have one dtype, got {x.dtype} and {operand.dtype}")
        if operand.device != x.device:
            raise ValueError(f"{name}: operands must be on one device, got {x.device} and {operand.device}")
    if name == "dds" and other.shape != (topology.num_slots, topology.block_size, topology.block_size):
        want = (topology.num_slots, topology.block_size, topology.block_size)
        raise ValueError(f"dds: topology wants a weight of shape {want}, got {tuple(other.shape)}")
    if topology.index.device != x.device:
        raise ValueError(f"{name}: operands are on {x.device}, but the topology is on {topology.index.device}")
    if bias is not None and bias.shape != topology.shape[:1]:
        raise ValueError(
            f"{name}: topology of shape {topology.shape} wants {topology.shape[0]} biases, got {tuple(bias.shape)}"
        )


def _check_types(name: str, topology: object, **operands: object) -> None:
    """Say which argument is none that can be multiplied, after something failed."""
    if not isinstance(topology, Topology):
        raise TypeError(f"{name}: topology must be a sparsekern.Topology, got {type(topology).__name__}")
    for what, operand in operands.items():
        if operand is None and what in ("bias", "token_offsets"):
            continue
        if not isinstance(operand, Tensor):
            raise TypeError(f"{name}: {what} must be a tensor, got {type(operand).__name__}") from None
        if operand.is_nested:
            raise ValueError(
                f"{name}: {what} must be one tensor, got a nested one; pad it, or multiply its parts"
            ) from None
        if operand.layout != torch.strided:
            raise ValueError(f"{name}: {what} must be dense, got {operand.layout}") from None


def _as_offsets(name: str, token_offsets: Tensor, topology: Topology, x: Tensor) -> Tensor:
    """The offsets as kernels read them: int32 or int64, side by side; refused if they cannot be."""
    if token_offsets.dtype not in INTEGERS:
        raise ValueError(f"{name}: token_offsets must be integers, got {token_offsets.dtype}")
    if token_offsets.shape != (topology.groups + 1,):
        raise ValueError(
            f"{name}: {topology.groups} groups want {topology.groups + 1} token offsets, "
            f"got {tuple(token_offsets.shape)}"
        )
    if token_offsets.device != x.device:
        raise ValueError(f"{name}: operands are on {x.device}, but token_offsets are on {token_offsets.device}")
    if token_offsets.dtype not in (torch.int32, torch.int64):
        token_offsets = token_offsets.to(torch.int64)
    readable = token_offsets.device.type == "cpu" and not torch.compiler.is_compiling()  # a GPU would synchronise
    if readable and routes.is_plain(token_offsets):
        check_rising(name, token_offsets, x.shape[:-1].numel())
    return token_offsets.contiguous()


def _pad(x: Tensor, topology: Topology, side: int, groups: int) -> Tensor:
    """Flatten to [tokens, features] and pad each group's features to whole blocks."""
    if x.dim() != 2:  # reshaping what needs no reshaping costs a microsecond
        x = x.reshape(-1, x.shape[-1])
    size = topology.shape[side] // topology.groups
    missing = topology.grid[side] // topology.groups * topology.block_size - size
    if missing:
        x = F.pad(x.reshape(x.shape[0], groups, size), (0, missing)).flatten(1)  # vmap has no rule for unflatten
    return routes.row_major(x)


def _crop(y: Tensor, topology: Topology, side: int, groups: int) -> Tensor:
    """Undo `_pad`, but for the leading axes."""
    size = topology.shape[side] // topology.groups
    if size % topology.block_size:
        y = y.reshape(y.shape[0], groups, y.shape[1] // groups)[:, :, :size].flatten(1)
        return y.contiguous()  # callers may view(N, -1) what nn.Linear gives them
    return y
