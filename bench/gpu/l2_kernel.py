"""The kernel that measures the bandwidth from L2; in a file of its own, as Triton need not be installed."""

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
