"""The kernels that measure the bandwidths of a GPU; in a file of their own, as Triton need not be installed."""

import triton
import triton.language as tl


@triton.jit
def read_kernel(buffer_ptr, sums_ptr, blocks, turns, BLOCK: tl.constexpr):
    """Sum `turns` of the buffer's blocks, so that the loads are needed."""
    program = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for turn in range(turns):
        block = (program * 61 + turn * 17) % blocks  # another order for every program: no two read the same at once
        total += tl.load(buffer_ptr + block * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums_ptr + program, tl.sum(total, 0))


@triton.jit
def copy_kernel(source_ptr, target_ptr, BLOCK: tl.constexpr):
    """A graph makes of `copy_` a node of its own that reaches less than a kernel does."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + offsets, tl.load(source_ptr + offsets))
