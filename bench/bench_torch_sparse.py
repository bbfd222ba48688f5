"""torch's own sparse matrices (CSR, BSR): x Wᵀ and dy W for row-major activations, with the copies that this takes."""

import pytest
import torch

import sparsekern as sk
from bench.case import HEADLINES, SMOKE
from bench.measure import rotated
from bench.training import sparse_training, work

CASES = {
    "smoke": SMOKE,
    "quick": HEADLINES[:1],
    "full": [case for case in HEADLINES if case.threads == 1 or case.block_size == 16],
}

# What one can write, as a function of the matrix in torch's format, its transpose in that format, and the activations.
FORWARD = {
    "F.linear(x, W)": lambda w, wt, x: torch.nn.functional.linear(x, w),
    "(W @ x.T).T": lambda w, wt, x: (w @ x.t()).t().contiguous(),
}
INPUT_GRADIENT = {
    "dy @ W": lambda w, wt, dy: dy @ w,
    "(W.T @ dy.T).T": lambda w, wt, dy: (w.t() @ dy.t()).t().contiguous(),
    "(WT @ dy.T).T, WT stored": lambda w, wt, dy: (wt @ dy.t()).t().contiguous(),
}
CALLS = [("x Wᵀ", text) for text in FORWARD] + [("dy W", text) for text in INPUT_GRADIENT]


@pytest.mark.parametrize(("product", "text"), CALLS)
@pytest.mark.parametrize("format", ["CSR", "BSR"])
def bench_torch_sparse(compare, record, case, format, product, text):
    forward = product == "x Wᵀ"
    layer = sparse_training(case).layer
    dense = layer.to_dense()
    blocks = (case.block_size, case.block_size)
    w, wt = (d.to_sparse_csr() if format == "CSR" else d.to_sparse_bsr(blocks) for d in (dense, dense.t().contiguous()))
    theirs = (FORWARD if forward else INPUT_GRADIENT)[text]
    rows = rotated(case.tokens, case.in_features if forward else case.out_features)

    @torch.no_grad()
    def ours():
        return sk.dds(next(rows), layer.weight, layer.topology, transpose=forward)

    name = f"{product}: {format} {text}"
    try:
        x = next(rows)
        torch.testing.assert_close(theirs(w, wt, x), x @ (dense.t() if forward else dense), rtol=1e-4, atol=1e-4)
    except RuntimeError as failure:
        record(name, reason=str(failure).splitlines()[0])
        pytest.skip(f"{name}: {failure}")
    record(
        name,
        partner=f"torch {format}",
        **compare(ours, lambda: theirs(w, wt, next(rows))),
        **work(layer, case.tokens, step=False),
    )
