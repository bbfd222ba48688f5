"""A layer's training step against SparseLab's (PyPI: sparselab), which trains truly sparse layers on a CPU too."""

from importlib import metadata

import numpy as np
import pytest
import torch
from torch import nn

import sparsekern as sk
from bench.case import HEADLINES, SMOKE
from bench.networks import check_same
from bench.training import Training, sparse_training, work

CASES = {"smoke": SMOKE, "quick": HEADLINES[:1], "full": [case for case in HEADLINES if case.threads == 1]}


def theirs(layer: sk.SparseLinear) -> nn.Module:
    """Their layer with our weights; it knows single weights only, so our blocks are many of them."""
    import sparselab

    other = sparselab.SparseLinear(layer.in_features, layer.out_features)
    other._csr = sparselab.PaddedCSR.from_dense(layer.to_dense())
    other._values = nn.Parameter(torch.from_numpy(np.asarray(other._csr.values)))  # shared with their kernels
    other.bias.data.copy_(layer.bias.data)
    return other


def bench_step(compare, record, case):
    ours = sparse_training(case)
    try:
        other = theirs(ours.layer)
    except ImportError as failure:
        record("step", partner="SparseLab", reason=str(failure))
        pytest.skip(str(failure))
    check_same(ours.layer, other, torch.randn(case.tokens, case.in_features))
    found = compare(ours.step, Training(other, case).step)
    record("step", partner=f"SparseLab {metadata.version('sparselab')}", **found, **work(ours.layer, case.tokens))
