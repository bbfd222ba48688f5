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

# Density above which the vendor's GEMM, with the copies it needs, takes less time than the C++ kernels, by block size.
BREAK_EVEN = {1: 0.2, 2: 0.25, 4: 0.35, 8: 0.5, 16: 0.7, 32: 0.8, 64: 0.8, 128: 0.8}


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
    return cpu if not layout.full and sparse_is_faster(layout) else _vendor


def sparse_is_faster(layout: Layout) -> bool:
    """Whether the C++ kernels beat the vendor's GEMM at the present density; reads a CPU tensor, and no other.

    The number of slots bounds the live blocks, so the live ones are counted only where that bound decides nothing: a
    network under gradual pruning, between two compactions.
    """
    if cpu.unavailable() or layout.block_rows.device.type != "cpu":
        return False
    limit = BREAK_EVEN[layout.block_size] * layout.num_rows * layout.num_cols / layout.groups
    return layout.num_slots <= limit or bool((layout.block_rows >= 0).sum() <= limit)


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


_forced = _find(os.environ["SPARSEKERN_BACKEND"]) if "SPARSEKERN_BACKEND" in os.environ else None
