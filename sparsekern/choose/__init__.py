"""Choose which backend answers an operation, and when the vendor's dense GEMM is the faster one.

Each operation is chosen by itself. On a CPU the number of live blocks decides, which costs nothing to read there. On a
GPU the number of slots decides, as reading the live blocks would wait for the device; and the model of `choose.cost`.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparsekern import devices
from sparsekern.backends import cpu, cuda, dense, reference, triton
from sparsekern.backends.contract import Backend
from sparsekern.choose import cost
from sparsekern.layout import Layout

BACKENDS: dict[str, Backend] = {"reference": reference, "dense": dense, "cpu": cpu, "triton": triton, "cuda": cuda}

# Density above which the vendor's GEMM, with its copies, takes less time than the C++ kernels, by block size: where a
# training step of 1024 x 1024 broke even, one thread, 256 or 2048 tokens, whichever came first (bench/bench_paths.py).
# Measured on an AMD EPYC of 2024, where MKL's GEMM uses AVX2.
BREAK_EVEN = {
    "avx512": {1: 0.42, 2: 0.85, 4: 1.0, 8: 1.0, 16: 1.0, 32: 1.0, 64: 1.0, 128: 1.0},
    "avx2": {1: 0.4, 2: 0.6, 4: 0.8, 8: 1.0, 16: 1.0, 32: 1.0, 64: 1.0, 128: 1.0},
    "plain": {1: 0.2, 2: 0.3, 4: 0.4, 8: 0.5, 16: 0.5, 32: 0.5, 64: 0.5, 128: 0.5},  # half of AVX2: not measured
}
# For bfloat16 where the CPU multiplies it in hardware: the vendor's GEMM does, the C++ kernels do not.
BREAK_EVEN_BFLOAT16 = {1: 0.12, 2: 0.2, 4: 0.3, 8: 0.35, 16: 0.35, 32: 0.4, 64: 0.4, 128: 0.4}
# Copying blocks into a dense matrix and back takes about as long as the GEMM of this many tokens.
COPY_TOKENS = 32


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Force a backend for the products called inside: `with sparsekern.use("reference"): ...`.

    It is forced in all threads, since autograd's own make the gradients; of several blocks, the last to begin counts.

    "cuda" also forces the kernels that rewire all layers of a GPU at once. Its products are of blocks of 8 and 16 in 16
    bits; who wants those rewired that have others puts it around `rule.step()` alone.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it is not available here; the message says what is missing.
    """
    entry = (_find(backend),)
    _forcing.append(entry)
    try:
        yield
    finally:  # blocks of several threads end in any order
        _forcing[:] = [other for other in _forcing if other is not entry]


def forced() -> Backend | None:
    """The backend that `use` or SPARSEKERN_BACKEND forces; None where none is."""
    return _forcing[-1][0]


def rewires_by_cuda(device: torch.device) -> bool:
    """Whether the kernels of `cuda` rewire the layers of this device.

    They do where they are forced, and where the device's own table, not that of one like it, says `rewire_by_cuda`; a
    rule that nobody forces leaves to torch what they refuse. Not while a CUDA graph is being captured: a replay would
    copy the event from memory of the host that is gone by then.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return False
    if (wanted := forced()) is not None:
        return wanted is cuda
    return devices.known(torch.cuda.get_device_name(device))["rewire_by_cuda"] and cuda.unavailable(device) is None


def backend_for(operation: str, x: Tensor, layout: Layout, token_offsets: Tensor | None = None) -> Backend:
    """What is to answer an operation of the contract on x; a forced backend where it has that operation.

    Raises:
        RuntimeError: the forced backend does not take these operands.
    """
    wanted = forced()
    if wanted is not None and operation in wanted.OPERATIONS:
        if takes := wanted.refusal(x, layout):
            name = next(name for name, backend in BACKENDS.items() if backend is wanted)
            raise RuntimeError(f"backend {name!r} takes {takes}")
        return wanted
    if x.device.type == "cuda":
        return _on_gpu(operation, x, layout, token_offsets is not None)
    if not _has_kernels(x.device, x.dtype):
        return reference
    if operation not in cpu.OPERATIONS:
        return dense
    if is_surely_for_cpu(x, layout):
        return cpu
    if layout.full:  # GMP asks at its events whether to leave it; counting live blocks here would cost every product
        return dense
    return cpu if _is_sparser(layout, _product_break_even(layout, x)) else dense


def is_surely_for_cpu(x: Tensor, layout: Layout) -> bool:
    """Whether slots and tokens alone say that the C++ kernels multiply x, which nobody has checked."""
    if not x.is_cpu or x.dtype not in cpu.DTYPES or cpu.unavailable():
        return False
    return layout.num_slots <= _most_blocks(layout, _product_break_even(layout, x))


def _product_break_even(layout: Layout, x: Tensor) -> float:
    """Density up to which the C++ kernels multiply x [..., features] faster than a GEMM with its copy of blocks."""
    density = break_even(layout.block_size, x.dtype)
    if layout.full or not x.dim():
        return density
    tokens = x.numel() // max(1, x.shape[-1])
    return density * (1 + COPY_TOKENS / max(1, tokens))


def sparse_is_faster(layout: Layout, dtype: torch.dtype) -> bool:
    """Whether the C++ kernels beat the vendor's GEMM at the present density; reads a CPU tensor, and no other.

    On a GPU, where slots count and not live blocks, a full store is left by a compaction only.
    """
    return _has_kernels(layout.index.device, dtype) and _is_sparser(layout, break_even(layout.block_size, dtype))


def full_store_is_faster(layout: Layout, dtype: torch.dtype) -> bool:
    """Whether a full store, which the vendor's GEMM takes without a copy, is still faster than what is sparse."""
    return layout.full and _has_kernels(layout.index.device, dtype) and not sparse_is_faster(layout, dtype)


