"""A layer, its random data and the true products in float64, on what all contenders are measured."""

from functools import cached_property, lru_cache

import torch
from torch import Tensor

import sparsekern as sk
from bench.case import Case
from bench.measure import ROTATED_BYTES, rotated
from sparsekern.backends import reference

# x Wᵀ, dy W and dyᵀx on the live blocks
PRODUCTS = ("dds transposed", "dds", "sdd")
# Greatest error of an element, relative to the greatest element: some times the rounding of inputs and outputs. It
# shows a single lost block, which a norm over the whole matrix would hide.
BOUND = {"bfloat16": 1e-2, "float16": 2e-3, "tf32": 2e-3, "float32": 1e-5}


class Problem:
    """Sets torch's precision of float32 products, too."""

    def __init__(self, case: Case, rotated_bytes: int = ROTATED_BYTES):
        self.case = case
        torch.set_float32_matmul_precision("high" if case.arithmetic == "tf32" else "highest")
        torch.manual_seed(0)
        options = {"density": float(case.density), "block_size": case.block_size, "bias": False}
        self.layer = sk.SparseLinear(
            case.in_features, case.out_features, device=case.device, dtype=case.dtype, **options
        )
        self.weight, self.layout = self.layer.weight.detach(), self.layer.topology.layout
        self.dense = reference.densify(self.weight, self.layout)[0]
        self.mask = reference.densify(torch.ones_like(self.weight), self.layout)[0]
        self._x, self._dy = (
            rotated(case.tokens, features, case.dtype, case.device, rotated_bytes)
            for features in (case.in_features, case.out_features)
        )
        self.first = self._x.tensors[0], self._dy.tensors[0]
        self.calls = 1 if rotated_bytes == ROTATED_BYTES else min(len(self._x), len(self._dy))
        """How many calls one timing of a GPU takes, so that each finds cold data."""

    def next_set(self) -> tuple[Tensor, Tensor]:
        """x and dy that were last used the longest time ago."""
        return next(self._x), next(self._dy)

    def truth(self, product: str, weight: Tensor | None = None) -> Tensor:
        """float64 product of the first set with W, or with another dense weight; dW in slots."""
        if weight is None:
            return self._truths[product]
        x, dy = (t.double() for t in self.first)
        return x @ weight.double().t() if product == "dds transposed" else dy @ weight.double()

    @cached_property
    def _truths(self) -> dict[str, Tensor]:
        x, dy = (t.double() for t in self.first)
        w = self.dense.double()
        return {
            "dds transposed": x @ w.t(),
            "dds": dy @ w,
            "sdd": reference.gather((dy.t() @ x)[None], self.layout),
        }

    def check(self, product: str, result: Tensor, weight: Tensor | None = None) -> None:
        """Compare a result for the first set with the truth; a sparse or dense matrix for dW in its live blocks.

        Raises:
            ValueError: an element is wrong by more than the bound.
        """
        if result.layout is not torch.strided:
            result = result.to_dense()
        if product == "sdd" and result.dim() == 2:
            result = reference.gather(result.contiguous()[None], self.layout)
        truth, bound = self.truth(product, weight), BOUND[self.case.arithmetic]
        error = float((result.double() - truth).abs().max() / truth.abs().max())
        if not error < bound:
            raise ValueError(f"{product} is wrong: relative error {error:.2g}, bound {bound}")


# The same for all contenders of a case: the float64 truths take longer than many a measurement.
problem_of = lru_cache(maxsize=2)(Problem)
