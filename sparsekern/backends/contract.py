"""What every backend offers, and how it says that it cannot.

A backend is a module (`reference`, `dense`, `cpu`, `triton`, `cuda`) with the two functions below and a function for
each operation that it has. Operands are 2-D, padded to whole blocks and checked. No backend falls back to another by
itself: `sparsekern.choose` asks for each operation by itself who takes its operands.

| operation | signature | result |
|---|---|---|
| dds | (x, weight, layout, bias, transpose, token_offsets) | x Wᵀ + bias if `transpose`, else x W |
| sdd | (dy, x, layout, token_offsets) | the live blocks of dyᵀx, [num_slots, B, B]; dead slots are zero |
| block_norms | (dy, x, layout, rows, token_offsets) | squared norms of all blocks of some block rows, float32 |
| add_block_norms | (dy, x, layout, norms, armed, token_offsets) | adds all squared norms to `norms`, where armed |
| densify | (weight, layout) | dense matrices [groups, out_per_group, in_per_group] |
| gather | (dense, layout) | the blocks of dense matrices, [num_slots, B, B] |

`cuda` also has kernels that rewire, which `sparsekern.rewire.on_device` launches.
"""

from typing import Protocol

from torch import Tensor

from sparsekern.layout import Layout

OPERATIONS = ("dds", "sdd", "block_norms", "add_block_norms", "densify", "gather")


class Backend(Protocol):
    OPERATIONS: tuple[str, ...]
    """Those of the contract that it has."""

    def unavailable(self) -> str | None:
        """Why it cannot run here, in a sentence; None when it can."""

    def refusal(self, x: Tensor, layout: Layout) -> str | None:
        """What it takes, where it does not take these operands, to follow "backend 'name' takes"; None if it does."""
