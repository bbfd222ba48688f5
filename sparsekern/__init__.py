"""Truly sparse training in PyTorch: weights, gradients and optimiser state exist for live blocks only."""

from sparsekern._version import __version__
from sparsekern.choose import use
from sparsekern.linear import SparseLinear
from sparsekern.products import dds, sdd
from sparsekern.topology import Topology

__all__ = ["SparseLinear", "Topology", "__version__", "dds", "sdd", "use"]
