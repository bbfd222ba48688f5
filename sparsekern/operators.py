"""The two products on 2-D operands of whole blocks: routes, gradients, registration with torch.library.

The gradients of each product are again products: of y = x Wᵀ, dx = dy W is a dds and dW = dyᵀx on the live blocks an
sdd. There are three routes to a backend, all with the same gradients:

* plain tensors in eager mode call it directly, under an autograd Function where a gradient is wanted. That costs 13
  microseconds a call where the dispatcher takes 25;
* torch.func's transforms and forward-mode differentiation take a Function that can be batched and differentiated;
* everything else (torch.compile, tracing, fake and other modes, subclasses) takes the registered operators
  `sparsekern::dds` and `sparsekern::sdd`.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.utils.flop_counter import register_flop_formula

from sparsekern import choose, quick
from sparsekern.agreement import catch_up, is_current
from sparsekern.backends import dense
from sparsekern.geometry import check_block_size
from sparsekern.layout import Layout

_LEGACY_VMAP = torch._C._dispatch_key_parse("VmapMode")


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors, and nothing watches or transforms what happens to them."""
    for tensor in tensors:
        if tensor is not None and type(tensor) not in quick.PLAIN:
            return False
    return not is_watched()


def is_watched() -> bool:
    """Whether something watches or transforms what happens to tensors, ordinary ones too."""
    return (
        torch._C._len_torch_dispatch_stack()  # FakeTensorMode, make_fx, FlopCounterMode, ...
        or in_transform()
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
        or torch._C._dispatch_tls_is_dispatch_key_included(_LEGACY_VMAP)  # torch.autograd.grad(is_grads_batched=True)
    )


def in_transform() -> bool:
    """Whether torch.func is at work (grad, vmap, jvp, ...), or forward-mode differentiation."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def dds(
    x: Tensor, weight: Tensor, bias: Tensor | None, token_offsets: Tensor | None, layout: Layout, transpose: bool
) -> Tensor:
    """x W, or x Wᵀ + bias, by whichever route the operands and what is going on around them allow."""
    if torch.compiler.is_compiling() or not is_plain(x, weight, bias, token_offsets):
        if not torch.compiler.is_compiling() and in_transform():
            return TransformedDds.apply(x, weight, bias, token_offsets, layout, transpose)
        return torch.ops.sparsekern.dds(x, weight, bias, token_offsets, *layout, transpose)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return Dds.apply(x, weight, bias, token_offsets, layout, transpose)
    if quick.is_open() and (y := quick.dds(x, weight, bias, token_offsets, layout, transpose)) is not None:
        return y
    backend = choose.backend_for("dds", x, layout, token_offsets)
    return _multiply(backend, x, weight, bias, token_offsets, layout, transpose)


def quick_dds(
    x: Tensor, weight: Tensor, bias: Tensor | None, token_offsets: Tensor | None, layout: Layout, transpose: bool
) -> Tensor | None:
    """dds by the short way, with gradients, on x [..., features]; None where it must go the long way."""
    if is_watched() or not quick.is_open():
        return None
    y = quick.dds(x, weight, bias, token_offsets, layout, transpose)
    if y is None or not torch.is_grad_enabled():
        return y
    if x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad):
        walk = layout, layout.index.built_from[2], transpose
        return _apply_quick_dds(x, weight, bias, token_offsets, walk, [y])
    return y


def _multiply(backend, x, weight, bias, token_offsets, layout, transpose) -> Tensor:
    """By the backend that was chosen, which a GPU remembers for the short way."""
    product = backend.dds
    y = product(x, weight, layout, bias, transpose, token_offsets)
    if product.__module__ == quick.LAUNCHERS and token_offsets is None:
        quick.learn_dds(x, weight, layout, bias, transpose)
    return y


def sdd(dy: Tensor, x: Tensor, token_offsets: Tensor | None, layout: Layout) -> Tensor:
    """The live blocks of dyᵀx, by the same routes."""
    if torch.compiler.is_compiling() or not is_plain(dy, x, token_offsets):
        if not torch.compiler.is_compiling() and in_transform():
            return TransformedSdd.apply(dy, x, token_offsets, layout)
        return torch.ops.sparsekern.sdd(dy, x, token_offsets, *layout)
    if torch.is_grad_enabled() and (dy.requires_grad or x.requires_grad):
        return Sdd.apply(dy, x, token_offsets, layout)
    if quick.is_open() and (grad := quick.sdd(dy, x, token_offsets, layout)) is not None:
        return grad
    product = choose.backend_for("sdd", x, layout, token_offsets).sdd
    grad = product(dy, x, layout, token_offsets)
    if product.__module__ == quick.LAUNCHERS and token_offsets is None:
        quick.learn_sdd(dy, x, layout)
    return grad


# Gradients, the same on every route.


def dds_gradients(
    needed: tuple[bool, ...], dy, x, weight, token_offsets, layout: Layout, transpose: bool, matrices=None
):
    """Those of x, weight and bias, None where not needed; `matrices` are the weight's dense ones, if they were kept."""
    need_x, need_weight, need_bias = needed[:3]
    dy = row_major(dy)
    out_side, in_side = (dy, x) if transpose else (x, dy)
    if not need_x:
        dx = None
    elif matrices is None:
        dx = dds(dy, weight, None, token_offsets, layout, not transpose)
    else:
        dx = dense.multiply(dy, matrices, layout, None, not transpose, token_offsets)
    dw = sdd(out_side, in_side, token_offsets, layout) if need_weight else None
    return dx, dw, bias_gradient(dy, token_offsets) if need_bias else None


