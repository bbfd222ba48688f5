"""The short way of a product: one call into C++ that looks at the operands, makes the output and multiplies.

It takes plain tensors that fit together. Where they are anything else it answers None: then the long way, through the
checks of `products`, says what is wrong with them, or takes them.

On a GPU all that does not depend on the values of a call (which backend is fastest, the kernel's tile, its grid and
constants) is decided when a product first goes the long way, and is kept for its geometry. On a CPU it depends on the
numbers of slots and tokens only, which are looked at in every call.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled
from torch.nn import functional as F

from sparsekern import choose
from sparsekern.backends import cpu, triton
from sparsekern.layout import Layout

PLAIN = (Tensor, nn.Parameter)
"""Classes whose tensors nothing but a mode watches: a subclass may see what happens to it."""
learnt: dict[str, Callable[..., Tensor | None]] = {}
"""C++ functions of a GPU by product: dds(x=, weight=, bias=, layout=, transpose=) and sdd(dy=, x=, layout=). The
dictionary is empty until a GPU has multiplied."""
_add: dict[str, Callable[..., None]] = {}
_known: set[tuple] = set()
LAUNCHERS = "sparsekern.backends.triton.launch"
"""The module whose products can be learnt."""


def is_open() -> bool:
    """Whether plain tensors may go the short way: nothing casts them, and no backend is forced."""
    return not (_is_any_autocast_enabled() or choose.forced() is not None)


def dds(
    x: Tensor, weight: Tensor, bias: Tensor | None, token_offsets: Tensor | None, layout: Layout, transpose: bool
) -> Tensor | None:
    """x Wᵀ + bias or x W of x [..., features], without gradients; None where it must go the long way."""
    if learnt and token_offsets is None:
        y = learnt["dds"](x=x, weight=weight, bias=bias, layout=layout, transpose=transpose)
        if y is not None:
            return y
    if layout.full and layout.block_size == 1:
        return _by_linear(x, weight, bias, token_offsets, layout, transpose)
    if choose.is_surely_for_cpu(x, layout):
        return cpu.quick_dds(x, weight, layout, bias, transpose, token_offsets)
    return None


def _by_linear(x, weight, bias, token_offsets, layout: Layout, transpose: bool) -> Tensor | None:
    """By the vendor's GEMM, which nothing beats where the store is the dense matrix itself; on any device."""
    bare = bias is None
    if token_offsets is not None or layout.groups > 1 or not (type(x) in PLAIN and type(weight) in PLAIN):
        return None
    rows, cols, dtype = layout.num_rows, layout.num_cols, x.dtype
    try:
        fit = (
            x.layout is torch.strided and x.dim() > 1 and x.shape[-1] == (cols if transpose else rows)
            and dtype.is_floating_point and weight.dtype is dtype and weight.shape == (rows * cols, 1, 1)
            and x.device == weight.device == layout.index.device
            and (bare or transpose is True and type(bias) in PLAIN and bias.dtype is dtype and bias.shape == (rows,))
        )  # fmt: skip
        if not fit:
            return None
        with torch.no_grad():  # the product's own node saves the operands
            matrix = weight.view(rows, cols)
            return whole(F.linear(x, matrix if transpose else matrix.t(), bias))
    except RuntimeError:  # a nested tensor, a weight with gaps, a bias elsewhere
        return None


def whole(y: Tensor) -> Tensor:
    """y, as no view of another tensor: in place, autograd lets nobody write a view that was made out of its sight."""
    return y.data if y._is_view() else y


def sdd(dy: Tensor, x: Tensor, token_offsets: Tensor | None, layout: Layout) -> Tensor | None:
    """The live blocks of dyᵀx, without gradients; None where it must go the long way."""
    if learnt and token_offsets is None:
        grad = learnt["sdd"](dy=dy, x=x, layout=layout)
        if grad is not None:
            return grad
    if choose.is_surely_for_cpu(x, layout):
        return cpu.quick_sdd(dy, x, layout, token_offsets)
    return None


def learn_dds(x: Tensor, weight: Tensor, layout: Layout, bias: Tensor | None, transpose: bool) -> None:
    """Keep how Triton's dds has just multiplied these 2-D operands, if that may be repeated for others alike."""
    geometry = _geometry(x, layout, transpose, bias is None)
    if _is_news("dds", geometry, x) and (launches := triton.quick_dds(x, weight, layout, bias, transpose)):
        operands = [
            ("x", "rows", x.shape[1]),
            ("weight", "whole", weight.nbytes),
            ("bias", "nothing", 0) if bias is None else ("bias", "whole", bias.nbytes),
            ("index", "index", 0),
        ]
        outputs = layout.num_rows if transpose else layout.num_cols
        _learn("dds", geometry, x, launches, operands, outputs * layout.block_size, ())


def learn_sdd(dy: Tensor, x: Tensor, layout: Layout) -> None:
    """Likewise for Triton's sdd."""
    geometry = _geometry(x, layout)
    if _is_news("sdd", geometry, x) and (launches := triton.quick_sdd(dy, x, layout)):
        operands = [
            ("dy", "rows", dy.shape[1]),
            ("x", "rows", x.shape[1]),
            ("index", "index", 0),
            ("block_rows", "block_rows", layout.block_rows.nbytes),
        ]
        _learn("sdd", geometry, x, launches, operands, 0, (layout.num_slots, layout.block_size, layout.block_size))


def forget() -> None:
    """Decide everything anew: for whoever changes tiles or break-evens while a process runs."""
    learnt.clear()
    _add.clear()
    _known.clear()


def _geometry(x: Tensor, layout: Layout, transpose: bool = False, bare: bool = True) -> tuple:
    """What decides how operands like x are multiplied, but for addresses and the number of tokens, as C++ takes it."""
    precision = torch.get_float32_matmul_precision() if x.dtype is torch.float32 else ""
    return x.dtype, precision, x.get_device(), layout.index.nbytes, layout.geometry, transpose, bare


def _is_news(product: str, geometry: tuple, x: Tensor) -> bool:
    """Whether a geometry was not met before with about this number of tokens; and Triton was chosen, not forced."""
    return len(x) > 0 and choose.forced() is None and (product, geometry, x.shape[0].bit_length()) not in _known


def _learn(
    product: str, geometry: tuple, x: Tensor, launches: tuple, operands: list, features: int, blocks: tuple
) -> None:
    if not learnt:
        learnt["dds"], _add["dds"], learnt["sdd"], _add["sdd"] = triton.quick_products()
    bits = x.shape[0].bit_length()
    _known.add((product, geometry, bits))
    launch, parts, total = launches
    _add[product](
        geometry=geometry, operands=operands, features=features, blocks=blocks,
        bucket=bits - 1, launch=launch, parts=parts, sum=total,
    )  # fmt: skip
