"""Truly sparse training in PyTorch: weights, gradients and optimiser state exist for live blocks only."""

from sparsekern._version import __version__
from sparsekern.choose import use
from sparsekern.conv import SparseConv2d
from sparsekern.convert import densify, plan, plan_from, sparsify
from sparsekern.linear import SparseLinear
from sparsekern.products import dds, sdd
from sparsekern.topology import Topology

__all__ = [
    "SparseConv2d",
    "SparseLinear",
    "Topology",
    "__version__",
    "dds",
    "densify",
    "plan",
    "plan_from",
    "sdd",
    "sparsify",
    "use",
]
