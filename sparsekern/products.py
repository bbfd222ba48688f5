"""The two products of sparse training, dds and sdd: checks, registration with torch.library, autograd.

The gradients of each product are again products: of y = x Wᵀ, dx = dy W is a dds and dW = dyᵀx on the live blocks an
sdd. In eager mode the autograd Functions call the backend directly, which costs 13 microseconds a call where the
dispatcher takes 25; under torch.compile the registered operators `sparsekern::dds` and `sparsekern::sdd` stand in the
graph.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsekern import choose, quick
from sparsekern.topology import Layout, Topology


def dds(
    x: Tensor,
    weight: Tensor,
    topology: Topology,
    bias: Tensor | None = None,
    transpose: bool = False,
    token_offsets: Tensor | None = None,
    growth=None,
) -> Tensor:
    """Multiply a dense matrix by a block-sparse one: x W, or x Wᵀ + bias with `transpose`.

    Args:
        x: [..., out_features], or [..., in_features] with `transpose`; any strides.
        weight: [num_slots, B, B], the blocks of W [out_features, in_features] in the topology's slots.
        topology: where the blocks are.
        bias: [out_features]; with `transpose` only.
        token_offsets: int [groups + 1], for ragged groups: rows token_offsets[g]:token_offsets[g + 1] of the 2-D x
            belong to group g, and x and the result have the features of one group.
        growth: a `sparsekern.growth.GrowthScores` that is to score the gradient of W, with `transpose` only.
    Returns:
        [..., in_features], or [..., out_features] with `transpose`; sums in float32 for 16-bit inputs.
    Raises:
        ValueError: sizes, dtypes or devices do not fit together.
    Example:
        >>> topology = Topology.random((64, 32), 0.25, block_size=16)
        >>> dds(torch.randn(5, 32), torch.randn(2, 16, 16), topology, transpose=True).shape
        torch.Size([5, 64])
    """
    if not torch.compiler.is_compiling() and quick.prepared and token_offsets is None and quick.is_open():
        y = _quick_dds(x, weight, topology, bias, transpose, growth)
        if y is not None:
            return y
    x, weight, bias = _autocast(x, weight, bias)
    _check("dds", topology, x, weight, bias, topology.shape[int(transpose)], token_offsets)
    if bias is not None and not transpose:
        raise ValueError("dds: bias belongs to x Wᵀ, but transpose is False")
    layout = topology.layout
    groups = 1 if token_offsets is not None else topology.groups
    rows, weight = _pad(x, topology, int(transpose), groups), weight.contiguous()
    if bias is not None:
        if topology.shape[0] // topology.groups % topology.block_size:
            bias = _pad(bias, topology, 0, topology.groups).flatten()
        bias = bias.contiguous()
    if torch.compiler.is_compiling():
        y = torch.ops.sparsekern.dds(rows, weight, bias, token_offsets, *layout, transpose)
    elif torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y = _Dds.apply(rows, weight, bias, token_offsets, layout, transpose)
    else:
        y = _multiply(rows, weight, bias, token_offsets, layout, transpose)
    if growth is not None and y.requires_grad:
        y = growth.watch(y, rows, token_offsets, layout)
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
        ValueError: sizes, dtypes or devices do not fit together.
    Example:
        >>> topology = Topology.random((64, 32), 0.25, block_size=16)
        >>> sdd(torch.randn(5, 64), torch.randn(5, 32), topology).shape
        torch.Size([2, 16, 16])
    """
    dy, x = _autocast(dy, x)
    _check("sdd", topology, dy, x, None, topology.shape[0], token_offsets)
    _check("sdd", topology, x, dy, None, topology.shape[1], token_offsets)
    if dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"sdd: dy has {tuple(dy.shape[:-1])} tokens, but x has {tuple(x.shape[:-1])}")
    layout = topology.layout
    groups = 1 if token_offsets is not None else topology.groups
    dy, x = _pad(dy, topology, 0, groups), _pad(x, topology, 1, groups)
    if torch.compiler.is_compiling():
        return torch.ops.sparsekern.sdd(dy, x, token_offsets, *layout)
    return _sdd(dy, x, token_offsets, layout)


def _quick_dds(x, weight, topology, bias, transpose, growth) -> Tensor | None:
    """`dds` by the short way, with gradients; None where it must go the long way."""
    if topology.padded or (growth is not None and x.dim() != 2):
        return None
    layout = topology.layout
    y = quick.dds(x, weight, layout, bias, transpose)
    if y is None or not torch.is_grad_enabled():
        return y
    if x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad):
        y = _apply_dds(x, weight, bias, None, layout, transpose, [y])
        if growth is not None:
            y = growth.watch(y, x, None, layout)
    return y


