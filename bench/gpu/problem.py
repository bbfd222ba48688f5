"""A layer, its random data and the true products in float64, on what all contenders are measured."""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import sparsekern as sk
from bench.gpu.clock import DEVICE, REHEARSAL
from sparsekern.backends import reference

PRODUCTS = ("dds", "dds_back", "sdd")  # x Wᵀ, dy W and dyᵀx on the live blocks
# bfloat16 on a GPU; Triton's interpreter does not multiply it
DTYPE = {"half": torch.float16 if REHEARSAL else torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
# Relative error of a product in the Frobenius norm: some times the rounding of inputs and outputs.
BOUND = {"half": 1e-2, "tf32": 2e-3, "ieee": 1e-5}
ROTATED_BYTES = 2**10 if REHEARSAL else 2**27  # more than the L2 cache of any GPU of today


@dataclass(frozen=True)
class Case:
    out_features: int
    in_features: int
    tokens: int
    density: float
    block_size: int
    arithmetic: str  # "half" (bfloat16), "tf32" or "ieee" (float32)


class Problem:
    """Sets torch's precision of float32 products, too."""

    def __init__(self, case: Case):
        self.case, self.dtype = case, DTYPE[case.arithmetic]
        torch.set_float32_matmul_precision("highest" if case.arithmetic == "ieee" else "high")
        torch.manual_seed(0)
        sizes = case.in_features, case.out_features
        options = {"density": float(case.density), "block_size": case.block_size, "bias": False}
        self.layer = sk.SparseLinear(*sizes, device=DEVICE, dtype=self.dtype, **options)
        self.weight, self.layout = self.layer.weight.detach(), self.layer.topology.layout
        self.dense = reference.densify(self.weight, self.layout)[0]
        self.mask = reference.densify(torch.ones_like(self.weight), self.layout)[0]
        bytes_per_set = case.tokens * sum(sizes) * self.dtype.itemsize
        self.sets = [
            tuple(torch.randn(case.tokens, n, device=DEVICE, dtype=self.dtype) for n in sizes)
            for _ in range(min(max(2, -(-ROTATED_BYTES // bytes_per_set)), 64))
        ]
        self._next = itertools.cycle(self.sets)
        self.checked: set[str] = set()
        """Products that a contender has compared with the truth itself."""

    def next_set(self) -> tuple[Tensor, Tensor]:
        """x and dy that were last used the longest time ago."""
        return next(self._next)

    def truth(self, product: str, weight: Tensor | None = None) -> Tensor:
        """float64 product of the first set with W, or with another dense weight; dW in slots."""
        if weight is None:
            return self._truths[product]
        x, dy = (t.double() for t in self.sets[0])
        return x @ weight.double().t() if product == "dds" else dy @ weight.double()

    @cached_property
    def _truths(self) -> dict[str, Tensor]:
        x, dy = (t.double() for t in self.sets[0])
        w = self.dense.double()
        return {"dds": x @ w.t(), "dds_back": dy @ w, "sdd": reference.gather((dy.t() @ x)[None], self.layout)}

    def error(self, product: str, result: Tensor, weight: Tensor | None = None) -> float:
        """Relative error; a sparse or dense matrix for dW is compared in its live blocks."""
        if result.layout is not torch.strided:
            result = result.to_dense()
        if product == "sdd" and result.dim() == 2:
            result = reference.gather(result.contiguous()[None], self.layout)
        truth = self.truth(product, weight)
        return float((result.double() - truth).norm() / truth.norm())
