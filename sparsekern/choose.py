"""Choose which backend answers a product, and when the vendor's dense GEMM is the faster one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import Tensor

from sparsekern.backends import reference
from sparsekern.topology import Layout

BACKENDS: dict[str, ModuleType] = {"reference": reference}

_forced = os.environ.get("SPARSEKERN_BACKEND")


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Force a backend for the products called inside: `with sparsekern.use("reference"): ...`.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it is not available here; the message says what is missing.
    """
    global _forced
    _check(backend)
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def backend_for(tensor: Tensor, weight: Tensor, layout: Layout) -> ModuleType:
    """The module whose `dds` and `sdd` are to answer for these operands."""
    return reference


def sparse_is_faster(block_size: int, density: float) -> bool:
    """Whether a CPU product over the live blocks beats the vendor's dense GEMM at this density."""
    return False


def _check(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; there are {', '.join(BACKENDS)}")
