"""Truly sparse training in PyTorch: weights, gradients and optimiser state exist for live blocks only."""

from sparsekern import integrations
from sparsekern._version import __version__
from sparsekern.choose import use
from sparsekern.conv import SparseConv2d
from sparsekern.convert import densify, sparsify
from sparsekern.initialise import init_
from sparsekern.linear import SparseLinear
from sparsekern.load import load
from sparsekern.planning import plan, plan_from
from sparsekern.products import dds, sdd
from sparsekern.rewire.drop_and_grow import SET, DropAndGrow, RigL
from sparsekern.rewire.gmp import GMP
from sparsekern.rewire.optimizer_state import reset_state
from sparsekern.rewire.rule import Static
from sparsekern.rewire.schedule import cosine
from sparsekern.summary import summary
from sparsekern.topology import Topology

__all__ = [
    "GMP",
    "SET",
    "DropAndGrow",
    "RigL",
    "SparseConv2d",
    "SparseLinear",
    "Static",
    "Topology",
    "__version__",
    "cosine",
    "dds",
    "densify",
    "init_",
    "integrations",
    "load",
    "plan",
    "plan_from",
    "reset_state",
    "sdd",
    "sparsify",
    "summary",
    "use",
]
