"""Truly sparse training in PyTorch: weights, gradients and optimiser state exist for live blocks only."""

from sparsekern._version import __version__
from sparsekern.choose import use
from sparsekern.linear import SparseLinear
from sparsekern.products import dds, sdd
from sparsekern.rewire.gmp import GMP
from sparsekern.rewire.optimizer_state import reset_state
from sparsekern.rewire.rules import SET, RigL, Static
from sparsekern.rewire.schedule import cosine
from sparsekern.topology import Topology

__all__ = [
    "GMP",
    "SET",
    "RigL",
    "SparseLinear",
    "Static",
    "Topology",
    "__version__",
    "cosine",
    "dds",
    "reset_state",
    "sdd",
    "use",
]