class _Dds(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, token_offsets, layout, transpose, result=None):
        """`result` is a list that holds y where the short way has made it: in a list, it is no input of this node."""
        ctx.save_for_backward(x, weight, token_offsets)
        ctx.walk = layout, transpose
        return result[0] if result else _multiply(x, weight, bias, token_offsets, layout, transpose)

    @staticmethod
    def backward(ctx, dy):
        x, weight, token_offsets = ctx.saved_tensors
        layout, transpose = ctx.walk
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        leading = dy.shape[:-1]
        if len(leading) > 1:  # of the short way only
            dy, x = dy.flatten(0, -2), x.flatten(0, -2)
        dy = _row_major(dy)
        dx = _dds(dy, weight, token_offsets, layout, not transpose) if need_x else None
        if len(leading) > 1 and need_x:
            dx = dx.unflatten(0, leading)
        out_side, in_side = (dy, x) if transpose else (x, dy)
        dw = _sdd(out_side, in_side, token_offsets, layout) if need_weight else None
        return dx, dw, _bias_gradient(dy, token_offsets) if need_bias else None, None, None, None, None


# Function.apply itself first looks for torch.func's wrappers, for 2 microseconds; the short way has looked already.
_apply_dds = super(torch.autograd.Function, _Dds).apply


class _Sdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, x, token_offsets, layout):
        ctx.save_for_backward(dy, x, token_offsets)
        ctx.layout = layout
        return choose.backend_for(x, layout, token_offsets).sdd(dy, x, layout, token_offsets)

    @staticmethod
    def backward(ctx, grad):
        dy, x, token_offsets = ctx.saved_tensors
        grad = grad.contiguous()
        d_dy = _dds(x, grad, token_offsets, ctx.layout, True) if ctx.needs_input_grad[0] else None
        d_x = _dds(dy, grad, token_offsets, ctx.layout, False) if ctx.needs_input_grad[1] else None
        return d_dy, d_x, None, None


def _dds(x: Tensor, weight: Tensor, token_offsets: Tensor | None, layout: Layout, transpose: bool) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):  # a backward with create_graph=True
        return _Dds.apply(x, weight, None, token_offsets, layout, transpose)
    if quick.prepared and token_offsets is None and quick.is_open():
        y = quick.dds(x, weight, layout, None, transpose)
        if y is not None:
            return y
    return _multiply(x, weight, None, token_offsets, layout, transpose)


def _multiply(x, weight, bias, token_offsets, layout, transpose) -> Tensor:
    """By the backend that is chosen, which a GPU remembers for the short way."""
    chosen = choose.backend_for(x, layout, token_offsets).dds
    y = chosen(x, weight, layout, bias, transpose, token_offsets)
    if chosen.__module__ == quick.LAUNCHERS and token_offsets is None:
        quick.learn_dds(x, weight, layout, bias, transpose)
    return y


def _sdd(dy: Tensor, x: Tensor, token_offsets: Tensor | None, layout: Layout) -> Tensor:
    if torch.is_grad_enabled() and (dy.requires_grad or x.requires_grad):
        return _Sdd.apply(dy, x, token_offsets, layout)
    if quick.prepared and token_offsets is None and quick.is_open():
        grad = quick.sdd(dy, x, layout)
        if grad is not None:
            return grad
    chosen = choose.backend_for(x, layout, token_offsets).sdd
    grad = chosen(dy, x, layout, token_offsets)
    if chosen.__module__ == quick.LAUNCHERS and token_offsets is None:
        quick.learn_sdd(dy, x, layout)
    return grad


def _bias_gradient(dy: Tensor, token_offsets: Tensor | None) -> Tensor:
    if token_offsets is None:
        return dy.sum(0)
    group = torch.searchsorted(token_offsets[1:], torch.arange(len(dy), device=dy.device), right=True)
    return dy.new_zeros(len(token_offsets) - 1, dy.shape[1]).index_add_(0, group, dy).flatten()


# The operators as torch.compile, export and opcheck see them. The arguments after token_offsets are a Layout, unpacked.

LAYOUT_SCHEMA = (
    "Tensor block_rows, Tensor block_cols, Tensor index, "
    "int num_rows, int num_cols, int groups, int block_size, bool full"
)
library = torch.library.Library("sparsekern", "DEF")
library.define(
    f"dds(Tensor x, Tensor weight, Tensor? bias, Tensor? token_offsets, {LAYOUT_SCHEMA}, bool transpose) -> Tensor"
)
library.define(f"sdd(Tensor dy, Tensor x, Tensor? token_offsets, {LAYOUT_SCHEMA}) -> Tensor")


def _dds_op(x, weight, bias, token_offsets, *args):
    layout, transpose = Layout(*args[:-1]), args[-1]
    x = _row_major(x)
    return choose.backend_for(x, layout, token_offsets).dds(
        x, weight.contiguous(), layout, bias, transpose, token_offsets
    )


