"""Choose which backend answers a product, and when the vendor's dense GEMM is the faster one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from sparsekern.backends import cpu, reference, triton
from sparsekern.topology import Layout

BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu, "triton": triton}

# Density above which the vendor's GEMM takes less time than the C++ kernels, by block size: where a training step of
# 1024 x 1024 with AVX2 kernels against MKL's AVX2 GEMM, one thread, 256 or 2048 tokens, broke even first
# (bench/bench_paths.py; AMD EPYC of 2024). AVX-512 kernels broke even at 0.45 (block 1) or not at all.
BREAK_EVEN = {1: 0.4, 2: 0.6, 4: 0.8, 8: 1.0, 16: 1.0, 32: 1.0, 64: 1.0, 128: 1.0}
# The same for bfloat16 where the CPU multiplies it in hardware, which the GEMM does and the C++ kernels do not.
BREAK_EVEN_BFLOAT16 = {1: 0.12, 2: 0.2, 4: 0.3, 8: 0.35, 16: 0.35, 32: 0.4, 64: 0.4, 128: 0.4}
# Copying blocks into a dense matrix and back takes about as long as the GEMM of this many tokens.
COPY_TOKENS = 32


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Force a backend for the products called inside: `with sparsekern.use("reference"): ...`.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it is not available here; the message says what is missing.
    """
    global _forced
    before, _forced = _forced, _find(backend)
    try:
        yield
    finally:
        _forced = before


def backend_for(x: Tensor, layout: Layout) -> ModuleType | SimpleNamespace:
    """What is to answer a product of x: something with the functions `dds` and `sdd` of a backend."""
    takes = x.dtype in (torch.float32, torch.bfloat16) and x.device.type == "cpu"
    if _forced is not None:
        if _forced is cpu and not takes:
            raise RuntimeError(f"backend 'cpu' takes float32 and bfloat16 on a CPU, got {x.dtype} on {x.device}")
        if _forced is triton and not triton.takes(x, layout):
            got = f"{x.dtype} on {x.device} in blocks of {layout.block_size}"
            raise RuntimeError(f"backend 'triton' takes {triton.TAKES}, got {got}")
        return _forced
    if x.device.type == "cuda":
        # A measured table per device belongs here: density and shape say when densify and the vendor's GEMM are faster.
        return triton if not layout.full and triton.takes(x, layout) and not triton.unavailable() else reference
    if not takes or cpu.unavailable():
        return reference
    density = break_even(layout.block_size, x.dtype)
    if (
        layout.full
    ):  # not copied; and GMP asks at its events whether to leave it, counting here would cost every product
        return cpu if density >= 1 else _vendor
    return cpu if _is_sparser(layout, density * (1 + COPY_TOKENS / max(1, len(x)))) else _vendor


def sparse_is_faster(layout: Layout, dtype: torch.dtype) -> bool:
    """Whether the C++ kernels beat the vendor's GEMM at the present density; reads a CPU tensor, and no other."""
    if cpu.unavailable() or layout.block_rows.device.type != "cpu":
        return False
    return _is_sparser(layout, break_even(layout.block_size, dtype))


def break_even(block_size: int, dtype: torch.dtype) -> float:
    """Density up to which the C++ kernels take less time than the vendor's GEMM."""
    in_hardware = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (BREAK_EVEN_BFLOAT16 if in_hardware else BREAK_EVEN)[block_size]


def _is_sparser(layout: Layout, density: float) -> bool:
    """Whether at most this share of the blocks is live.

    The number of slots bounds the live blocks, so the live ones are counted only where that bound decides nothing: a
    network under gradual pruning, between two compactions.
    """
    limit = density * layout.num_rows * layout.num_cols / layout.groups
    if layout.num_slots <= limit:
        return True
    dead = -layout.block_rows.clamp(max=0).sum(
        dtype=torch.int32
    )  # rows of dead slots are -1; (rows < 0).sum() is slower
    return bool(layout.num_slots - dead <= limit)


def _vendor_dds(x, weight, layout, bias=None, transpose=False, token_offsets=None):
    return reference.multiply(x, cpu.densify(weight, layout), bias, transpose, token_offsets)


def _vendor_sdd(dy, x, layout, token_offsets=None):
    return cpu.gather(reference.outer(dy, x, layout.groups, token_offsets), layout)


# The vendor's GEMM on a CPU: the reference's products, with the C++ copies between blocks and dense matrices.
_vendor = SimpleNamespace(dds=_vendor_dds, sdd=_vendor_sdd)


def _find(backend: str) -> ModuleType:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; there are {', '.join(BACKENDS)}")
    if reason := BACKENDS[backend].unavailable():
        raise RuntimeError(f"backend {backend!r} was asked for, but {reason}")
    return BACKENDS[backend]


_forced = _find(os.environ["SPARSEKERN_BACKEND"]) if os.environ.get("SPARSEKERN_BACKEND") else None
