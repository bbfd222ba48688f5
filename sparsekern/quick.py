"""The short way of a product on a GPU: one call into C++ that looks at the operands, makes the output and launches.

All that does not depend on the values of a call (which backend is fastest, the kernel's tile, its grid and constants)
is decided when a product first goes the long way, through the checks of `products`, `choose` and Triton, and is kept
for its geometry. Later calls come here first. C++ looks whether the operands are of that geometry, and answers None
where they are not: then the long way says what is wrong with them, or takes them.
"""

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled

from sparsekern import choose
from sparsekern.backends import triton
from sparsekern.topology import Layout

# By geometry: the function that multiplies, and the one that adds a launch for a number of tokens. Only GPUs fill it.
prepared: dict[tuple, tuple] = {}
_learnt: set[tuple] = set()
LAUNCHERS = "sparsekern.backends.triton.launch"
"""The module whose products can be learnt."""


def is_open() -> bool:
    """Whether plain tensors may go the short way: nothing casts them, and no backend is forced."""
    return not (_is_any_autocast_enabled() or choose.forced() is not None)


def dds(x: Tensor, weight: Tensor, layout: Layout, bias: Tensor | None, transpose: bool) -> Tensor | None:
    """x Wᵀ + bias or x W, [..., features], without gradients; None where it must go the long way."""
    product = prepared.get(_key(x, weight.shape[0], layout, transpose, bias is None))
    return product and product[0](x=x, weight=weight, bias=bias, index=layout.index)


def sdd(dy: Tensor, x: Tensor, layout: Layout) -> Tensor | None:
    """The live blocks of dyᵀx, without gradients; None where it must go the long way."""
    product = prepared.get(_key(x, layout.num_slots, layout))
    return product and product[0](dy=dy, x=x, index=layout.index, block_rows=layout.block_rows)


def learn_dds(x: Tensor, weight: Tensor, layout: Layout, bias: Tensor | None, transpose: bool) -> None:
    """Keep how Triton's dds has just multiplied these 2-D operands, if that may be repeated for others alike."""
    key = _key(x, weight.shape[0], layout, transpose, bias is None)
    if _is_news(key, x) and (launches := triton.quick_dds(x, weight, layout, bias, transpose)):
        b, outputs = layout.block_size, layout.num_rows if transpose else layout.num_cols
        operands = [
            ("x", "rows", x.shape[1]),
            ("weight", "whole", weight.numel()),
            ("bias", "nothing", 0) if bias is None else ("bias", "whole", bias.numel()),
            ("index", "bytes", layout.index.nbytes),
        ]
        _learn(key, x, launches, operands, outputs * b, ())


def learn_sdd(dy: Tensor, x: Tensor, layout: Layout) -> None:
    """Likewise for Triton's sdd."""
    key = _key(x, layout.num_slots, layout)
    if _is_news(key, x) and (launches := triton.quick_sdd(dy, x, layout)):
        operands = [
            ("dy", "rows", dy.shape[1]),
            ("x", "rows", x.shape[1]),
            ("index", "bytes", layout.index.nbytes),
            ("block_rows", "bytes", layout.block_rows.nbytes),
        ]
        _learn(key, x, launches, operands, 0, (layout.num_slots, layout.block_size, layout.block_size))


def forget() -> None:
    """Decide everything anew: for whoever changes tiles or break-evens while a process runs."""
    prepared.clear()
    _learnt.clear()


def _key(x: Tensor, num_slots: int, layout: Layout, transpose: bool | None = None, bare: bool | None = None) -> tuple:
    dtype = x.dtype
    if dtype is torch.float32:
        return torch.get_float32_matmul_precision(), x.get_device(), num_slots, layout.geometry, transpose, bare
    return dtype, x.get_device(), num_slots, layout.geometry, transpose, bare


def _is_news(key: tuple, x: Tensor) -> bool:
    """Whether a geometry was not met before with about this number of tokens; and Triton was chosen, not forced."""
    return len(x) > 0 and choose.forced() is None and (key, x.shape[0].bit_length()) not in _learnt


def _learn(key: tuple, x: Tensor, launches: tuple, operands: list, features: int, blocks: tuple) -> None:
    if key not in prepared:
        prepared[key] = triton.quick_product(x, operands, features, blocks)
    _learnt.add((key, x.shape[0].bit_length()))
    launch, parts, total = launches
    prepared[key][1](bucket=x.shape[0].bit_length() - 1, launch=launch, parts=parts, sum=total)
