"""The two products on 2-D operands of whole blocks: routes to a backend, and gradients.

The gradients of each product are again products: of y = x Wᵀ, dx = dy W is a dds and dW = dyᵀx on the live blocks an
sdd. There are three routes, all with the same gradients:

* plain tensors in eager mode call it directly, under an autograd Function where a gradient is wanted. That costs 13
  microseconds a call where the dispatcher takes 25;
* torch.func's transforms and forward-mode differentiation take a Function that can be batched and differentiated;
* everything else (torch.compile, tracing, fake and other modes, subclasses) takes the operators that
  `sparsekern.operators` makes known to torch.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._functorch import is_gradtrackingtensor
from torch.autograd import Function, forward_ad

from sparsekern import choose, quick
from sparsekern.backends import dense
from sparsekern.layout import Layout

_LEGACY_VMAP = torch._C._dispatch_key_parse("VmapMode")


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors, and nothing watches or transforms what happens to them."""
    for tensor in tensors:
        # a tensor that outlives its torch.func.grad is watched by nothing, but has no memory of its own; that of one
        # with the negative bit (the imaginary part of a conjugate) has its values with the other sign
        if tensor is not None and (type(tensor) not in quick.PLAIN or is_gradtrackingtensor(tensor) or tensor.is_neg()):
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
    made = _short_way(x, weight, bias, token_offsets, layout, transpose)
    if not made:
        with torch.no_grad():
            made = _long_way(x, weight, bias, token_offsets, layout, transpose)
    return _recorded(made, x, weight, bias, token_offsets, (layout, layout.versions(), transpose))


def quick_dds(
    x: Tensor, weight: Tensor, bias: Tensor | None, token_offsets: Tensor | None, layout: Layout, transpose: bool
) -> Tensor | None:
    """dds by the short way, with gradients, on x [..., features]; None where it must go the long way.

    The layout is a topology's of this moment, whose index agrees with the coordinates.
    """
    if is_watched() or x.is_neg() or not (made := _short_way(x, weight, bias, token_offsets, layout, transpose)):
        return None
    return _recorded(made, x, weight, bias, token_offsets, (layout, layout.index.built_from[2], transpose))


def _short_way(x, weight, bias, token_offsets, layout: Layout, transpose: bool) -> tuple[Tensor, ...]:
    """y alone, or nothing if it must go the long way."""
    if quick.is_open() and (y := quick.dds(x, weight, bias, token_offsets, layout, transpose)) is not None:
        return (y,)
    return ()


def _long_way(x, weight, bias, token_offsets, layout: Layout, transpose: bool) -> tuple[Tensor, ...]:
    """y by the backend that is chosen, and the weight's dense matrices where a backward is to have them."""
    backend = choose.backend_for("dds", x, layout, token_offsets)
    if backend is dense and x.requires_grad and dense.is_kept(x):
        matrices = dense.densify(weight, layout)
        return quick.whole(dense.multiply(x, matrices, layout, bias, transpose, token_offsets)), matrices
    product = backend.dds
    y = product(x, weight, layout, bias, transpose, token_offsets)
    if product.__module__ == quick.LAUNCHERS and token_offsets is None:
        quick.learn_dds(x, weight, layout, bias, transpose)
    return (quick.whole(y),)


def _recorded(made: tuple[Tensor, ...], x, weight, bias, token_offsets, walk: tuple) -> Tensor:
    """y, with its node in the graph of gradients if one is wanted."""
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        # Function.apply itself would look for torch.func's wrappers, for 2 microseconds; the routes have looked
        return super(Function, Dds).apply(x, weight, bias, token_offsets, walk, made)
    return made[0]


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
    return quick.whole(grad)


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
    return dy.new_zeros(groups, dy.shape[1]).index_add_(0, _group_of_token(dy, token_offsets), dy).view(-1)


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
    """Of plain tensors in eager mode, whose product is made already; x is [..., features]."""

    @staticmethod
    def forward(ctx, x, weight, bias, token_offsets, walk, made):
        """`walk` is (layout, versions, transpose); `made` is y and perhaps the weight's dense matrices.

        In a tuple, they are no inputs of this node.
        """
        y, *kept = made
        ctx.walk = walk
        ctx.save_for_backward(x, weight, token_offsets, *kept)
        return y

    @staticmethod
    def backward(ctx, dy):
        layout, versions, transpose = ctx.walk
        check_unchanged(layout, versions)
        x, weight, token_offsets, *kept = ctx.saved_tensors
        leading = dy.shape[:-1]
        if len(leading) > 1:
            dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])  # a batch of gradients has no flatten
        if kept and (torch.is_grad_enabled() or choose.backend_for("dds", dy, layout, token_offsets) is not dense):
            kept = ()  # gradients of gradients go through the weight; and a backend may be forced meanwhile
        dx, dw, db = dds_gradients(ctx.needs_input_grad, dy, x, weight, token_offsets, layout, transpose, *kept)
        if len(leading) > 1 and dx is not None:
            dx = dx.reshape(*leading, dx.shape[1])
        return dx, dw, db, None, None, None