def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are C++ kernels for it."""
    return device.type == "cpu" and dtype in cpu.DTYPES and not cpu.unavailable()


@torch.compiler.assume_constant_result
def break_even(block_size: int, dtype: torch.dtype) -> float:
    """Density up to which the C++ kernels take less time than the vendor's GEMM."""
    in_hardware = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (BREAK_EVEN_BFLOAT16 if in_hardware else BREAK_EVEN[cpu.instruction_set()])[block_size]


def _most_blocks(layout: Layout, density: float) -> float:
    """As many as this share of all blocks."""
    return density * layout.num_rows * layout.num_cols / layout.groups


def _is_sparser(layout: Layout, density: float) -> bool:
    """Whether at most this share of the blocks is live.

    The number of slots bounds the live blocks, so the live ones are counted only where that bound decides nothing: a
    network under gradual pruning, between two compactions.
    """
    limit = _most_blocks(layout, density)
    if layout.num_slots <= limit:
        return True
    if layout.full:
        return bool(layout.live().sum() <= limit)
    dead = -layout.block_rows.clamp(max=0).sum(dtype=torch.int32)  # rows of dead slots are -1; faster than (rows < 0)
    return bool(layout.num_slots - dead <= limit)


def _on_gpu(operation: str, x: Tensor, layout: Layout, ragged: bool) -> Backend:
    # rounded, so that a batch of varying length does not ask the model anew every time
    tokens = 1 << (x.shape[0] | 1).bit_length() - 1
    kind = cost.arithmetic(x.dtype)
    return _fastest_on_gpu(operation, x.device, x.dtype, kind, tokens, ragged, layout.num_slots, *layout.geometry)


@functools.lru_cache(maxsize=4096)
def _fastest_on_gpu(
    operation, device, dtype, arithmetic, tokens, ragged, num_slots, num_rows, num_cols, groups, block_size, full
) -> Backend:
    if full:
        return dense
    out, into = num_rows * block_size, num_cols // groups * block_size
    density = num_slots * block_size**2 / (out * into)
    product = cost.Product(operation, block_size, arithmetic, out, into, tokens, _device_name(device))
    # groups were not measured with cuda, and an H100 takes the tiles of the H200 but not this decision
    measured = operation in cost.PRODUCTS and groups == 1 and not ragged
    if measured and cost.is_for_cuda(product, density) and _has_own_table(device):
        if not cuda.unavailable(device) and not cuda.refuses(device, dtype, block_size, max(out, into)):
            return cuda
    has_kernel = operation in triton.OPERATIONS and dtype in triton.DTYPES and block_size in triton.BLOCK_SIZES
    if not has_kernel or triton.unavailable():
        return dense
    # without its host's knowledge, the vendor's GEMM would multiply every token by every group
    if ragged or operation not in cost.PRODUCTS:
        return triton
    return triton if density <= cost.break_even(product) else dense


_device_name = devices.name_of


def _has_own_table(device: torch.device) -> bool:
    return _device_name(device) == torch.cuda.get_device_name(device)


def _find(backend: str) -> Backend:
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; there are {', '.join(BACKENDS)}")
    if reason := BACKENDS[backend].unavailable():
        raise RuntimeError(f"backend {backend!r} was asked for, but {reason}")
    return BACKENDS[backend]


# What SPARSEKERN_BACKEND forces, then what each block of `use` does that has not ended.
_forcing = [(_find(os.environ["SPARSEKERN_BACKEND"]) if os.environ.get("SPARSEKERN_BACKEND") else None,)]