def sdd_gradients(needed: tuple[bool, ...], grad, dy, x, token_offsets, layout: Layout):
    """Those of dy and x, None where not needed."""
    grad = grad.contiguous()
    d_dy = dds(x, grad, None, token_offsets, layout, True) if needed[0] else None
    d_x = dds(dy, grad, None, token_offsets, layout, False) if needed[1] else None
    return d_dy, d_x


def bias_gradient(dy: Tensor, token_offsets: Tensor | None) -> Tensor:
    if token_offsets is None:
        return dy.sum(0)
    groups = len(token_offsets) - 1
    return dy.new_zeros(groups, dy.shape[1]).index_add_(0, _group_of_token(dy, token_offsets), dy).flatten()


def _group_of_token(x: Tensor, token_offsets: Tensor) -> Tensor:
    return torch.searchsorted(token_offsets[1:], torch.arange(len(x), device=x.device), right=True)


def row_major(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def check_unchanged(layout: Layout, versions: tuple[int, int]) -> None:
    """Refuse a backward whose coordinates are no longer those of its forward: its gradients would be of other blocks.

    Raises:
        RuntimeError: a rule, or something else, has written them since.
    """
    if layout.versions() != versions:
        raise RuntimeError(
            "backward: the topology was rewired, pruned or loaded after the forward whose gradients are wanted; "
            f"its coordinates were at version {versions}, and are at {layout.versions()}. "
            "Call rule.step() after backward() and optimizer.step()"
        )


class Dds(Function):
    """Of plain tensors in eager mode."""

    @staticmethod
    def forward(ctx, x, weight, bias, token_offsets, layout, transpose):
        ctx.walk = layout, layout.versions(), transpose
        backend = choose.backend_for("dds", x, layout, token_offsets)
        if backend is dense and ctx.needs_input_grad[0] and dense.is_kept(x):
            matrices = dense.densify(weight, layout)
            ctx.save_for_backward(x, weight, token_offsets, matrices)
            return dense.multiply(x, matrices, layout, bias, transpose, token_offsets)
        ctx.save_for_backward(x, weight, token_offsets)
        return _multiply(backend, x, weight, bias, token_offsets, layout, transpose)

    @staticmethod
    def backward(ctx, dy):
        layout, versions, transpose = ctx.walk
        check_unchanged(layout, versions)
        x, weight, token_offsets, *kept = ctx.saved_tensors
        if kept and (torch.is_grad_enabled() or choose.backend_for("dds", dy, layout, token_offsets) is not dense):
            kept = ()  # gradients of gradients go through the weight; and a backend may be forced meanwhile
        gradients = dds_gradients(ctx.needs_input_grad, dy, x, weight, token_offsets, layout, transpose, *kept)
        return *gradients, None, None, None


class QuickDds(Function):
    """Of what the short way has multiplied, x [..., features]."""

    @staticmethod
    def forward(ctx, x, weight, bias, token_offsets, walk, made):
        """`made` is a list that holds y: in a list, it is no input of this node."""
        ctx.walk = walk
        ctx.save_for_backward(x, weight, token_offsets)
        return made[0]

    @staticmethod
    def backward(ctx, dy):
        layout, versions, transpose = ctx.walk
        check_unchanged(layout, versions)
        x, weight, token_offsets = ctx.saved_tensors
        leading = dy.shape[:-1]
        if len(leading) > 1:
            dy, x = dy.flatten(0, -2), x.flatten(0, -2)
        dx, dw, db = dds_gradients(ctx.needs_input_grad, dy, x, weight, token_offsets, layout, transpose)
        if len(leading) > 1 and dx is not None:
            dx = dx.reshape(*leading, dx.shape[1])
        return dx, dw, db, None, None, None


# Function.apply itself first looks for torch.func's wrappers, for 2 microseconds; the short way has looked already.
_apply_quick_dds = super(Function, QuickDds).apply


class Sdd(Function):
    """Of plain tensors in eager mode."""

    @staticmethod
    def forward(ctx, dy, x, token_offsets, layout):
        ctx.save_for_backward(dy, x, token_offsets)
        ctx.layout, ctx.versions = layout, layout.versions()
        return choose.backend_for("sdd", x, layout, token_offsets).sdd(dy, x, layout, token_offsets)

    @staticmethod
    def backward(ctx, grad):
        check_unchanged(ctx.layout, ctx.versions)
        return *sdd_gradients(ctx.needs_input_grad, grad, *ctx.saved_tensors, ctx.layout), None, None


# Transforms: batching folds into the tokens where it can, and both products are bilinear.


class TransformedDds(Function):
    """Under torch.func and forward-mode differentiation."""

    @staticmethod
    def forward(x, weight, bias, token_offsets, layout, transpose):
        return torch.ops.sparsekern.dds(x, weight, bias, token_offsets, *layout, transpose)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, token_offsets, layout, ctx.transpose = inputs
        ctx.save_for_backward(x, weight, token_offsets, *layout.tensors)
        ctx.save_for_forward(x, weight, token_offsets, *layout.tensors)
        ctx.geometry = layout.geometry

    @staticmethod
    def backward(ctx, dy):
        x, weight, token_offsets, *tensors = ctx.saved_tensors
        layout = Layout.from_flat((*tensors, *ctx.geometry))
        gradients = dds_gradients(ctx.needs_input_grad, dy, x, weight, token_offsets, layout, ctx.transpose)
        return *gradients, None, None, None

    @staticmethod
    def jvp(ctx, dx, dweight, dbias, *_):
        x, weight, token_offsets, *tensors = ctx.saved_tensors
        layout = Layout.from_flat((*tensors, *ctx.geometry))
        terms = []
        if dx is not None:
            terms.append(dds(dx, weight, None, token_offsets, layout, ctx.transpose))
        if dweight is not None:
            terms.append(dds(x, dweight, None, token_offsets, layout, ctx.transpose))
        if dbias is not None:
            terms.append(_spread(dbias, x, token_offsets))
        return sum(terms[1:], terms[0])

    @staticmethod
    def vmap(info, in_dims, x, weight, bias, token_offsets, layout, transpose):
        operands, dims = (x, weight, bias, token_offsets), in_dims[:4]
        _refuse_batched(in_dims[4])
        return _batched_dds(info.batch_size, dims, operands, lambda *operand: dds(*operand, layout, transpose)), 0


class TransformedSdd(Function):
    """Under torch.func and forward-mode differentiation."""

    @staticmethod
    def forward(dy, x, token_offsets, layout):
        return torch.ops.sparsekern.sdd(dy, x, token_offsets, *layout)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, x, token_offsets, layout = inputs
        ctx.save_for_backward(dy, x, token_offsets, *layout.tensors)
        ctx.save_for_forward(dy, x, token_offsets, *layout.tensors)
        ctx.geometry = layout.geometry

    @staticmethod
    def backward(ctx, grad):
        dy, x, token_offsets, *tensors = ctx.saved_tensors
        layout = Layout.from_flat((*tensors, *ctx.geometry))
        return *sdd_gradients(ctx.needs_input_grad, grad, dy, x, token_offsets, layout), None, None

    @staticmethod
    def jvp(ctx, d_dy, dx, *_):
        dy, x, token_offsets, *tensors = ctx.saved_tensors
        layout = Layout.from_flat((*tensors, *ctx.geometry))
        terms = [] if d_dy is None else [sdd(d_dy, x, token_offsets, layout)]
        if dx is not None:
            terms.append(sdd(dy, dx, token_offsets, layout))
        return sum(terms[1:], terms[0])

    @staticmethod
    def vmap(info, in_dims, dy, x, token_offsets, layout):
        _refuse_batched(in_dims[3])
        return _one_by_one(info.batch_size, in_dims[:3], (dy, x, token_offsets), lambda *o: sdd(*o, layout)), 0


def _spread(bias: Tensor, x: Tensor, token_offsets: Tensor | None) -> Tensor:
    """The bias of every token [tokens, features]."""
    if token_offsets is None:
        return bias.expand(len(x), -1)
    return bias.view(len(token_offsets) - 1, -1)[_group_of_token(x, token_offsets)]


def _batched_dds(size: int, dims: tuple, operands: tuple, product: Callable[..., Tensor]) -> Tensor:
    """A dds for each of `size` batch entries, batch first: one product where only x is batched."""
    x_dim, weight_dim, bias_dim, offsets_dim = dims
    x, weight, bias, token_offsets = operands
    if weight_dim is not None:
        _warn_ensemble()
    if weight_dim is not None or offsets_dim is not None or token_offsets is not None or x_dim is None:
        return _one_by_one(size, dims, operands, product)
    x = x.movedim(x_dim, 0)
    y = product(x.flatten(0, 1), weight, bias if bias_dim is None else None, None)
    y = y.reshape(*x.shape[:2], y.shape[1])
    return y if bias_dim is None else y + bias.movedim(bias_dim, 0)[:, None]


def _one_by_one(size: int, dims: tuple, operands: tuple, product: Callable[..., Tensor]) -> Tensor:
    """A product for each batch entry."""

    def entry(i: int) -> list:
        pairs = zip(operands, dims, strict=True)
        return [operand if dim is None else operand.select(dim, i) for operand, dim in pairs]

    return torch.stack([product(*entry(i)) for i in range(size)])


def _refuse_batched(layout_dims: tuple) -> None:
    if any(dim is not None for dim in layout_dims):
        raise ValueError("vmap: the entries of a batch share one topology, but its tensors are batched")


def _warn_ensemble() -> None:
    warnings.warn(
        "vmap over the weight of a sparse layer: every member computes with the topology of the module that is called; "
        "build the members of an ensemble by copy.deepcopy of one of them, so that they share it",
        stacklevel=2,
    )


# The operators. The arguments after token_offsets are a Layout, unpacked.

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
    layout = Layout.from_flat(layout)
    ctx.save_for_backward(x, weight, token_offsets, *layout.tensors)
    ctx.geometry = layout.geometry


def _dds_backward(ctx, dy):
    x, weight, token_offsets, *tensors = ctx.saved_tensors
    layout = Layout.from_flat((*tensors, *ctx.geometry))
    gradients = dds_gradients(ctx.needs_input_grad, dy, x, weight, token_offsets, layout, ctx.transpose)
    return *gradients, None, *(None for _ in layout), None


def _setup_sdd(ctx, inputs, output):
    dy, x, token_offsets, *layout = inputs
    layout = Layout.from_flat(layout)
    ctx.save_for_backward(dy, x, token_offsets, *layout.tensors)
    ctx.geometry = layout.geometry


def _sdd_backward(ctx, grad):
    dy, x, token_offsets, *tensors = ctx.saved_tensors
    layout = Layout.from_flat((*tensors, *ctx.geometry))
    return *sdd_gradients(ctx.needs_input_grad, grad, dy, x, token_offsets, layout), None, *(None for _ in layout)


def _dds_vmap(info, in_dims, x, weight, bias, token_offsets, *flat):
    dims, layout_dims = in_dims[:4], in_dims[4:-1]
    _refuse_batched(layout_dims[:3])

    def product(*operands: Tensor | None) -> Tensor:
        return torch.ops.sparsekern.dds(*operands, *flat)

    return _batched_dds(info.batch_size, dims, (x, weight, bias, token_offsets), product), 0


def _sdd_vmap(info, in_dims, dy, x, token_offsets, *layout):
    _refuse_batched(in_dims[3:6])

    def product(*operands: Tensor | None) -> Tensor:
        return torch.ops.sparsekern.sdd(*operands, *layout)

    return _one_by_one(info.batch_size, in_dims[:3], (dy, x, token_offsets), product), 0


torch.library.register_autograd("sparsekern::dds", _dds_backward, setup_context=_setup_dds, lib=library)
torch.library.register_autograd("sparsekern::sdd", _sdd_backward, setup_context=_setup_sdd, lib=library)
torch.library.register_vmap("sparsekern::dds", _dds_vmap, lib=library)
torch.library.register_vmap("sparsekern::sdd", _sdd_vmap, lib=library)