class Sdd(Function):
    """Of plain tensors in eager mode."""

    @staticmethod
    def forward(ctx, dy, x, token_offsets, layout):
        ctx.save_for_backward(dy, x, token_offsets)
        ctx.layout, ctx.versions = layout, layout.versions()
        return sdd(dy, x, token_offsets, layout)  # without gradients, as all that a Function's forward does

    @staticmethod
    def backward(ctx, grad):
        check_unchanged(ctx.layout, ctx.versions)
        return *sdd_gradients(ctx.needs_input_grad, grad, *ctx.saved_tensors, ctx.layout), None, None


# Where torch wants to know of every tensor that is kept, those of the layout are saved with the operands.


def save(ctx, layout: Layout, *operands: Tensor | None) -> None:
    """Keep operands and layout for the backward."""
    ctx.save_for_backward(*operands, *layout.tensors)
    ctx.geometry = layout.geometry


def saved(ctx) -> tuple:
    """The operands that were saved, and the layout."""
    *operands, rows, cols, index = ctx.saved_tensors
    return *operands, Layout.from_flat((rows, cols, index, *ctx.geometry))


# Transforms: batching folds into the tokens where it can, and both products are bilinear.


class TransformedDds(Function):
    """Under torch.func and forward-mode differentiation."""

    @staticmethod
    def forward(x, weight, bias, token_offsets, layout, transpose):
        return torch.ops.sparsekern.dds(x, weight, bias, token_offsets, *layout, transpose)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, token_offsets, layout, ctx.transpose = inputs
        save(ctx, layout, x, weight, token_offsets)
        ctx.save_for_forward(x, weight, token_offsets, *layout.tensors)

    @staticmethod
    def backward(ctx, dy):
        x, weight, token_offsets, layout = saved(ctx)
        gradients = dds_gradients(ctx.needs_input_grad, dy, x, weight, token_offsets, layout, ctx.transpose)
        return *gradients, None, None, None

    @staticmethod
    def jvp(ctx, dx, dweight, dbias, *_):
        x, weight, token_offsets, layout = saved(ctx)
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
        refuse_batched(in_dims[4])
        return batched_dds(info.batch_size, dims, operands, lambda *operand: dds(*operand, layout, transpose)), 0


class TransformedSdd(Function):
    """Under torch.func and forward-mode differentiation."""

    @staticmethod
    def forward(dy, x, token_offsets, layout):
        return torch.ops.sparsekern.sdd(dy, x, token_offsets, *layout)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, x, token_offsets, layout = inputs
        save(ctx, layout, dy, x, token_offsets)
        ctx.save_for_forward(dy, x, token_offsets, *layout.tensors)

    @staticmethod
    def backward(ctx, grad):
        dy, x, token_offsets, layout = saved(ctx)
        return *sdd_gradients(ctx.needs_input_grad, grad, dy, x, token_offsets, layout), None, None

    @staticmethod
    def jvp(ctx, d_dy, dx, *_):
        dy, x, token_offsets, layout = saved(ctx)
        terms = [] if d_dy is None else [sdd(d_dy, x, token_offsets, layout)]
        if dx is not None:
            terms.append(sdd(dy, dx, token_offsets, layout))
        return sum(terms[1:], terms[0])

    @staticmethod
    def vmap(info, in_dims, dy, x, token_offsets, layout):
        refuse_batched(in_dims[3])
        return one_by_one(info.batch_size, in_dims[:3], (dy, x, token_offsets), lambda *o: sdd(*o, layout)), 0


def _spread(bias: Tensor, x: Tensor, token_offsets: Tensor | None) -> Tensor:
    """The bias of every token [tokens, features]."""
    if token_offsets is None:
        return bias.expand(len(x), -1)
    return bias.view(len(token_offsets) - 1, -1)[_group_of_token(x, token_offsets)]


def batched_dds(size: int, dims: tuple, operands: tuple, product: Callable[..., Tensor]) -> Tensor:
    """A dds for each of `size` batch entries, batch first: one product where only x is batched."""
    x_dim, weight_dim, bias_dim, offsets_dim = dims
    x, weight, bias, token_offsets = operands
    if weight_dim is not None:
        _warn_ensemble()
    if weight_dim is not None or offsets_dim is not None or token_offsets is not None or x_dim is None:
        return one_by_one(size, dims, operands, product)
    x = x.movedim(x_dim, 0)
    y = product(x.flatten(0, 1), weight, bias if bias_dim is None else None, None)
    y = y.reshape(*x.shape[:2], y.shape[1])
    return y if bias_dim is None else y + bias.movedim(bias_dim, 0)[:, None]


def one_by_one(size: int, dims: tuple, operands: tuple, product: Callable[..., Tensor]) -> Tensor:
    """A product for each batch entry."""

    def entry(i: int) -> list:
        pairs = zip(operands, dims, strict=True)
        return [operand if dim is None else operand.select(dim, i) for operand, dim in pairs]

    return torch.stack([product(*entry(i)) for i in range(size)])


def refuse_batched(layout_dims: tuple) -> None:
    if any(dim is not None for dim in layout_dims):
        raise ValueError("vmap: the entries of a batch share one topology, but its tensors are batched")


def _warn_ensemble() -> None:
    warnings.warn(
        "vmap over the weight of a sparse layer: every member computes with the topology of the module that is called; "
        "build the members of an ensemble by copy.deepcopy of one of them, so that they share it",
        stacklevel=2,
    )
