"""A dense copy of a block-sparse weight that can be differentiated, for what is not one of the two products."""

import torch
from torch import Tensor
from torch.autograd import Function

from sparsekern import choose
from sparsekern.backends import reference
from sparsekern.layout import Layout
from sparsekern.routes import check_unchanged, is_plain


def densify(weight: Tensor, layout: Layout) -> Tensor:
    """Dense matrices [groups, out_per_group, in_per_group] of the blocks, padded; dead slots have no gradient.

    Its backward refuses coordinates that have changed.
    """
    if torch.compiler.is_compiling() or not is_plain(weight):
        dead = layout.dead()
        return reference.densify(weight if dead is None else weight.masked_fill(dead[:, None, None], 0), layout)
    if torch.is_grad_enabled() and weight.requires_grad:
        return _Densify.apply(weight, layout)
    return choose.backend_for("densify", weight, layout).densify(weight, layout)


class _Densify(Function):
    """Of plain tensors in eager mode, with `_Gather` as its gradient, and the other way round."""

    @staticmethod
    def forward(ctx, weight, layout):
        ctx.layout, ctx.versions = layout, layout.versions()
        return choose.backend_for("densify", weight, layout).densify(weight, layout)

    @staticmethod
    def backward(ctx, gradient):
        check_unchanged(ctx.layout, ctx.versions)
        return gather(gradient, ctx.layout), None


def gather(dense: Tensor, layout: Layout) -> Tensor:
    """The blocks of dense matrices in the layout's slots: the gradient of `densify`, differentiable like it."""
    if torch.is_grad_enabled() and dense.requires_grad:
        return _Gather.apply(dense, layout)
    # a full store of single weights is gathered in place, and this gradient is not ours
    own = dense.clone(memory_format=torch.contiguous_format) if layout.full else dense.contiguous()
    return choose.backend_for("gather", dense, layout).gather(own, layout)


class _Gather(Function):
    @staticmethod
    def forward(ctx, dense, layout):
        ctx.layout, ctx.versions = layout, layout.versions()
        return gather(dense, layout)  # without gradients here

    @staticmethod
    def backward(ctx, gradient):
        check_unchanged(ctx.layout, ctx.versions)
        return densify(gradient, ctx.layout), None
