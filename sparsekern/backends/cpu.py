"""The products on a CPU, by the C++ kernels of csrc/cpu. Like `reference`, but float32 and bfloat16 only.

`products` has checked shapes, dtypes and devices; C++ itself refuses tensors that it cannot read. Rows may have any
stride, their elements lie side by side. Results do not depend on the number of threads.
"""

from pathlib import Path

import torch
from torch import Tensor

from sparsekern.layout import Layout

try:
    from sparsekern import _C
except ImportError as error:
    built = any(Path(__file__).parents[1].glob("_C.*"))
    _C, _import_error = None, error if built else "none was built"


OPERATIONS = ("dds", "sdd", "densify", "gather")
DTYPES = (torch.float32, torch.bfloat16)


def unavailable() -> str | None:
    """Why these kernels cannot run here, in a sentence; None when they can."""
    if _C is None:
        return (
            f"sparsekern was installed without its C++ module ({_import_error}); install it again with a C++ compiler."
        )
    return None


def refusal(x: Tensor, layout: Layout) -> str | None:
    """What it takes, where it does not take these operands."""
    if x.device.type == "cpu" and x.dtype in DTYPES:
        return None
    return f"float32 and bfloat16 on a CPU, got {x.dtype} on {x.device}"


def instruction_set() -> str:
    """Name of the vector instructions in use: avx512, avx2 or plain."""
    return _C.instruction_set()


def supported_instruction_sets() -> list[str]:
    """Those of this machine, best first."""
    return _C.supported_instruction_sets()


def set_instruction_set(name: str) -> None:
    """For tests and measurements: the best one is in use from the start."""
    _C.set_instruction_set(name)


def dds(
    x: Tensor,
    weight: Tensor,
    layout: Layout,
    bias: Tensor | None = None,
    transpose: bool = False,
    token_offsets: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias if `transpose`, else y = x W. See `sparsekern.products.dds`; here x is 2-D and padded."""
    blocks = layout.num_rows if transpose else layout.num_cols
    if token_offsets is not None:
        blocks //= layout.groups
    y = x.new_empty(x.shape[0], blocks * layout.block_size)
    _C.dds(
        layout=layout, x=x, weight=weight, bias=bias, y=y, transpose=transpose, token_offsets=token_offsets,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    return y


def quick_dds(
    x: Tensor, weight: Tensor, layout: Layout, bias: Tensor | None, transpose: bool, token_offsets: Tensor | None
) -> Tensor | None:
    """`dds` of x [..., features] that nobody has checked; None where these are not plain tensors that fit together."""
    return _C.quick_dds(
        layout=layout, x=x, weight=weight, bias=bias, transpose=transpose, token_offsets=token_offsets,
        threads=torch.get_num_threads(),
    )  # fmt: skip


def quick_sdd(dy: Tensor, x: Tensor, layout: Layout, token_offsets: Tensor | None) -> Tensor | None:
    """`sdd` likewise."""
    return _C.quick_sdd(layout=layout, dy=dy, x=x, token_offsets=token_offsets, threads=torch.get_num_threads())


def sdd(dy: Tensor, x: Tensor, layout: Layout, token_offsets: Tensor | None = None) -> Tensor:
    """The live blocks of dyᵀx, [num_slots, B, B]. See `sparsekern.products.sdd`; here both are 2-D and padded."""
    grad = x.new_empty(layout.num_slots, layout.block_size, layout.block_size)
    _C.sdd(layout=layout, dy=dy, x=x, grad=grad, token_offsets=token_offsets, threads=torch.get_num_threads())
    return grad


def densify(weight: Tensor, layout: Layout) -> Tensor:
    """Scatter the blocks into dense matrices [groups, out_per_group, in_per_group], padded; dead places are zero."""
    g, b = layout.groups, layout.block_size
    shape = g, layout.num_rows // g * b, layout.num_cols // g * b
    if layout.full and b == 1:
        return weight.view(shape)
    dense = weight.new_empty(shape)
    _C.densify(layout=layout, weight=weight, dense=dense, threads=torch.get_num_threads())
    return dense


def gather(dense: Tensor, layout: Layout) -> Tensor:
    """Collect the blocks [num_slots, B, B] of dense matrices [groups, out_per_group, in_per_group]; dead ones are 0.

    For a full store of block size 1 that is the dense matrix itself, with dead slots cleared in place.
    """
    if layout.full and layout.block_size == 1:
        weight = dense = dense.reshape(-1, 1, 1)
        if not layout.index.numel():
            return weight
    else:
        dense = dense.contiguous()
        weight = dense.new_empty(layout.num_slots, layout.block_size, layout.block_size)
    _C.gather(layout=layout, dense=dense, weight=weight, threads=torch.get_num_threads())
    return weight


def weakest(scores: Tensor, layout: Layout, counts: list[int]) -> Tensor:
    """See `sparsekern.rewire.select.weakest`."""
    slots = torch.empty(sum(counts), dtype=torch.int64, device="cpu")
    scores = scores.float().contiguous()
    _C.weakest(layout=layout, scores=scores, counts=counts, slots=slots)
    return slots


def random_candidates(layout: Layout, count: int, start: int) -> Tensor:
    """See `sparsekern.rewire.select.random_candidates`."""
    keys = torch.empty(layout.groups, count, dtype=torch.int64, device="cpu")
    _C.random_candidates(layout=layout, count=count, start=start, keys=keys)
    return keys


def order_by_group(ids: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, None, None] | None:
    """Token offsets [groups + 1] of int64 ids [tokens], the stable order by group and its inverse.

    The latter are None where tokens stand by group already; all is None where an id is outside of 0 .. groups - 1.
    """
    tokens = ids.shape[0]
    offsets, order, inverse = ids.new_empty(groups + 1 + 2 * tokens).split((groups + 1, tokens, tokens))
    changes = _C.order_by_group(ids=ids, offsets=offsets, order=order, inverse=inverse)
    if changes is None:
        return None
    return (offsets, order, inverse) if changes else (offsets, None, None)
