"""`sparsekern::dds` and `sparsekern::sdd`: the two products as operators that torch.library knows.

torch.compile, export, tracing, fake tensors and other modes see these names. Anybody may call them with anything, so
they check all that `sparsekern.products` has checked on the other routes. The arguments after token_offsets are a
Layout, unpacked.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsekern import choose
from sparsekern.agreement import catch_up, is_current
from sparsekern.geometry import check_block_size
from sparsekern.layout import Layout
from sparsekern.routes import (
    batched_dds,
    dds_gradients,
    one_by_one,
    refuse_batched,
    row_major,
    save,
    saved,
    sdd_gradients,
)

LAYOUT_SCHEMA = (
    "Tensor block_rows, Tensor block_cols, Tensor index, "
    "int num_rows, int num_cols, int groups, int block_size, bool full"
)
library = torch.library.Library("sparsekern", "DEF")
library.define(
    f"dds(Tensor x, Tensor weight, Tensor? bias, Tensor? token_offsets, {LAYOUT_SCHEMA}, bool transpose) -> Tensor"
)
library.define(f"sdd(Tensor dy, Tensor x, Tensor? token_offsets, {LAYOUT_SCHEMA}) -> Tensor")


def _dds_kernel(x, weight, bias, token_offsets, *flat):
    *layout, transpose = flat
    layout = checked(Layout.from_flat(layout))
    check_devices("dds", x, weight, bias, token_offsets, layout.index)
    check_operand("dds", "x", x, layout.num_cols if transpose else layout.num_rows, layout, token_offsets)
    if bias is not None and not transpose:
        raise ValueError("dds: bias belongs to x Wᵀ, but transpose is False")
    blocks = (layout.num_slots, layout.block_size, layout.block_size)
    if weight.shape != blocks or weight.dtype != x.dtype:
        raise ValueError(f"dds: weight must be {x.dtype} {blocks}, got {weight.dtype} {tuple(weight.shape)}")
    features = layout.num_rows * layout.block_size
    if bias is not None and (bias.shape != (features,) or bias.dtype != x.dtype):
        raise ValueError(f"dds: bias must be {x.dtype} ({features},), got {bias.dtype} {tuple(bias.shape)}")
    bias = None if bias is None else bias.contiguous()
    backend = choose.backend_for("dds", x, layout, token_offsets)
    return backend.dds(row_major(x), weight.contiguous(), layout, bias, transpose, token_offsets)


def _sdd_kernel(dy, x, token_offsets, *layout):
    layout = checked(Layout.from_flat(layout))
    check_devices("sdd", dy, x, token_offsets, layout.index)
    check_operand("sdd", "dy", dy, layout.num_rows, layout, token_offsets)
    check_operand("sdd", "x", x, layout.num_cols, layout, token_offsets)
    if dy.dtype != x.dtype or len(dy) != len(x):
        raise ValueError(f"sdd: dy is {dy.dtype} of {len(dy)} tokens, but x {x.dtype} of {len(x)}")
    return choose.backend_for("sdd", x, layout, token_offsets).sdd(row_major(dy), row_major(x), layout, token_offsets)


def checked(layout: Layout) -> Layout:
    """A layout that native kernels may follow: one that comes from a Topology, or agrees with itself.

    A caller of the registered operators may mix the tensors of one topology with the numbers of another.
    """
    rows, cols, groups = layout.num_rows, layout.num_cols, layout.groups
    check_block_size(layout.block_size)
    if not (0 < rows < 2**31 and 0 < cols < 2**31) or groups < 1 or rows % groups or cols % groups:
        raise ValueError(
            f"layout: num_rows={rows} and num_cols={cols} must be from 1 to 2**31 - 1 blocks, "
            f"shared equally by groups={groups}"
        )
    check_devices("layout", layout.block_rows, layout.block_cols, layout.index)
    built_for = getattr(layout.index, "built_for", layout.geometry)
    if built_for != layout.geometry:
        raise ValueError(
            "layout: (num_rows, num_cols, groups, block_size, full) must be those of the topology whose index this "
            f"is, {built_for}, got {layout.geometry}"
        )
    if not is_current(layout):
        catch_up(layout)
    return layout


def check_operand(name: str, what: str, x: Tensor, blocks: int, layout: Layout, token_offsets: Tensor | None) -> None:
    if token_offsets is not None:
        blocks //= layout.groups
        if token_offsets.dtype not in (torch.int32, torch.int64) or token_offsets.shape != (layout.groups + 1,):
            got = f"{token_offsets.dtype} {tuple(token_offsets.shape)}"
            raise ValueError(f"{name}: token_offsets must be int32 or int64 ({layout.groups + 1},), got {got}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: {what} must be real floating-point numbers, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] != blocks * layout.block_size:
        want = blocks * layout.block_size
        raise ValueError(f"{name}: {what} must be [tokens, {want}], whole blocks of features, got {tuple(x.shape)}")
    if token_offsets is not None and token_offsets.is_cpu:  # elsewhere reading them would synchronise
        check_rising(name, token_offsets, len(x))


def check_rising(name: str, token_offsets: Tensor, tokens: int) -> None:
    """Refuse offsets, on the CPU, that do not share all tokens out."""
    ends = token_offsets.tolist()
    if ends != sorted(ends) or (ends[0], ends[-1]) != (0, tokens):
        raise ValueError(f"{name}: token_offsets must rise from 0 to {tokens}, the number of tokens, got {ends}")


def check_devices(name: str, x: Tensor, *others: Tensor | None) -> None:
    """Refuse operands of two devices; a single one on "meta" makes torch ask what the result would look like."""
    for other in others:
        if other is not None and other.device != x.device:
            raise ValueError(f"{name}: operands must be on one device, got {x.device} and {other.device}")


for _device in ("CPU", "CUDA"):
    library.impl("dds", _dds_kernel, _device)
    library.impl("sdd", _sdd_kernel, _device)


@torch.library.register_fake("sparsekern::dds", lib=library)
def _(x, weight, bias, token_offsets, *flat):
    *layout, transpose = flat
    layout = Layout.from_flat(layout)
    check_devices("dds", x, weight, bias, token_offsets, *layout.tensors)
    blocks = layout.num_rows if transpose else layout.num_cols
    if token_offsets is not None:
        blocks //= layout.groups
    return x.new_empty(x.shape[0], blocks * layout.block_size)


@torch.library.register_fake("sparsekern::sdd", lib=library)
def _(dy, x, token_offsets, *layout):
    layout = Layout.from_flat(layout)
    check_devices("sdd", dy, x, token_offsets, *layout.tensors)
    return x.new_empty(layout.num_slots, layout.block_size, layout.block_size)


@register_flop_formula(torch.ops.sparsekern.dds)
def _(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """Every token is multiplied with every live block, of one group where groups are ragged: then on average."""
    ragged, (*_, groups, _block_size, _full, _transpose) = args[1] is not None, args
    return 2 * x_shape[0] * math.prod(weight_shape) // (groups if ragged else 1)


@register_flop_formula(torch.ops.sparsekern.sdd)
def _(dy_shape, x_shape, token_offsets, *layout, out_shape=None, **kwargs) -> int:
    """As many as the dds of the same layer."""
    *_, groups, _block_size, _full = layout
    return 2 * dy_shape[0] * math.prod(out_shape) // (groups if token_offsets is not None else 1)


def _setup_dds(ctx, inputs, output):
    x, weight, _, token_offsets, *layout, ctx.transpose = inputs
    save(ctx, Layout.from_flat(layout), x, weight, token_offsets)


def _dds_backward(ctx, dy):
    x, weight, token_offsets, layout = saved(ctx)
    gradients = dds_gradients(ctx.needs_input_grad, dy, x, weight, token_offsets, layout, ctx.transpose)
    return *gradients, None, *(None for _ in layout), None


def _setup_sdd(ctx, inputs, output):
    dy, x, token_offsets, *layout = inputs
    save(ctx, Layout.from_flat(layout), dy, x, token_offsets)


def _sdd_backward(ctx, grad):
    dy, x, token_offsets, layout = saved(ctx)
    return *sdd_gradients(ctx.needs_input_grad, grad, dy, x, token_offsets, layout), None, *(None for _ in layout)


def _dds_vmap(info, in_dims, x, weight, bias, token_offsets, *flat):
    dims, layout_dims = in_dims[:4], in_dims[4:-1]
    refuse_batched(layout_dims[:3])

    def product(*operands: Tensor | None) -> Tensor:
        return torch.ops.sparsekern.dds(*operands, *flat)

    return batched_dds(info.batch_size, dims, (x, weight, bias, token_offsets), product), 0


def _sdd_vmap(info, in_dims, dy, x, token_offsets, *layout):
    refuse_batched(in_dims[3:6])

    def product(*operands: Tensor | None) -> Tensor:
        return torch.ops.sparsekern.sdd(*operands, *layout)

    return one_by_one(info.batch_size, in_dims[:3], (dy, x, token_offsets), product), 0


torch.library.register_autograd("sparsekern::dds", _dds_backward, setup_context=_setup_dds, lib=library)
torch.library.register_autograd("sparsekern::sdd", _sdd_backward, setup_context=_setup_sdd, lib=library)
torch.library.register_vmap("sparsekern::dds", _dds_vmap, lib=library)
torch.library.register_vmap("sparsekern::sdd", _sdd_vmap, lib=library)