def _sdd_op(dy, x, token_offsets, *layout):
    layout = Layout(*layout)
    return choose.backend_for(x, layout, token_offsets).sdd(_row_major(dy), _row_major(x), layout, token_offsets)


for _device in ("CPU", "CUDA"):
    library.impl("dds", _dds_op, _device)
    library.impl("sdd", _sdd_op, _device)


@torch.library.register_fake("sparsekern::dds", lib=library)
def _(x, weight, bias, token_offsets, *args):
    layout, transpose = Layout(*args[:-1]), args[-1]
    blocks = layout.num_rows if transpose else layout.num_cols
    if token_offsets is not None:
        blocks //= layout.groups
    return x.new_empty(x.shape[0], blocks * layout.block_size)


@torch.library.register_fake("sparsekern::sdd", lib=library)
def _(dy, x, token_offsets, *layout):
    layout = Layout(*layout)
    return x.new_empty(layout.num_slots, layout.block_size, layout.block_size)


def _setup_dds(ctx, inputs, output):
    x, weight, bias, token_offsets, *layout, ctx.transpose = inputs
    ctx.save_for_backward(x, weight, token_offsets, *layout[:3])
    ctx.geometry, ctx.has_bias = layout[3:], bias is not None


def _dds_backward(ctx, dy):
    x, weight, token_offsets, *tensors = ctx.saved_tensors
    layout = (*tensors, *ctx.geometry)
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    out_side, in_side = (dy, x) if ctx.transpose else (x, dy)
    dx = torch.ops.sparsekern.dds(dy, weight, None, token_offsets, *layout, not ctx.transpose) if need_x else None
    dw = torch.ops.sparsekern.sdd(out_side, in_side, token_offsets, *layout) if need_weight else None
    return dx, dw, _bias_gradient(dy, token_offsets) if need_bias else None, *(10 * (None,))


def _setup_sdd(ctx, inputs, output):
    dy, x, token_offsets, *layout = inputs
    ctx.save_for_backward(dy, x, token_offsets, *layout[:3])
    ctx.geometry = layout[3:]


def _sdd_backward(ctx, grad):
    dy, x, token_offsets, *tensors = ctx.saved_tensors
    layout = (*tensors, *ctx.geometry)
    d_dy = torch.ops.sparsekern.dds(x, grad, None, token_offsets, *layout, True) if ctx.needs_input_grad[0] else None
    d_x = torch.ops.sparsekern.dds(dy, grad, None, token_offsets, *layout, False) if ctx.needs_input_grad[1] else None
    return d_dy, d_x, *(9 * (None,))


torch.library.register_autograd("sparsekern::dds", _dds_backward, setup_context=_setup_dds, lib=library)
torch.library.register_autograd("sparsekern::sdd", _sdd_backward, setup_context=_setup_sdd, lib=library)


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast to the autocast dtype of the first tensor's device where autocast is on, as nn.Linear's operands are."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


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
        _check_offsets(name, topology, token_offsets, x.shape[:-1].numel())
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
    if topology.block_rows.device != x.device:
        raise ValueError(f"{name}: operands are on {x.device}, but the topology is on {topology.block_rows.device}")
    if bias is not None and bias.shape != topology.shape[:1]:
        raise ValueError(
            f"{name}: topology of shape {topology.shape} wants {topology.shape[0]} biases, got {tuple(bias.shape)}"
        )


def _check_offsets(name: str, topology: Topology, token_offsets: Tensor, tokens: int):
    if token_offsets.shape != (topology.groups + 1,):
        raise ValueError(
            f"{name}: {topology.groups} groups want {topology.groups + 1} token offsets, "
            f"got {tuple(token_offsets.shape)}"
        )
    if token_offsets.device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU it would synchronise
        ends = token_offsets.tolist()
        if ends != sorted(ends) or (ends[0], ends[-1]) != (0, tokens):
            raise ValueError(f"{name}: token_offsets must rise from 0 to {tokens}, the number of tokens, got {ends}")


def _pad(x: Tensor, topology: Topology, side: int, groups: int) -> Tensor:
    """Flatten to [tokens, features] and pad each group's features to whole blocks."""
    if x.dim() != 2:  # reshaping what needs no reshaping costs a microsecond
        x = x.reshape(-1, x.shape[-1])
    size = topology.shape[side] // topology.groups
    missing = topology.grid[side] // topology.groups * topology.block_size - size
    if missing:
        x = F.pad(x.unflatten(1, (groups, size)), (0, missing)).flatten(1)
    return _row_major(x)


def _crop(y: Tensor, topology: Topology, side: int, groups: int) -> Tensor:
    """Undo `_pad`, but for the leading axes."""
    size = topology.shape[side] // topology.groups
    if size % topology.block_size:
        y = y.unflatten(1, (groups, y.shape[1] // groups))[:, :, :size].flatten(1)
    return y


def _row_major(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
