"""A layer's training step against mask x dense: the same topology simulated in a dense layer, as is usual in papers."""

import torch

from bench.case import HEADLINES, SMOKE
from bench.networks import check_same, masked
from bench.training import Training, sparse_training, work

CASES = {"smoke": SMOKE, "quick": HEADLINES[:1], "full": [case for case in HEADLINES if case.threads == 1]}


def bench_step(compare, record, case):
    ours = sparse_training(case)
    theirs = Training(masked(ours.layer), case)
    check_same(ours.layer, theirs.layer, torch.randn(case.tokens, case.in_features))
    record("step", partner="mask x dense", **compare(ours.step, theirs.step), **work(ours.layer, case.tokens))
